"""Saving and loading the one `state` of a run: atomic, sealed by a checksum, in two copies, and no code inside.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, in torch's zip format. It is read with
`weights_only=True`, which builds nothing else: a file from a stranger cannot run code. The sha256 of the file
stands at its end, where a zip file has room for a comment, so that `torch.load` reads it like any other.

Equal states give equal bytes; what time it is has no place in a state.
"""

import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import shutil
import stat
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = 4
# What a checkpoint's pickle may name: what torch writes for tensors. (`weights_only` would also build a bytearray of
# any size.)
GLOBALS = re.compile(r"torch [A-Za-z]+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
BUILDERS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
LARGEST = 1e38  # that float32 holds
CHECKSUM = "sha256 {}"
CHECKSUM_SIZE = len(CHECKSUM.format("")) + 64  # bytes
# What torch's reader raises on bytes that are not what they claim to be.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
)


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one line for a person."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write the state under a temporary name, flush it to the disk, and rename: `path` is whole or untouched.

    Raises `CheckpointError` if the disk is full or will not be written to.
    """
    with written(state, path) as temporary:
        os.replace(temporary, path)


def save_last(state: dict[str, Any], folder: Path) -> None:
    """The same for last.pt, and the one before it becomes previous.pt, once the new one is on the disk."""
    last, previous = folder / "last.pt", folder / "previous.pt"
    with written(state, last) as temporary:
        if is_valid(last):
            second_name = folder / f".previous.pt.{os.getpid()}.tmp"
            try:
                second_name.unlink(missing_ok=True)
                try:
                    os.link(last, second_name)
                except OSError:  # a file system without links
                    shutil.copyfile(last, second_name)
                os.replace(second_name, previous)
            finally:
                with suppress(OSError):
                    second_name.unlink(missing_ok=True)
        os.replace(temporary, last)


@contextmanager
def written(state: dict[str, Any], path: Path) -> Iterator[Path]:
    """A file beside `path` that holds the state, to be renamed inside; gone when this ends."""
    data = with_checksum(state)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        flush_folder(path.parent)
    except OSError as error:
        free = f", and {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free" if path.parent.exists() else ""
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); it takes {len(data) / 1e6:,.1f} MB{free}; what was"
            " saved before is untouched"
        ) from error
    finally:
        with suppress(OSError):  # a disk that lets nothing be removed either
            temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """The state saved at `path`, its tensors on the CPU. Raises `CheckpointError`."""
    damaged = CheckpointError(f"{path}: not a checkpoint, or a damaged one")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a file")
        with open(path, "rb") as file:
            if not (has_checksum(file) and is_safe(file)):
                raise damaged
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            older = " (or one of an earlier version, which alone can go on with it)" if isinstance(state, dict) else ""
            raise CheckpointError(f"{path}: not a checkpoint of this project, format {FORMAT}{older}")
        if not all(t.device.type == "cpu" and t.nbytes <= t.untyped_storage().nbytes() for t in tensors(state)):
            raise damaged  # a few bytes that would unfold to many
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE as error:
        if out_of_memory(error):
            raise  # which says nothing of the file
        raise damaged from error
    return state


def load_last(folder: str | Path) -> tuple[dict[str, Any] | None, str | None]:
    """The state to go on from, None for a run that was ended before it took a step; and a line for its user where
    last.pt is lost and previous.pt was taken. Raises `CheckpointError` if neither can be read."""
    last, previous, metrics = (Path(folder, name) for name in ("last.pt", "previous.pt", "metrics.jsonl"))
    if not last.exists() and not previous.exists() and not (metrics.exists() and metrics.stat().st_size):
        return None, None
    try:
        return load(last), None
    except CheckpointError as error:
        if not previous.exists():
            raise
        return load(previous), f"{error}; going on from {previous.name}, the one before it"


class CheckpointManager:
    """Saves a run's state when it is time, and when it is told to; of several ranks the one that `writes`."""

    def __init__(self, folder: Path, minutes: float, writes: bool = True):
        self.folder, self.seconds, self.writes = folder, 60 * minutes, writes
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last save is so long ago that the next one should be now."""
        return time.monotonic() - self.saved >= self.seconds

    def save_last(self, state: dict[str, Any]) -> None:
        """Save as last.pt."""
        if self.writes:
            save_last(state, self.folder)
        self.saved = time.monotonic()

    def save_best(self, state: dict[str, Any]) -> None:
        """Save as best.pt."""
        if self.writes:
            save(state, self.folder / "best.pt")

    def replace(self, state: dict[str, Any]) -> None:
        """Save as last.pt, and previous.pt stays what it is."""
        if self.writes:
            save(state, self.folder / "last.pt")


# --- bytes ---


def with_checksum(state: dict[str, Any]) -> bytes:
    """A checkpoint's bytes, its checksum at their end."""
    file = io.BytesIO()
    torch.save(canonical({"format": FORMAT, **state}), file)
    file.seek(-2, os.SEEK_END)  # the length of a zip file's comment, which torch leaves at 0
    file.write(struct.pack("<H", CHECKSUM_SIZE))
    file.write(CHECKSUM.format(hashlib.sha256(file.getbuffer()).hexdigest()).encode())
    return file.getvalue()


