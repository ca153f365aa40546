"""Reads corpora as streams of word ids; `utils.batchify` and its neighbours cut a stream into batches.

A corpus has three splits of UTF-8 text. White space separates the words of a line, and `<eos>` ends each line; the
vocabulary is the words of train, or the most frequent of them.
"""

import hashlib
import io
import os
import re
import stat
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, compress, repeat
from pathlib import Path

import numpy as np
import torch

from download import CORPORA, Source, download
from utils import DataError, atomic_write

SPLITS = ("train", "valid", "test")
EOS = "<eos>"
UNK = "<unk>"
BOM = "\ufeff"
WRITTEN_EOS = re.compile(rf"(?<!\S){EOS}(?!\S)")
ROOT = Path(__file__).resolve().parent / "corpora"  # of the named corpora, whatever the working directory
CACHES = "darts-rnn"  # the name of this project's folder in the user's cache folder
MAX_NAMED = 5  # words that a message names
MAX_LINE = 1 << 28  # bytes; text8 is one line of 10^8
CACHE_FORMAT = 2  # raise it when tokens, vocabulary or the arrays of the cache change

BUILTIN_SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
BUILTIN_MIN_COUNT = 3  # With 3, 3% of train becomes <unk>, enough to be learned, and V halves.


@dataclass(frozen=True, eq=False)  # comparing tensors gives tensors, so a corpus is equal to itself alone
class Corpus:
    """A corpus as word ids; V = len(words)."""

    name: str
    words: list[str]  # the word of each id, in order of first appearance in train; <unk> is last if it was added
    train: torch.Tensor  # (tokens,) int64, as are the next two
    valid: torch.Tensor
    test: torch.Tensor  # empty if the folder has no test.txt
    unknown: dict[str, torch.Tensor]  # by split, the positions of the words that became <unk>
    written_eos: dict[str, int]  # by split, how often <eos> is written in the text, beside the one that ends each line
    sha256: dict[str, str]  # the checksum of each split's text

    def unknown_mask(self, split: str) -> torch.Tensor:
        """Returns a mask (tokens,) of the words of a split that became `<unk>`."""
        return _mask(len(getattr(self, split)), self.unknown[split])

    def unknown_share(self, split: str) -> float:
        """Returns the share of the tokens of a split that became `<unk>`."""
        return len(self.unknown[split]) / max(len(getattr(self, split)), 1)


def is_available(name: str, root: Path = ROOT) -> bool:
    """Returns whether `load_corpus(name, root)` needs no download."""
    if name in CORPORA:
        return all(os.path.exists(Path(root, name, f"{split}.txt")) for split in SPLITS)
    return name == "builtin" or os.path.isdir(name)


def absolute_name(name: str) -> str:
    """Returns the name of a corpus such that it is found from any working directory: a folder's path is absolute."""
    return str(Path(name).absolute()) if name not in (*CORPORA, "builtin") and os.path.isdir(name) else name


def load_corpus(name: str, root: Path = ROOT, *, min_count: int = 0, vocab_size: int = 0, test: bool = True) -> Corpus:
    """Returns the corpus `penn` or `wikitext-2` (under `root`, downloaded if missing, verified by sha256), `builtin`
    (`_builtin_texts`), or that of the folder `name`, which has train.txt, valid.txt and test.txt; without `test`,
    test.txt may be missing.

    The vocabulary is the words that occur at least `min_count` times in train (0: `BUILTIN_MIN_COUNT` times in
    `builtin`, else once), and of these the most frequent, at most `vocab_size` with `<eos>` and `<unk>` (0: all). Other
    words become `<unk>`, which is added to the vocabulary if needed. The ids are cached (`_cache_folder`), in a file
    whose name contains the checksum of the splits and of these numbers. Raises DataError with every fault of the corpus
    at once.
    """
    min_count = min_count or (BUILTIN_MIN_COUNT if name == "builtin" else 1)
    without_test = not test and name not in (*CORPORA, "builtin") and not os.path.lexists(Path(name, "test.txt"))
    texts, sha256 = _read(name, [split for split in SPLITS if not (without_test and split == "test")], root)
    key = " ".join(map(str, (CACHE_FORMAT, *(sha256.get(split) for split in SPLITS), min_count, vocab_size)))
    folder = None if name == "builtin" else _cache_folder(name, root)
    cache = folder and folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    corpus = cache and _load_cache(cache, name, sha256)
    if not corpus:
        corpus = _index(name, texts, sha256, min_count, vocab_size)
        if cache:
            _save_cache(cache, corpus)
    return corpus


