"""Saving and loading the one `state` of a run: atomic, with every random generator, and no code inside.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts. It is read with `weights_only=True`,
which builds nothing else: a file from a stranger cannot run code.
"""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
# What torch's reader raises on bytes that are not what they claim to be.
UNREADABLE = (
    pickle.UnpicklingError,
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
    """Write the state under a temporary name, flush it to the disk, and rename: `path` is whole or untouched."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise CheckpointError(f"{path}: cannot be written ({error.__context__ or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """The state saved at `path`, its tensors on the CPU. Raises `CheckpointError`."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # torch also reads an older form, which nothing here writes
                raise CheckpointError(f"{path}: not a checkpoint, or a damaged one")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project (format {FORMAT})")
    return state


def load_last(folder: str | Path) -> dict[str, Any] | None:
    """The state of `last.pt` in a run directory; None for a run that was ended before it took a step."""
    path, metrics = Path(folder, "last.pt"), Path(folder, "metrics.jsonl")
    if not path.exists() and not (metrics.exists() and metrics.stat().st_size):
        return None
    return load(path)


def rng_state(device: torch.device, bptt_rng: torch.Generator) -> dict[str, torch.Tensor]:
    """The state of every generator that a run draws from."""
    state = {"torch": torch.get_rng_state(), "bptt": bptt_rng.get_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device, bptt_rng: torch.Generator) -> None:
    """Continue every generator where `rng_state` found it; one of a device that is not in use is left out."""
    torch.set_rng_state(state["torch"])
    bptt_rng.set_state(state["bptt"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
