"""Matrix products in a chosen precision, by the library that is quickest for them, into given tensors."""

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

from engine.inductor import START, kernel

ALIGNMENT = 16  # elements, of which the rows of a matrix are to hold a whole number of times: each then begins a vector


class Workspace(NamedTuple):
    """Where a pass puts what it computes."""

    compute_dtype: torch.dtype  # of products and of what is kept
    accum_dtype: torch.dtype  # of sums
    device: torch.device

    def take(self, *shape: int, accumulator: bool = False) -> Tensor:
        """An uninitialised tensor, in `compute_dtype` or in `accum_dtype` for an accumulator."""
        dtype = self.accum_dtype if accumulator else self.compute_dtype
        return torch.empty(START + prod(shape), dtype=dtype, device=self.device)[START:].view(shape)


def padding(rows: Tensor, compute_dtype: torch.dtype) -> int:
    """How many zeros are to follow each of these rows (..., n) so that products in that dtype are quick; none on a CPU
    in fp32, where products are as quick without."""
    return 0 if compute_dtype != torch.bfloat16 and rows.device.type == "cpu" else -rows.size(-1) % ALIGNMENT


def matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b for rows a and a weight b, by the library that is quicker at it on this processor.

    oneDNN's lead is in few rows of a large weight; it is very slow at weights that are a slice of something wider.
    """
    lead = a.dtype == torch.float32 and a.device.type == "cpu" and len(a) <= 512 and b.numel() >= 1 << 17
    if lead and (b.is_contiguous() or b.t().is_contiguous()) and onednn_is_quicker():
        out.copy_(onednn(a, b))
    else:
        torch.mm(a, b, out=out)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 by oneDNN; torch.mm takes MKL."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@cache
def onednn_is_quicker() -> bool:
    """Measured once a machine, and kept beside the compiled kernels: a run that goes on must choose as before."""
    if not torch.backends.mkldnn.is_available():
        return False
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    noted = Path(cache_dir()) / f"quicker-product-torch-{torch.__version__}-{torch.get_num_threads()}-threads.json"
    try:
        return json.loads(noted.read_text()) == "onednn"
    except (OSError, ValueError):
        pass
    a, weights = torch.ones(64, 512), torch.ones(32, 512, 1024)  # as many weights as fill a cache, in turn
    out = torch.empty(64, 1024)
    seconds = {"mkl": [], "onednn": []}
    for _ in range(5):
        for name, multiply in (
            ("mkl", lambda b: torch.mm(a, b, out=out)),
            ("onednn", lambda b: out.copy_(onednn(a, b))),
        ):
            clock = perf_counter()
            for b in weights:
                multiply(b)
            seconds[name].append(perf_counter() - clock)
    quicker = min(seconds, key=lambda name: median(seconds[name]))
    with suppress(OSError):  # a cache that cannot be written to is no reason to stop
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(quicker))
    return quicker == "onednn"


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def add_rows(total: Tensor, rows: Tensor) -> None:
    """total (V,) += the sum of the rows (n, V), where total may be wider than they are."""
    if total.dtype == rows.dtype:
        total.add_(rows.sum(0))
    else:
        add_narrow_rows(rows, total)  # of which torch would make a wide copy first


@kernel
def add_narrow_rows(rows, total):
    total.copy_(total + rows.to(total.dtype).sum(0))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """CUDA's products of fp32 tensors in TF32 inside, torch's own LSTM and GRU included, if that is the precision, else
    in full."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for setting, old in zip(settings, before, strict=True):
            setting.fp32_precision = old
