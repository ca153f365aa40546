"""Compiles element-wise functions by Inductor, and calls them without the overhead of torch.compile's checks.

Where compiling fails, the functions run uncompiled from then on, and one line tells why.
"""

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial, wraps
from importlib import import_module
from pathlib import Path
from threading import RLock
from time import monotonic
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from engine import kernel_cache
from engine.memory import out_of_memory

# By default Inductor stores an intermediate result that is used more than once, which costs more here than computing it
# again: with these settings everything stays in registers, in one loop. On a GPU it would also split a sum over few
# elements into two launches. Its code need not check the sizes of its arguments, since `Compiled` does.
ONE_PASS = {
    "realize_opcount_threshold": 10_000, "realize_reads_threshold": 1_000, "realize_acc_reads_threshold": 1_000,
    "split_reductions": False, "size_asserts": False,
}  # fmt: skip
# The guards to keep: a kernel depends on its arguments alone, since nothing else that it refers to changes.
ARGUMENTS = {"TENSOR_MATCH", "SHAPE_ENV", "CONSTANT_MATCH", "EQUALS_MATCH", "TYPE_MATCH"}
COMPILE_LOCK = RLock()  # one compilation at a time, among all threads
# A buffer's data begins at this many elements: a kernel would be compiled again for views at offset 0 and elsewhere.
STORAGE_OFFSET = 64
TIME_LIMIT = 300.0  # seconds for all calls of a compiler that one kernel takes, far more than on a busy machine
# The modules of Triton that call ptxas or a C compiler through `subprocess`.
TRITON_CALLERS = ("triton.knobs", "triton.backends.nvidia.compiler", "triton.runtime.build")
LOG = logging.getLogger(__name__)  # prints to stderr where no handler is installed