def canonical(value: Any) -> Any:
    """The value built anew, so that its bytes tell what it is and not how it came about.

    Pickle writes a string that is the same object as an earlier one otherwise than one that is merely equal, and
    a tensor with all of the memory that it is a view of.
    """
    if isinstance(value, dict):
        return {canonical(key): canonical(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(canonical, value))
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return value


def has_checksum(file: BinaryIO) -> bool:
    """Whether a file ends with the checksum of what comes before."""
    left = file.seek(0, os.SEEK_END) - CHECKSUM_SIZE
    digest = hashlib.sha256()
    file.seek(0)
    while left > 0:
        block = file.read(min(1 << 20, left))
        if not block:
            return False
        digest.update(block)
        left -= len(block)
    return file.read() == CHECKSUM.format(digest.hexdigest()).encode()


def is_valid(path: Path) -> bool:
    """Whether there is a file with a right checksum."""
    try:
        with open(path, "rb") as file:
            return has_checksum(file)
    except OSError:
        return False


def is_safe(file: BinaryIO) -> bool:
    """Whether a zip file's parts are stored as they are, in as many bytes as they have, and build tensors and plain
    values alone: nothing would swell."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(p.compress_type != zipfile.ZIP_STORED for p in parts) or sum(p.file_size for p in parts) > size:
            return False
        codes = [code for p in parts if p.filename.endswith(".pkl") for code in pickletools.genops(archive.read(p))]
    return all(
        opcode.name not in BUILDERS and (opcode.name != "GLOBAL" or GLOBALS.fullmatch(argument))
        for opcode, argument, _ in codes
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that there is no memory, on a GPU or on the host."""
    texts = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in it; a part that is there many times is looked into once."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where a folder can be opened for that."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        pass  # some network file systems have no such thing; the file itself is there
    finally:
        os.close(number)


# --- form ---


def validate_state(found: Any, form: Any, where: str = "state") -> None:
    """Raises ValueError unless `found` has all that `form` has, and every part of it is of the same kind.

    That is: dicts with the keys of the form (an empty one passes: an optimizer before its first step), tensors of
    its shapes and dtypes, numbers that do not count below zero, and lists that are like the form's entry by entry
    or, of another length, like its first entry.
    """
    if isinstance(form, dict):
        if not isinstance(found, dict) or (found and not form.keys() <= found.keys()):
            raise ValueError(f"{where}: {', '.join(map(str, form))[:80]} expected")
        for key in found.keys() & form.keys():
            validate_state(found[key], form[key], f"{where}, {key}")
    elif isinstance(form, list | tuple):
        if not isinstance(found, list | tuple):
            raise ValueError(f"{where}: a list expected")
        alike = form if len(found) == len(form) else form[:1] * len(found)
        for i, (part, like) in enumerate(zip(found, alike, strict=len(form) > 0)):
            validate_state(part, like, f"{where}, {i}")
    elif isinstance(form, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (form.shape, form.dtype):
            raise ValueError(f"{where}: a tensor {tuple(form.shape)} expected")
    else:
        limits = {int: (0, 1 << 62), float: (-LARGEST, LARGEST)}.get(type(form))
        if type(found) is not type(form) or not (
            limits is None or limits[0] <= found <= limits[1] or found == math.inf  # the best loss before the first
        ):
            raise ValueError(f"{where}: {type(form).__name__} expected")


def optimizer_template(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The form of an optimizer's state once it has taken a step: of a copy that takes one along nothing."""
    optimizer = deepcopy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


# --- generators ---


def rng_state(device: torch.device, bptt_rng: torch.Generator) -> dict[str, Tensor]:
    """The state of every generator that a run draws from."""
    state = {"torch": torch.get_rng_state(), "bptt": bptt_rng.get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device, bptt_rng: torch.Generator) -> None:
    """Continue every generator where `rng_state` found it; one of a device that is not in use is left out."""
    torch.set_rng_state(state["torch"])
    bptt_rng.set_state(state["bptt"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
