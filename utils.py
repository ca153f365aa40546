"""The device that a run computes on and its memory, and the errors that end a run with one line."""

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class RunError(Exception):
    """A run that cannot go on, through no fault of the program; the message is one line for a person."""


class Diverged(RunError):
    """A loss or a gradient that no training recovers from."""


def choose_device(name: str, deterministic: bool = False) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU. Deterministic, what runs there gives the same
    bits every time, and an operation that cannot raises RuntimeError. On the CPU, memory is kept (`keep_memory`)."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu":
        keep_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # where graphs are captured
    return device


def keep_memory() -> None:
    """What this process frees it keeps for its next step, since on a CPU fresh pages cost more than most of what is
    computed there, and torch asks for new ones all the time. For glibc's malloc, which else gives large pieces back to
    the system at once; where there is another, nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