class Call(NamedTuple):
    """A call of the code that Inductor made of a function."""

    code: Callable
    inputs: tuple
    returned: bool  # whether it returns anything: a kernel only writes into its arguments


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Decorates an element-wise function that writes into its arguments: it is compiled at its first call, if possible,
    and runs uncompiled otherwise.

    It becomes C++ on a CPU and Triton on CUDA, and the compiled code is cached on disk. An argument is a tensor, a
    constant, or a tuple of them. No two tensors may be the same, and none may overlap one that is written. The last
    argument is a tensor or ends with one. None may require a gradient, since autograd does not see the writes.
    """

    @cache
    def compiled() -> Callable[..., None]:
        return function if os.environ.get("TORCH_COMPILE_DISABLE") == "1" else Compiled(function)

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

    Once compiling has failed, all kernels of this process run uncompiled. An error of code that has begun to run may
    have left its results incomplete, and is no failure to compile: it is raised.
    """

    failed: ClassVar[bool] = False

    def __init__(self, function: Callable[..., None]):
        self.function, self.torch_compiled = function, None
        self.code_by_kind: dict[tuple, tuple[Callable, list[int], tuple]] = {}

    def __call__(self, *args) -> None:
        if Compiled.failed:
            return self.function(*args)
        flat = flattened(args)
        kind = flat[-1].device, *[(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in flat]
        if known := self.code_by_kind.get(kind):
            code, places, numbers = known
            supply = *flat, *numbers
            code([supply[place] for place in places])
            return None
        calls: list[Call] = []
        try:
            self.compile(args, calls)
        except compile_errors() as error:
            if calls or out_of_memory(innermost(error)):
                raise
            kernel_cache.discard(innermost(error))
            reason = summary(error)
        else:
            if len(calls) == 1:  # otherwise torch.compile is disabled
                self.remember(kind, flat, calls[0])
            return None
        self.function(*args)  # raises the error again if it is one of the function itself
        if not Compiled.failed:  # autograd's thread may have failed at the same time
            Compiled.failed = True
            LOG.warning(
                "compiling failed (%s): --engine fused runs uncompiled from here on, slower and with other rounding",
                reason,
            )
        return None

    def compile(self, args: tuple, calls: list[Call]) -> None:
        """Compiles the function for these arguments, runs it, and adds the calls of the compiled code to `calls`."""
        if self.torch_compiled is None:
            options = {"guard_filter_fn": lambda guards: [g.guard_type in ARGUMENTS for g in guards]}
            self.torch_compiled = torch.compile(self.function, fullgraph=True, backend=inductor, options=options)
        device_type = flattened(args)[-1].device.type
        # The settings are made here because since torch 2.13 each thread has its own, and on CUDA autograd runs the
        # backward pass in another thread than the one that defined the kernel.
        with (
            torch._dynamo.config.patch(recompile_limit=64),  # one variant for each operation and kind of shape
            torch.fx.experimental._config.patch(use_duck_shape=False),  # equal sizes do not make another variant
            COMPILE_LOCK, kernel_cache.checked(), compiler_within(TIME_LIMIT, device_type), noted_calls(calls),
        ):  # fmt: skip
            self.torch_compiled(*args)

    def remember(self, kind: tuple, flat: list, call: Call) -> None:
        """Stores the code of a call for all arguments of this kind, unless it also takes tensors of its own."""
        code, wanted, returned = call
        given = {id(arg) for arg in flat}
        numbers = tuple(w for w in wanted if id(w) not in given)
        if returned or any(isinstance(number, Tensor) and number.dim() for number in numbers):
            return  # torch has merged two views
        place_of = {id(supplied): place for place, supplied in enumerate((*flat, *numbers))}
        self.code_by_kind[kind] = code, [place_of[id(w)] for w in wanted], numbers


def flattened(args: Iterable) -> list:
    """Returns a kernel's arguments with the elements of each tuple in place of the tuple."""
    return [leaf for arg in args for leaf in (arg if isinstance(arg, tuple) else (arg,))]


def inductor(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """Compiles a graph by Inductor with the settings of a kernel; a backend of torch.compile."""
    from torch._inductor.compile_fx import compile_fx  # takes a second to import

    tensors = [given for given in inputs if isinstance(given, Tensor)]
    narrow = any(given.dtype == torch.bfloat16 for given in tensors)
    patches = {
        **ONE_PASS,
        # Fused multiply-add: in fp32 it gains nothing and would change the last digit of every result.
        "cpp.enable_floating_point_contract_flag": "fast" if narrow else "off",
        # Inductor divides only the outer loop among threads if it has twice as many iterations as threads: 5
        # predecessors would be 3 for one core and 2 for the other. With more threads than there are it divides further.
        "cpp.threads": 2 * torch.get_num_threads(), "cpp.dynamic_threads": True,
        # Triton compiles in this process, where `compiler_within` limits its time; a kernel is one to three launches,
        # for which a pool of processes would save little. C++ compiles in this process anyway.
        **({"compile_threads": 1} if any(given.device.type == "cuda" for given in tensors) else {}),
    }  # fmt: skip
    return compile_fx(graph, inputs, config_patches=patches)


@contextmanager
def noted_calls(calls: list[Call]) -> Iterator[None]:
    """Adds the calls of Inductor's code inside the block to `calls`, when they begin. The code is without torch's
    wrappers. `CompiledFxGraph.__call__` is replaced meanwhile, since torch has no public way to this code."""
    from torch._inductor.output_code import CompiledFxGraph

    def noting(graph: CompiledFxGraph, inputs: list) -> object:
        call = Call(graph.current_callable, tuple(inputs), True)  # copied, since the call empties `inputs`
        calls.append(call)
        result = wrapped(graph, inputs)
        calls[-1] = call._replace(returned=bool(result))
        return result

    wrapped, CompiledFxGraph.__call__ = CompiledFxGraph.__call__, noting
    try:
        yield
    finally:
        CompiledFxGraph.__call__ = wrapped


# --- where compiling fails ---


@contextmanager
def compiler_within(seconds: float, device_type: str) -> Iterator[None]:
    """Ends a compiler that Inductor or, on CUDA, Triton calls inside the block and that has not ended after so many
    seconds, counted from the block's beginning. (What Triton does by itself before it calls ptxas has no limit.)"""
    run = partial(run_until, monotonic() + seconds)
    limited = SimpleNamespace(**{
        **vars(subprocess), "run": run, "check_call": lambda *args, **options: run(*args, check=True, **options),
        "check_output": lambda *args, **options: run(*args, check=True, stdout=subprocess.PIPE, **options).stdout,
    })  # fmt: skip
    callers = [import_module("torch._inductor.cpp_builder")]
    for name in TRITON_CALLERS if device_type == "cuda" else ():
        with suppress(ImportError):  # Triton may be missing, or of another version.
            callers.append(import_module(name))
    for module in callers:
        module.subprocess = limited
    try:
        yield
    finally:
        for module in callers:
            module.subprocess = subprocess


def run_until(
    until: float, command: list[str], *, check: bool = False, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """Runs a command as `subprocess.run` does, at most until the time `until`, and then ends it with its children. The
    output file of a command that failed is removed, since Inductor would load it."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=max(0.0, until - monotonic()))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            if process.wait() and "-o" in command:
                Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def compile_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that mean, before compiled code has begun to run, that a function could not be compiled: those
    of torch.compile, which wrap an error of Inductor or Triton, and those of a compiler, a library or a folder."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit, subprocess.SubprocessError, OSError, ImportError


def innermost(error: BaseException) -> BaseException:
    """Returns the error that torch.compile has wrapped, or the error itself."""
    while (wrapped := getattr(error, "inner_exception", None)) is not None:
        error = wrapped
    return error


def summary(error: BaseException) -> str:
    """Returns what an error of compiling says in one line: of a compiler's output, its first error."""
    error = innermost(error)
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} had not ended after {TIME_LIMIT:g} seconds"
    if isinstance(error.__cause__, subprocess.CalledProcessError):
        command = error.__cause__
        lines = (command.output or b"").decode(errors="replace").splitlines()
        fault = next((line[line.lower().index("error") :] for line in lines if "error" in line.lower()), "")
        return " ".join(f"{command.cmd[0]} ended with code {command.returncode} {fault}".split())[:200]
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
