"""Matrix products into given tensors, in a chosen precision and by the library that is fastest for them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from engine import kernel_cache
from engine.inductor import STORAGE_OFFSET, kernel

# The length of a matrix row should be a multiple of this many elements, so that each row begins at a whole vector.
ALIGNMENT = 16
# oneDNN can be ahead of MKL up to so many rows and from so many elements of the weight on (benchmarks/NOTES.md).
ONEDNN_MAX_ROWS, ONEDNN_MIN_WEIGHT = 512, 1 << 17


class Workspace(NamedTuple):
    """Allocates the tensors into which a pass writes what it computes."""

    compute_dtype: torch.dtype  # of products and of what is saved for backward
    accum_dtype: torch.dtype  # of sums
    device: torch.device

    def take(self, *shape: int, accumulator: bool = False) -> Tensor:
        """Returns an uninitialised tensor of this shape, in `compute_dtype`, or in `accum_dtype` for an accumulator."""
        dtype = self.accum_dtype if accumulator else self.compute_dtype
        return torch.empty(STORAGE_OFFSET + prod(shape), dtype=dtype, device=self.device)[STORAGE_OFFSET:].view(shape)


def padding(rows: Tensor, compute_dtype: torch.dtype) -> int:
    """Returns with how many zeros to pad the rows (..., n) of a matrix so that products in `compute_dtype` are fast.
    That is 0 on a CPU unless `compute_dtype` is bfloat16, since products there are as fast without padding."""
    return 0 if compute_dtype != torch.bfloat16 and rows.device.type == "cpu" else -rows.size(-1) % ALIGNMENT


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Writes a @ b to `out`, for a (n, k) and a weight b (k, m), by the library that is faster on this processor.
    oneDNN is ahead where a has few rows and b is large. It is very slow where b is a slice of a wider matrix."""
    is_fp32_on_cpu = a.dtype == torch.float32 and a.device.type == "cpu"
    onednn_can_lead = is_fp32_on_cpu and len(a) <= ONEDNN_MAX_ROWS and b.numel() >= ONEDNN_MIN_WEIGHT
    if onednn_can_lead and (b.is_contiguous() or b.t().is_contiguous()) and onednn_is_quicker():
        out.copy_(onednn(a, b))
    else:
        torch.mm(a, b, out=out)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in fp32, computed by oneDNN, whereas torch.mm uses MKL."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@cache
def onednn_is_quicker() -> bool:
    """Returns whether oneDNN multiplies faster than MKL on this machine.

    This is measured once per machine, version of torch and number of threads. The result is stored beside the compiled
    kernels, since a resumed run must make the same choice.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    name = f"quicker-product-torch-{torch.__version__}-{torch.get_num_threads()}-threads.json"
    try:
        path = kernel_cache.folder() / name
    except OSError:  # Each process measures if nothing can be stored.
        return quicker_library() == "onednn"
    if (known := stored_library(path)) is None:
        known = quicker_library()
        try:
            with open(path, "x") as file:
                json.dump(known, file)
        except FileExistsError:  # Another process has measured meanwhile: all make its choice.
            known = stored_library(path) or known
        except OSError:
            pass
    return known == "onednn"


def stored_library(path: Path) -> str | None:
    """Returns the choice in a file, or None if there is none; a file without one is removed."""
    with suppress(OSError):
        try:
            if (library := json.loads(path.read_text())) in ("mkl", "onednn"):
                return library
        except ValueError:
            pass
        path.unlink()
    return None


def quicker_library() -> str:
    """Returns "mkl" or "onednn", whichever multiplies faster in a short measurement."""
    a, weights = torch.ones(64, 512), torch.ones(32, 512, 1024)  # So many weights fill a cache if used in turn.
    out = torch.empty(64, 1024)
    seconds = {"mkl": [], "onednn": []}
    for _ in range(5):
        for library, multiply in (
            ("mkl", lambda b: torch.mm(a, b, out=out)),
            ("onednn", lambda b: out.copy_(onednn(a, b))),
        ):
            clock = perf_counter()
            for b in weights:
                multiply(b)
            seconds[library].append(perf_counter() - clock)
    return min(seconds, key=lambda library: median(seconds[library]))


def has_fast_bf16(device: torch.device) -> bool:
    """Returns whether products in bf16 are fast on this device. On a CPU they are where oneDNN computes them, which it
    does with AVX-512; elsewhere torch takes 25 times as long as in fp32 (benchmarks/NOTES.md)."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total` in place, for matrices or batches of matrices; `total` may have a wider dtype than both."""
    if total.dtype != a.dtype:
        total.add_(a @ b)
    elif a.dim() == 2:
        total.addmm_(a, b)
    else:
        total.baddbmm_(a, b)


def add_rows(total: Tensor, rows: Tensor) -> None:
    """Adds the sum of the rows of a matrix (n, V) to `total` (V,) in place; `total` may have a wider dtype."""
    if total.dtype == rows.dtype:
        total.add_(rows.sum(0))
    else:
        add_narrow_rows(rows, total)  # torch would first copy all rows to the wider dtype.


@kernel
def add_narrow_rows(rows, total):
    total.copy_(total + rows.to(total.dtype).sum(0))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Runs CUDA's products of fp32 tensors in TF32 inside the context if `precision` is "tf32", else in full fp32. This
    includes torch's own LSTM and GRU. The settings from before are restored at the end."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setting.fp32_precision = old
