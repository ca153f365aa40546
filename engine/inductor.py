"""Element-wise functions that Inductor compiles, and calls to them without the cost of torch.compile's checks."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from os import environ
from threading import RLock

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