def read_split(
    name: str, split: str, words: Sequence[str], root: Path = ROOT
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Returns the ids (tokens,) of one split under a given vocabulary, such as a checkpoint's, a mask (tokens,) of the
    words outside it, which become `<unk>`, and the text's sha256. Raises DataError if it has no `<unk>` for them, or if
    the split cannot be read."""
    texts, sha256 = _read(name, [split], root)
    return *encode_text(texts[split], words, f"{name} {split}", "use the corpus that it was made from"), sha256[split]


def read_lines(file: str, words: Sequence[str]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Returns the lines of a text file (`-` for standard input), and as `read_split` their ids (tokens,) and a mask
    (tokens,) of the words outside the vocabulary. Raises DataError."""
    if file == "-" and sys.stdin is None:
        raise DataError("-: the standard input is closed; name a text file")
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); name a text file, or - for stdin") from error
    text = _decode(raw, Path(file))
    return list(io.StringIO(text, newline=None)), *encode_text(text, words, file, "leave these out")


# --- text to ids ---


def tokens(text: str) -> Iterator[str]:
    """Yields the words of each line of a text, and `<eos>` after each line."""
    # str.splitlines would also end lines at form feeds and at Unicode separators; a text file does not
    return chain.from_iterable(line.split() + [EOS] for line in io.StringIO(text, newline=None))


