"""What the kernels of the fast engine become on an H100, found out on a machine without a GPU.

    python benchmarks/launches.py               # needs torch's build for CUDA, which brings Triton; 5 minutes on a core
    python benchmarks/launches.py --compile     # a minute

Steps of search and retraining are taken on the CPU, of few words and time steps, and what each kernel is called with
is kept. For the largest of its calls Inductor writes the Triton code that it would run on CUDA. Given are the calls in
a step, the launches of one, and how far from the function itself, relative to the largest value of each result,
Triton's interpreter comes with that code; or, with --compile, the bytes of machine code that its launches become.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import step
from engine import Engine, fused, inductor, linear_cross_entropy, matmul

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20,
)  # fmt: skip
BLOCK = 64  # elements of either dimension that the interpreter takes at once
STEPS = ("search-unrolled", "search-exact", "train")
FEW = {"T": 2, "B": 128, "V": 200}
PART = r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str"


class Recorded:
    """Runs a kernel's function uncompiled, in the place of `inductor.Compiled`, and records its largest call."""

    calls: ClassVar[dict[str, list]] = {}  # by name: how many, the function, its flat arguments before and after

    def __init__(self, function: Callable[..., None]):
        self.function = function

    def __call__(self, *args: Any) -> None:
        call = self.calls.setdefault(self.function.__name__, [0, None, (), ()])
        call[0] += 1
        flat = inductor.flattened(args)
        size = sum(arg.numel() for arg in flat if isinstance(arg, Tensor))
        larger = size > sum(arg.numel() for arg in call[2] if isinstance(arg, Tensor))
        if larger:
            call[1:3] = of_flat_arguments(self.function, args), [copied(arg) for arg in flat]
        self.function(*args)
        if larger:
            call[3] = [copied(arg) for arg in flat]


def of_flat_arguments(function: Callable[..., None], args: tuple) -> Callable[..., None]:
    """Returns `function` as a function of `inductor.flattened(args)`, which has no tuples."""

    def call(*flat: Any) -> None:
        leaves = iter(flat)
        nested = []
        for arg in args:
            if isinstance(arg, tuple):
                group = [next(leaves) for _ in arg]
                nested.append(type(arg)(*group) if hasattr(arg, "_fields") else tuple(group))
            else:
                nested.append(next(leaves))
        function(*nested)

    return call


def copied(argument: Any) -> Any:
    """A tensor of the same layout with the same values; anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype).copy_(argument)


def pretend() -> None:
    """Let Inductor and Triton take the machine for one with an H100, as long as nothing is run on it."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, graph
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver._active = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    triton_helpers.set_driver_to_gpu = lambda: None
    for place in (CudaInterface, CudaInterface.Worker, torch.cuda):
        place.get_device_properties = staticmethod(lambda device=None: H100)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    CudaInterface.is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    torch.cuda.current_device = lambda: 0
    graph.GraphLowering.compile_to_module = written
    config.force_disable_caches, config.compile_threads = True, 1
    for launcher in ("use_static_cuda_launcher", "use_static_triton_launcher"):  # which keep no machine code
        if hasattr(config, launcher):
            setattr(config, launcher, False)


class Written(Exception):
    """The code that Inductor has written, in the place of running it."""


def written(graph: Any) -> None:
    code, _ = graph.codegen()
    raise Written(getattr(code, "value", code))


def code_of(function: Callable[..., None], arguments: list) -> str:
    """The Python and Triton code by which Inductor would call the function on CUDA."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(), config.patch(inductor.ONE_PASS):
        given = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda:0")
            for a in arguments if isinstance(a, Tensor)
        ]  # fmt: skip

        def of_tensors(*tensors: Tensor) -> tuple:
            rest = iter(tensors)
            function(*[next(rest) if isinstance(a, Tensor) else a for a in arguments])
            return ()

        traced = make_fx(torch.func.functionalize(of_tensors), decomposition_table=select_decomp_table())(*given)
        try:
            compile_fx_inner(traced, given)
        except Exception as error:
            cause = error
            while cause is not None and not isinstance(cause, Written):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            return cause.args[0]
    raise AssertionError("Inductor has written no code")


def load(name: str, source: str, path: Path) -> Any:
    """What a piece of Triton code defines, in Inductor's wrapping."""
    path.write_text(source)
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def for_interpreter(source: str) -> str:
    """The same with what Triton's interpreter can do: it has no functions of CUDA's library, takes a maximum that is
    not Triton's own one number at a time, and counts by numbers alone."""
    source = re.sub(r"\b(libdevice|tl_math)\.", "tl.", source).replace("triton_helpers.max2(", "tl.max(")
    sums = re.search(r"r0_numel = (\d+)", source)
    return source.replace("tl.range(0, r0_numel,", f"range(0, {sums[1]},") if sums else source


