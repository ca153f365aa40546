"""Compiles element-wise functions by Inductor, and calls them without the overhead of torch.compile's checks."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from os import environ
from threading import RLock

import torch
from torch import Tensor

# By default Inductor stores an intermediate result that is used more than once, which costs more here than computing it
# again: with these settings everything stays in registers, in one loop. On a GPU it would also split a sum over few
# elements into two launches. Its code need not check the sizes of its arguments, since `Compiled` does.
ONE_PASS = {
    "realize_opcount_threshold": 10_000, "realize_reads_threshold": 1_000, "realize_acc_reads_threshold": 1_000,
    "split_reductions": False, "size_asserts": False,
}  # fmt: skip
# The guards to keep: a kernel depends on its arguments alone, since nothing else that it refers to changes.
ARGUMENTS = {"TENSOR_MATCH", "SHAPE_ENV", "CONSTANT_MATCH", "EQUALS_MATCH", "TYPE_MATCH"}
SEARCHES = RLock()  # one compilation at a time, among all threads
START = 64  # elements before a buffer's data: a kernel would be compiled again for views at offset 0 and elsewhere


@cache
def compiler_found() -> bool:
    """Returns whether there is a C++ compiler; prints a line at the first call if there is none."""
    found = shutil.which(environ.get("CXX", "g++")) is not None
    if not found:
        print("no C++ compiler: --engine fused runs uncompiled, slower (install g++, or set CXX)", file=sys.stderr)
    return found


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Decorates an element-wise function that writes into its arguments: it is compiled at its first call, if possible.

    It becomes C++ on a CPU and Triton on CUDA, and the compiled code is cached on disk. An argument is a tensor, a
    constant, or a tuple of them. No two tensors may be the same, and none may overlap one that is written. The last
    argument is a tensor or ends with one. None may require a gradient, since autograd does not see the writes.
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
    """Calls the code that torch.compile made of a function, without torch.compile's lookup at each call.

    The lookup takes as long as a kernel when matrix products have filled the CPU's caches: without it a first-order
    step takes 147 ms in the place of 173 at B 32, H 64 (benchmarks/NOTES.md). The code is stored for each kind of
    arguments, which is given by shapes, strides, dtypes and numbers. Besides the tensors it needs the numbers among the
    arguments (some as tensors of no dimension) and sizes, which are the same for all arguments of a kind.
    """

    def __init__(self, function: Callable[..., None]):
        options = {"guard_filter_fn": lambda guards: [g.guard_type in ARGUMENTS for g in guards]}
        self.search = torch.compile(function, fullgraph=True, backend=inductor, options=options)
        self.found: dict[tuple, tuple[Callable, list[int], tuple]] = {}

    def __call__(self, *args) -> None:
        flat = flattened(args)
        kind = flat[-1].device, *[(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in flat]
        if known := self.found.get(kind):
            code, places, numbers = known
            supply = *flat, *numbers
            code([supply[place] for place in places])
            return
        # The settings are made here because since torch 2.13 each thread has its own, and on CUDA autograd runs the
        # backward pass in another thread than the one that defined the kernel.
        with (
            torch._dynamo.config.patch(recompile_limit=64),  # one variant for each operation and kind of shape
            torch.fx.experimental._config.patch(use_duck_shape=False),  # equal sizes do not make another variant
            calls_of_inductor() as calls,
        ):
            self.search(*args)
        if len(calls) != 1:  # torch.compile is disabled
            return
        [(code, wanted)] = calls
        given = {id(arg) for arg in flat}
        numbers = tuple(w for w in wanted if id(w) not in given)
        if any(isinstance(number, Tensor) and number.dim() for number in numbers):  # torch has merged two views
            return
        place_of = {id(supplied): place for place, supplied in enumerate((*flat, *numbers))}
        self.found[kind] = code, [place_of[id(w)] for w in wanted], numbers


def flattened(args: Iterable) -> list:
    """Returns a kernel's arguments with the elements of each tuple in place of the tuple."""
    return [leaf for arg in args for leaf in (arg if isinstance(arg, tuple) else (arg,))]


def inductor(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Compiles a graph by Inductor with the settings of a kernel; a backend of torch.compile."""
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    narrow = any(isinstance(given, Tensor) and given.dtype == torch.bfloat16 for given in inputs)
    patches = {
        **ONE_PASS,
        # Fused multiply-add: in fp32 it gains nothing and would change the last digit of every result.
        "cpp.enable_floating_point_contract_flag": "fast" if narrow else "off",
        # Inductor divides only the outer loop among threads if it has twice as many iterations as threads: 5
        # predecessors would be 3 for one core and 2 for the other. With more threads than there are it divides further.
        "cpp.threads": 2 * torch.get_num_threads(), "cpp.dynamic_threads": True,
    }  # fmt: skip
    return compile_fx(graph, inputs, config_patches=patches)


@contextmanager
def calls_of_inductor() -> Iterator[list[tuple[Callable, tuple]]]:
    """Yields a list of the calls of Inductor's code inside the block, each with its arguments. The code is without
    torch's wrappers. `CompiledFxGraph.__call__` is replaced meanwhile, since torch has no public way to this code."""
    from torch._inductor.output_code import CompiledFxGraph

    calls = []

    def noting(graph: CompiledFxGraph, inputs: list) -> object:
        call = graph.current_callable, tuple(inputs)  # copied, since the call empties `inputs`
        result = wrapped(graph, inputs)
        if not result:  # a kernel returns nothing: everything was written into its arguments
            calls.append(call)
        return result

    with SEARCHES:
        wrapped, CompiledFxGraph.__call__ = CompiledFxGraph.__call__, noting
        try:
            yield calls
        finally:
            CompiledFxGraph.__call__ = wrapped
