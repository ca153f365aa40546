"""What the fast engine is built from: compiled element-wise functions, their buffers, the quickest product.

Nothing here knows of cells or language models.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from math import prod
from os import environ
from pathlib import Path
from statistics import median
from threading import RLock
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

# Inductor stores an intermediate result that is used more than once, which here costs more than its arithmetic:
# everything is to stay in registers, in one loop. And on a GPU it splits a sum over few rows into two launches. Nor
# does its code have to ask what its arguments are: `Compiled` does.
ONE_PASS = {
    "realize_opcount_threshold": 10_000, "realize_reads_threshold": 1_000, "realize_acc_reads_threshold": 1_000,
    "split_reductions": False, "size_asserts": False,
}  # fmt: skip
# What a kernel is compiled for is told by its arguments; nothing else that it refers to changes.
ARGUMENTS = {"TENSOR_MATCH", "SHAPE_ENV", "CONSTANT_MATCH", "EQUALS_MATCH", "TYPE_MATCH"}
SEARCHES = RLock()  # one at a time, in whichever thread
START = 64  # of a buffer's elements: for a view that begins at none, a kernel would be compiled once more
ROW = 16  # elements, of which the rows of a matrix are to hold a whole number of times: each then begins a vector
LOG2_E = 1.4426950408889634


@cache
def compiler_found() -> bool:
    """Whether element-wise functions can be compiled here; says so once if not."""
    found = shutil.which(environ.get("CXX", "g++")) is not None
    if not found:
        print("no C++ compiler: --engine fused runs uncompiled, slower (install g++, or set CXX)", file=sys.stderr)
    return found


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """An element-wise function that writes into its arguments, compiled at its first call where that can be.

    C++ on a CPU, Triton on CUDA, from the one source; the compiled code is cached on disk. No two arguments may be one
    tensor, nor overlap where one is written. The last one is a tensor, and none is to have a gradient, since autograd
    does not notice what is written.
    """

    @cache
    def compiled() -> Callable[..., None]:
        usable = environ.get("TORCH_COMPILE_DISABLE") != "1" and compiler_found()
        return Compiled(function) if usable else function

    @wraps(function)
    def call(*args) -> None:
        compiled()(*args)

    call.compiled = compiled
    return call


class Compiled:
    """A function that torch.compile compiles, without what that does at every call to find its code again: where the
    caches are full of matrices it takes as long as a kernel.

    The code that was found for arguments of a kind is kept, and called with all others of that kind. What it wants
    besides the tensors are sizes and the numbers among the arguments (which may have become tensors of no dimension):
    they are the same for all of a kind.
    """

    def __init__(self, function: Callable[..., None]):
        options = {"guard_filter_fn": lambda guards: [g.guard_type in ARGUMENTS for g in guards]}
        self.search = torch.compile(function, fullgraph=True, backend=inductor, options=options)
        self.found: dict[tuple, tuple[Callable, list[int], tuple]] = {}

    def __call__(self, *args) -> None:
        kind = args[-1].device, *[(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args]
        if known := self.found.get(kind):
            code, places, numbers = known
            supply = *args, *numbers
            code([supply[place] for place in places])
            return
        # From torch 2.13 on each thread has settings of its own, and on CUDA autograd goes the way back in another than
        # that in which a kernel may have been made: so they stand here.
        with (
            torch._dynamo.config.patch(recompile_limit=64),  # one variant for each operation and kind of shape
            torch.fx.experimental._config.patch(use_duck_shape=False),  # nor one for each two numbers that are equal
            calls_of_inductor() as calls,
        ):
            self.search(*args)
        if len(calls) != 1:  # torch.compile was told to stand aside
            return
        [(code, wanted)] = calls
        given = {id(arg) for arg in args}
        numbers = tuple(w for w in wanted if id(w) not in given)
        if any(isinstance(number, Tensor) and number.dim() for number in numbers):  # torch has made one of two views
            return
        place_of = {id(supplied): place for place, supplied in enumerate((*args, *numbers))}
        self.found[kind] = code, [place_of[id(w)] for w in wanted], numbers


def inductor(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """The backend of torch.compile, with the settings of a kernel."""
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    narrow = any(isinstance(given, Tensor) and given.dtype == torch.bfloat16 for given in inputs)
    patches = {
        **ONE_PASS,
        # A product and a sum in one instruction: in fp32 it gains nothing, and would change the last digit of all.
        "cpp.enable_floating_point_contract_flag": "fast" if narrow else "off",
        # Twice as many predecessors as threads would be shared out whole, of 5 to two cores 3 and 2; so it is told of
        # more threads than it is to start.
        "cpp.threads": 2 * torch.get_num_threads(), "cpp.dynamic_threads": True,
    }  # fmt: skip
    return compile_fx(graph, inputs, config_patches=patches)


@contextmanager
def calls_of_inductor() -> Iterator[list[tuple[Callable, tuple]]]:
    """Inductor's code that is called inside, without what torch wraps it in, and what it is called with."""
    from torch._inductor.output_code import CompiledFxGraph

    calls = []

    def noting(graph: CompiledFxGraph, inputs: list) -> object:
        call = graph.current_callable, tuple(inputs)  # which it empties
        result = wrapped(graph, inputs)
        if not result:  # what is handed out was not written to its place
            calls.append(call)
        return result

    with SEARCHES:
        wrapped, CompiledFxGraph.__call__ = CompiledFxGraph.__call__, noting
        try:
            yield calls
        finally:
            CompiledFxGraph.__call__ = wrapped


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), by exp2, which is the exponential that Inductor leaves where it is used."""
    return 1 / (1 + torch.exp2(-LOG2_E * x))


def sigmoid_tanh(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Both of one exponential, in that dtype or that of x. Of tanh that has the absolute error of 1 in its dtype, which
    for an x in float32 is too much for the small arguments of a young model, whose batch normalisation enlarges them:
    there, the series. (An x that was rounded to bfloat16 has lost more than that.)"""
    small_matter = x.dtype == torch.float32
    x = x.to(dtype or x.dtype)
    e = torch.exp2(-LOG2_E * x)
    tanh = 2 / (1 + e * e) - 1
    if small_matter:
        q = x * x
        series = x * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
        tanh = torch.where(q < 1 / 16, series, tanh)
    return 1 / (1 + e), tanh