class Launch:
    """One of the launches in the code that Inductor has written, taken by the interpreter."""

    def __init__(self, kernel: Any):
        self.function = kernel.fn

    def run(self, *args: Any, stream: int) -> None:
        names = self.function.arg_names
        blocks = {name: BLOCK for name in ("XBLOCK", "R0_BLOCK") if name in names}
        programs = -(-args[names.index("xnumel")] // BLOCK)
        self.function[(programs,)](*args, **blocks)


def difference(code: str, kernels_of_it: dict[str, Any], before: list, after: list) -> str:
    """Between what the code makes of the arguments and what the function has made of them, relative to its largest."""
    guards = torch._C._dynamo.guards
    names = {
        "torch": SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "bfloat16", "uint8")},
            cuda=SimpleNamespace(_DeviceGuard=lambda device: nullcontext(), set_device=lambda device: None),
        ),
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "assert_size_stride": guards.assert_size_stride, "reinterpret_tensor": guards._reinterpret_tensor,
        "get_raw_stream": lambda device: 0, **{name: Launch(kernel) for name, kernel in kernels_of_it.items()},
    }  # fmt: skip
    [body] = re.findall(r"^    (def call\(self, args\):\n.*?return \(.*?\))$", code, re.S | re.M)
    exec(body, names)  # Inductor's own
    found = [copied(argument) for argument in before]
    names["call"](None, [argument for argument in found if isinstance(argument, Tensor)])
    relative = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        for a, b in ((a.double(), b.double()) for a, b in zip(found, after, strict=True) if isinstance(a, Tensor))
    ]
    return f"{max(relative):.1e}"


def machine_code(kernels_of_it: dict[str, Any]) -> str:
    """The bytes of each launch, of the largest that the block sizes make which Inductor would try."""
    compiled = [
        max(len(kernel._precompile_config(config).kernel.asm["cubin"]) for config in kernel.configs)
        for kernel in kernels_of_it.values()
    ]
    return " + ".join(f"{size:,}" for size in compiled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile for sm_90 instead of interpreting")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0" if args.compile else "1"  # which Triton reads as it is imported
    if torch.version.cuda is None or torch.cuda.is_available():
        print("launches.py: is for torch's build for CUDA on a machine without a GPU", file=sys.stderr)
        return 2
    inductor.Compiled = Recorded
    linear_cross_entropy.worth_skipping, fused.sum_after_loop = (
        (lambda mask, compute_dtype: None),
        (lambda h: True),
    )  # as on CUDA
    fused.padding = linear_cross_entropy.padding = lambda rows, compute_dtype: -rows.size(-1) % matmul.ALIGNMENT
    print(f"{'step':16}{'kernel':>22}{'':>6}{'calls':>7}{'launches':>10}  {'bytes' if args.compile else 'difference'}")
    with TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16"):
            for name in STEPS:
                Recorded.calls.clear()
                sizes = {**step.sizes_of(name, small=False), **FEW}
                variant = step.Variant(Engine("fused", precision), "layer")
                step.build(name, variant, sizes, torch.device("cpu"))()
                pretend()
                for kernel, (count, function, before, after) in Recorded.calls.items():
                    code = code_of(function, before)
                    parts = {}
                    for part, source in re.findall(PART, code, re.S):
                        path = Path(folder) / f"{name}_{precision}_{kernel}_{part}.py"
                        parts[part] = load(part, source if args.compile else for_interpreter(source), path)
                    found = machine_code(parts) if args.compile else difference(code, parts, before, after)
                    launches = code.count(".run(")
                    print(f"{name:16}{kernel:>22}{precision:>6}{count:>7}{launches:>10}  {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