def _encode(text: str, index: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids (tokens,) of `text` and the positions of the words that `index` lacks. Those have the id of
    `<unk>`, which is the next free one if `index` lacks `<unk>` too."""
    ids = np.fromiter(map(index.get, tokens(text), repeat(-1)), np.int64)
    unknown = np.flatnonzero(ids < 0)
    ids[unknown] = index.get(UNK, len(index))
    return torch.from_numpy(ids), torch.from_numpy(unknown)


def encode_text(text: str, words: Sequence[str], name: str, remedy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids (tokens,) of `text` and a mask (tokens,) of the words outside the vocabulary, which become
    `<unk>`. Raises DataError, which calls the text `name` and ends with `remedy`, if the vocabulary has no `<unk>`."""
    index = {word: i for i, word in enumerate(words)}
    ids, unknown = _encode(text, index)
    mask = _mask(len(ids), unknown)
    if len(unknown) and UNK not in index:
        named = f"{len(unknown):,} of its words ({unknown_words(text, mask)})"
        raise DataError(f"{name}: the vocabulary given lacks {named} and has no {UNK}; {remedy}")
    return ids, mask


def _mask(n: int, positions: torch.Tensor) -> torch.Tensor:
    """Returns a mask (n,) that is true at these positions."""
    return torch.zeros(n, dtype=torch.bool).index_fill(0, positions, True)


def unknown_words(text: str, mask: torch.Tensor) -> str:
    """Returns the words of `text` that are marked in `mask` (tokens,), quoted and each once, the first few of them."""
    named = list(dict.fromkeys(repr(word) for word in compress(tokens(text), mask.tolist())))
    return ", ".join([*named[:MAX_NAMED], *(["…"] if len(named) > MAX_NAMED else [])])


def _vocabulary(counts: dict[str, int], min_count: int, vocab_size: int) -> list[str]:
    """Returns the words of train that `load_corpus` keeps, in order of first appearance, for their counts. `<eos>` is
    always kept: a text of one line has it once."""
    chosen = [word for word, count in counts.items() if count >= min_count or word == EOS]
    if vocab_size and len({*chosen, UNK}) > vocab_size:
        others = sorted((word for word in chosen if word not in (EOS, UNK)), key=counts.get, reverse=True)  # stable
        allowed = {EOS, UNK, *others[: vocab_size - 2]}
        chosen = [word for word in chosen if word in allowed]
    return chosen


def _index(name: str, texts: dict[str, str], sha256: dict[str, str], min_count: int, vocab_size: int) -> Corpus:
    """Returns the corpus with the vocabulary that `load_corpus` describes. Raises DataError if no word is left."""
    words = _vocabulary(Counter(tokens(texts["train"])), min_count, vocab_size)
    if not set(words) - {EOS, UNK}:
        few = f"--min_count {min_count}: no word of {name} train occurs so often; take a smaller one"
        raise DataError(few if min_count > 1 else f"--data {name}: train has no word but {UNK}; take another text")
    index = {word: i for i, word in enumerate(words)}
    texts = {split: texts.get(split, "") for split in SPLITS}
    encoded = {split: _encode(text, index) for split, text in texts.items()}
    unknown = {split: positions for split, (_, positions) in encoded.items()}
    if UNK not in index and any(map(len, unknown.values())):
        words.append(UNK)
    written_eos = {split: len(WRITTEN_EOS.findall(text)) for split, text in texts.items()}
    ids = {split: ids for split, (ids, _) in encoded.items()}
    return Corpus(name, words, **ids, unknown=unknown, written_eos=written_eos, sha256=sha256)


def _save_cache(path: Path, corpus: Corpus) -> None:
    """Writes the cache of a corpus, which is optional: the folder may be read-only, or the disk full."""
    arrays = {split: getattr(corpus, split).to(torch.int32).numpy() for split in SPLITS}
    arrays |= {f"unknown_{split}": positions.numpy() for split, positions in corpus.unknown.items()}
    arrays["words"] = np.frombuffer("\n".join(corpus.words).encode(), np.uint8)
    arrays["written_eos"] = np.array([corpus.written_eos[split] for split in SPLITS], np.int64)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_write(path) as file:
            np.savez(file, **arrays)


def _load_cache(path: Path, name: str, sha256: dict[str, str]) -> Corpus | None:
    """Returns the corpus cached at `path`; None if there is none or its file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
            if compressed or archive.testzip() is not None:  # numpy does not verify the checksum of a truncated array
                return None
        with np.load(path, allow_pickle=False) as arrays:
            words = arrays["words"].tobytes().decode().split()
            ids = {split: torch.from_numpy(arrays[split]).long() for split in SPLITS}
            unknown = {split: torch.from_numpy(arrays[f"unknown_{split}"]) for split in SPLITS}
            written_eos = dict(zip(SPLITS, arrays["written_eos"].tolist(), strict=True))
        used = torch.cat(list(ids.values()))
        if used.min() != 0 or used.max() != len(words) - 1 or any(split.ndim != 1 for split in ids.values()):
            return None
        if any(not ids[split].index_select(0, unknown[split]).eq(words.index(UNK)).all() for split in SPLITS
               if len(unknown[split])):  # fmt: skip
            return None
        return Corpus(name, words, **ids, unknown=unknown, written_eos=written_eos, sha256=sha256)
    except (OSError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
            zlib.error):  # fmt: skip
        return None  # the file is missing, or zipfile or numpy found it damaged


# --- files ---


def _folder(name: str, root: Path) -> Path:
    return Path(root, name) if name in CORPORA else Path(name)


def _cache_folder(name: str, root: Path) -> Path | None:
    """Returns the folder of a corpus's cache: its own if it lies under `root`, not behind a link. Any other folder may
    be shared or part of someone's data: its cache is in the user's cache folder (None if the user has no home)."""
    root, folder = Path(root), _folder(name, root)
    if Path(os.path.realpath(folder)).is_relative_to(root.parent.resolve() / root.name):
        return folder
    given = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored, by its specification
    home = Path(given if os.path.isabs(given) else os.path.expanduser("~/.cache"))
    return home / CACHES if home.is_absolute() else None


def _read(name: str, splits: Sequence[str], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the texts of `splits` and their sha256, both by split. Raises DataError with every fault at once."""
    if name == "builtin":
        texts = _builtin_texts()
        return texts, {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
    if name not in CORPORA and not os.path.isdir(name):
        raise DataError(
            f"--data {name}: no such corpus or folder; name the folder that has its train.txt, valid.txt and test.txt,"
            f" or choose {', '.join(CORPORA)} or builtin"
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
        raise DataError(f"{path}: missing; --data needs train.txt, valid.txt and, unless skipped, test.txt") from error
    except OSError as error:  # for instance a folder of that name, or no permission
        raise DataError(f"{path}: cannot be read ({error.strerror}); put a text file there") from error
    digest = hashlib.sha256(raw).hexdigest()
    if source and digest != source.sha256:
        raise DataError(
            f"{path}: broken or changed (sha256 {digest[:12]}, not {source.sha256[:12]}); remove it, and the"
            " next run downloads it; to use a text of your own, give --data its folder"
        )
    return _decode(raw, path), digest


def _decode(raw: bytes, path: Path) -> str:
    """Returns the text of the bytes of a file, without a byte order mark. Raises DataError for bytes that are no UTF-8
    and for a NUL byte, which no text has, but UTF-16 and UTF-32 have many, and if there are no words."""
    try:
        text, wrong = raw.decode(), raw.find(0)
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = raw.count(b"\n", 0, wrong) + 1
        what = "" if raw[wrong] else ", a NUL, as UTF-16 has them"
        raise DataError(
            f"{path}: not UTF-8 at line {line}, byte {wrong} of the file (0x{raw[wrong]:02x}{what});"
            " convert it, for instance with iconv"
        )
    if not (text := text.removeprefix(BOM)) or text.isspace():
        raise DataError(f"{path}: empty; put a text there")
    return text


def _bytes(path: Path) -> bytes:
    """Returns the bytes of a file of a corpus. Raises DataError for a link to another folder, a device, and a line of
    more than `MAX_LINE` bytes."""
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):  # resolve() raises for a loop of links
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
