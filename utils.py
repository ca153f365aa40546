"""What every part needs: errors for people, the device, whole files, progress bars, and texts cut into batches.

Shapes: T time steps, B batch, n time steps of a whole text.
"""

import ctypes
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm


class RunError(Exception):
    """An error that ends a run and is no fault of the program; the message is one line for a person."""


class Diverged(RunError):
    """The loss or the gradient has become so large that training does not recover."""


class DataError(Exception):
    """Data that cannot be used; `faults` has a line for each: the file or flag, what is wrong, what to do."""

    def __init__(self, *faults: str):
        self.faults = list(faults)
        super().__init__("\n".join(faults))


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """Returns the device of a name; `auto` is the first CUDA device, or the CPU if there is none. With `deterministic`,
    equal runs are bit-identical, and an operation that cannot be raises RuntimeError."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it before its first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu":
        keep_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # where graphs are captured
    return device


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Returns copies of tensors on the CPU, in float64, for which the host waits for their device only once."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def keep_memory() -> None:
    """Makes glibc's malloc, if it is in use, keep freed memory for this process. By default it returns large blocks to
    the system at once, and torch allocates them again at every step: on a CPU the page faults of new memory then cost
    more than most operations."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX of glibc's malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` at the end of the block, after it was flushed to the disk. If the block or the
    writing fails, `path` is unchanged, and the temporary file beside it is removed (unless the process is killed, or
    the disk refuses that too)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        with suppress(OSError):  # a failing disk may refuse this too
            temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Returns whether a file of this name is one that `atomic_write` or a checkpoint left unfinished."""
    return re.fullmatch(r"\..+\.([0-9a-f]{16}|\d+)\.tmp", name) is not None


def flush_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, if the file system allows it."""
    with suppress(OSError):  # some network file systems do not support it; the files themselves have been flushed
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def with_filename(error: OSError, path: Path) -> OSError:
    """Returns the error with the path of its file, which the error of a full disk lacks."""
    return OSError(error.errno, error.strerror, str(path))


def progress_bar(items: Iterable, title: str, unit: str, show: bool = True) -> tqdm:
    """Returns the items with a progress bar, which only a terminal shows, and only until the last of them."""
    return tqdm(items, desc=title, unit=unit, leave=False, disable=None if show else True, dynamic_ncols=True)


def batchify(ids: Tensor, batch_size: int, name: str = "the text") -> Tensor:
    """Cuts `ids` (tokens,) into B columns of consecutive words: (tokens // B, B), contiguous.

        a g m s         the alphabet with B = 4
        b h n t
        c i o u
        d j p v
        e k q w
        f l r x         y and z are left over and dropped

    The columns are treated as independent texts: the model never sees that g follows f, and in return reads B words at
    once. Raises DataError, with the name of the text, if that gives fewer than the two time steps that one prediction
    takes.
    """
    length = len(ids) // batch_size
    if length < 2:
        raise DataError(
            f"{name}: {len(ids):,} tokens are too few for a batch size of {batch_size} (at least {2 * batch_size:,});"
            " use a longer text"
        )
    return ids[: length * batch_size].reshape(batch_size, length).t().contiguous()  # (tokens // B, B)


def get_batch(source: Tensor, i: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, both (T, B), from time step `i` of `source` (n, B); T < seq_len at its end."""
    seq_len = min(seq_len, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len]


def equal_segments(source: Tensor, bptt: int, title: str, show: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (i, inputs, targets) of each segment of `bptt` time steps of `source` (n, B), inputs and targets (T, B)
    from time step i on. A progress bar shows `title`, unless `show` is false."""
    for i in progress_bar(range(0, len(source) - 1, bptt), title, "segment", show):
        yield i, *get_batch(source, i, bptt)


def segments(
    length: int, bptt: int, generator: torch.Generator, std: float = 0.0, max_delta: int | None = None, start: int = 0
) -> Iterator[tuple[int, int]]:
    """Yields (i, seq_len) such that each of the time steps start..length-2 is an input once.

    The base length is `bptt` with probability 0.95, else half of it. With `std` the length is normal about the base, at
    least 5, but never above bptt + max_delta (Merity et al. 2017, section 4.1). Numbers are drawn one segment at a
    time, so that the sequence continues unchanged from the state of `generator` (CPU) and the next time step `start`.
    """
    while start < length - 1:
        drawn = bptt if torch.rand((), generator=generator).item() < 0.95 else bptt / 2
        if std > 0:
            drawn = max(5, int(drawn + std * torch.randn((), generator=generator).item()))
            if max_delta is not None:
                drawn = min(drawn, bptt + max_delta)
        seq_len = min(max(1, int(drawn)), length - 1 - start)
        yield start, seq_len
        start += seq_len


class Cursor:
    """Takes full segments from `source` (n, B) without end: it starts again at the beginning when the text runs out."""

    def __init__(self, source: Tensor):
        self.source = source
        self.position = 0  # the next time step, the only state

    def take(self, seq_len: int) -> tuple[Tensor, Tensor, bool]:
        """Returns inputs and targets, both (T, B), and whether it started again, after which the hidden state is reset.
        T = seq_len, or all of a source that has fewer than seq_len + 1 time steps."""
        wrapped = self.position > 0 and self.position + seq_len > len(self.source) - 1
        if wrapped:
            self.position = 0
        x, y = get_batch(self.source, self.position, seq_len)
        self.position += len(x)
        return x, y, wrapped
