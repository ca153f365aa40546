"""Saves and loads the state of a run: atomically, with a checksum, in two generations, and without executable code.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, in torch's zip format. It is read with
`weights_only=True`, which builds nothing else, so that a file from a stranger cannot run code. The comment of the zip
file is its sha256, so that `torch.load` reads it like any other. Equal states give identical files.
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
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.memory import out_of_memory
from utils import atomic_write

FORMAT = 5
NAMES = {"last.pt", "previous.pt", "best.pt"}
# A pickle may contain only the names that torch writes for tensors; `weights_only` would also build a large bytearray.
GLOBALS = re.compile(r"torch [A-Za-z]+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
BUILDERS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
MAX_FLOAT32 = 1e38  # about the largest number of float32
CHECKSUM = "sha256 {}"
CHECKSUM_SIZE = len(CHECKSUM.format("")) + 64  # bytes
# The errors that torch's reader raises on damaged or forged files.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, AttributeError, AssertionError,
    LookupError, EOFError, ArithmeticError, MemoryError, struct.error,
)  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one line for a person."""


def save(state: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Writes the state to `path` atomically; a valid checkpoint that is replaced is kept as `previous`, if given.
    Raises `CheckpointError` if the disk is full or cannot be written."""
    data = with_checksum(state)
    try:
        with atomic_write(path) as file:
            file.write(data)
            if previous and is_valid(path):
                file.flush()
                os.fsync(file.fileno())  # the new checkpoint is on the disk before `previous` changes
                link(path, previous)
    except OSError as error:
        free = f", and {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free" if path.parent.exists() else ""
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); it takes {len(data) / 1e6:,.1f} MB{free}; what was"
            " saved before is untouched"
        ) from error


def save_last(state: dict[str, Any], folder: Path) -> None:
    """Writes last.pt atomically; the last.pt that it replaces is kept as previous.pt. Raises `CheckpointError`."""
    save(state, folder / "last.pt", previous=folder / "previous.pt")


def link(path: Path, second: Path) -> None:
    """Makes `second` a second name of the file at `path` (a copy, on file systems without links), atomically."""
    temporary = second.with_name(f".{second.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, second)
    finally:
        with suppress(OSError):  # a failing disk may refuse this too
            temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Returns the state saved at `path`, with its tensors on the CPU. Raises `CheckpointError`."""
    damaged = CheckpointError(f"{path}: not a checkpoint, or a damaged one")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            best = Path(path, "best.pt")
            raise CheckpointError(f"{path}: not a file{f'; name {best}' if best.exists() else ''}")
        with open(path, "rb") as file:
            if not (has_checksum(file) and is_safe(file)):
                raise damaged
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            older = " (or one of an earlier version, which alone can resume it)" if isinstance(state, dict) else ""
            raise CheckpointError(f"{path}: not a checkpoint of this project, format {FORMAT}{older}")
        if not all(t.device.type == "cpu" and t.nbytes <= t.untyped_storage().nbytes() for t in tensors(state)):
            raise damaged  # a small file whose tensors would be expanded to a large size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE as error:
        if out_of_memory(error):
            raise  # the file may be intact
        raise damaged from error
    return state


def load_last(folder: str | Path) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the state to resume from, or None for a run that ended before its first step; and a line for the user if
    previous.pt had to be read in the place of a damaged last.pt. Raises `CheckpointError` if neither can be read."""
    last, previous, metrics = (Path(folder, name) for name in ("last.pt", "previous.pt", "metrics.jsonl"))
    if not last.exists() and not previous.exists() and not (metrics.exists() and metrics.stat().st_size):
        return None, None
    try:
        return load(last), None
    except CheckpointError as error:
        try:
            return load(previous), f"{error}; resuming from {previous.name}, the checkpoint before it"
        except CheckpointError as before:
            raise CheckpointError(f"{error}, and {previous.name} is no better; start a new run") from before


# --- bytes ---


def with_checksum(state: dict[str, Any]) -> bytes:
    """Returns the bytes of a checkpoint, with the checksum at their end."""
    file = io.BytesIO()
    torch.save(canonical({"format": FORMAT, **state}), file)
    file.seek(-2, os.SEEK_END)  # the length field of the zip comment, which torch writes as 0
    file.write(struct.pack("<H", CHECKSUM_SIZE))
    file.write(CHECKSUM.format(hashlib.sha256(file.getbuffer()).hexdigest()).encode())
    return file.getvalue()


def canonical(value: Any) -> Any:
    """Returns a copy of the value whose pickle depends on its contents alone.

    Pickle distinguishes a string that is the same object as an earlier one from one that is merely equal, and writes a
    view of a tensor with all of the memory behind it.
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
    """Returns whether a file ends with the checksum of the bytes before it."""
    size = file.seek(0, os.SEEK_END) - CHECKSUM_SIZE
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, 1 << 20):
        digest.update(file.read(min(1 << 20, size - start)))
    return file.read() == CHECKSUM.format(digest.hexdigest()).encode()