def realised(x: Tensor) -> Tensor:
    """x, which Inductor gives a buffer of its own, and with it a place in the order of loops. A sum can join the
    loop of an element-wise result that has come before it; else it would be a loop of its own, computing all again.
    (The buffer itself is optimised away.)"""
    return x.as_strided(x.shape, x.stride())


class Workspace(NamedTuple):
    """Where a pass puts what it computes."""

    store: torch.dtype  # of products and of what is kept
    wide: torch.dtype  # of sums
    device: torch.device

    def take(self, *shape: int, wide: bool = False) -> Tensor:
        """An uninitialised tensor, in `store` unless it is to be wide."""
        dtype = self.wide if wide else self.store
        return torch.empty(START + prod(shape), dtype=dtype, device=self.device)[START:].view(shape)


def columns_to_add(rows: Tensor, store: torch.dtype) -> int:
    """How many zeros are to follow each of these rows (..., n) so that products in that dtype are quick; none on a CPU
    in fp32, where products are as quick without."""
    return 0 if store != torch.bfloat16 and rows.device.type == "cpu" else -rows.size(-1) % ROW


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
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


def refuse_graph(order: str) -> None:
    """For a way back written by hand: called in one that is to be differentiated itself, to a derivative of that
    order, raises RuntimeError.

    (torch's `once_differentiable` notices only if the incoming gradient depends on something.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"the fused engine has no {order} derivative here; use the eager engine")


def not_formed(like: Tensor) -> Tensor:
    """In the place of a share of a gradient that is not there: no numbers, so that nobody takes the other shares for
    the whole. (torch's anomaly detection minds it.)"""
    return like.new_full((), torch.nan).expand_as(like)


def call_of_backward() -> int:
    """The number of the call of autograd that runs now, the same in every function that it runs."""
    return torch._C._current_graph_task_id()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
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
def products_in(precision: str) -> Iterator[None]:
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