def is_valid(path: Path) -> bool:
    """Returns whether `path` is a file whose checksum is right."""
    with suppress(OSError), open(path, "rb") as file:
        return has_checksum(file)
    return False


def is_safe(file: BinaryIO) -> bool:
    """Returns whether a zip file holds only uncompressed parts, no larger than the file, and its pickle builds only
    tensors and plain values: loading it then takes no more memory than its size suggests."""
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


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields every tensor in a nested value; a part that occurs several times is visited once."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)


# --- form ---


def validate_state(state: Any, form: Any, where: str = "state") -> None:
    """Raises ValueError unless `state` has all keys of `form`, and each of its values is of the same kind.

    A dict has the keys of the form (an empty dict passes: an optimizer before its first step). A tensor has the form's
    shape and dtype, and an integer is not negative. A list matches the form entry by entry; one of another length
    matches the first entry of the form.
    """
    if isinstance(form, dict):
        if not isinstance(state, dict) or (state and not form.keys() <= state.keys()):
            raise ValueError(f"{where}: {', '.join(map(str, form))[:80]} expected")
        for key in state.keys() & form.keys():
            validate_state(state[key], form[key], f"{where}, {key}")
    elif isinstance(form, list | tuple):
        if not isinstance(state, list | tuple):
            raise ValueError(f"{where}: a list expected")
        alike = form if len(state) == len(form) else form[:1] * len(state)
        for i, (part, like) in enumerate(zip(state, alike, strict=len(form) > 0)):
            validate_state(part, like, f"{where}, {i}")
    elif isinstance(form, Tensor):
        if not isinstance(state, Tensor) or (state.shape, state.dtype) != (form.shape, form.dtype):
            raise ValueError(f"{where}: a tensor {tuple(form.shape)} expected")
    else:
        limits = {int: (0, 1 << 62), float: (-MAX_FLOAT32, MAX_FLOAT32)}.get(type(form))
        if type(state) is not type(form) or not (
            limits is None or limits[0] <= state <= limits[1] or state == math.inf  # the best loss before the first
        ):
            raise ValueError(f"{where}: {type(form).__name__} expected")


def optimizer_template(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the form of an optimizer's state after a step, from a copy that takes a step with zero gradients."""
    optimizer = deepcopy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


# --- generators ---


def rng_state(device: torch.device, bptt_rng: torch.Generator) -> dict[str, Tensor]:
    """Returns the state of each random number generator that a run uses."""
    state = {"torch": torch.get_rng_state(), "bptt": bptt_rng.get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device, bptt_rng: torch.Generator) -> None:
    """Restores the generators to a state that `rng_state` returned; the generator of an unused device is ignored."""
    torch.set_rng_state(state["torch"])
    bptt_rng.set_state(state["bptt"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
