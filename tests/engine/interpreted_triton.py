"""Compares each kernel of the engine with the Triton code that Inductor writes from it for an H100, on a CPU.

    PYTHONPATH=tests:. TRITON_INTERPRET=1 python tests/engine/interpreted_triton.py layer:bf16 batch:fp32

Each argument is a norm and a precision. A small model takes the passes of an exact unrolled step, and another one those
of retraining, with their kernels uncompiled. For each kind of a kernel's arguments, Inductor also writes the Triton
code, which Triton's interpreter runs on copies of the same arguments. A line of JSON for each kind has the kernel's
name, the number of launches in its code, and the largest error among the results of each dtype (`rounding_errors`).
Triton must be installed; torch need not be built for CUDA.
"""

import json
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from torch import Tensor

from engine import Engine, fused, inductor, linear_cross_entropy, matmul
from genotypes import DARTS
from model import RNNModel, retrain_model
from model_search import RNNModelSearch
from training.losses import Batch, losses

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20,
)  # fmt: skip
T, B, H, V = 2, 19, 5, 23  # of the models
BLOCK = 64  # elements of each dimension that one program of the interpreter computes


class Compared:
    """Runs a kernel's function uncompiled, in place of `inductor.Compiled`, and compares it with its Triton code."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.kinds = function, set()

    def __call__(self, *args: Any) -> None:
        flat = inductor.flattened(args)
        kind = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in flat)
        new = kind not in self.kinds
        copies = [copied(leaf) for leaf in flat] if new else []
        self.function(*args)
        if new:
            self.kinds.add(kind)
            launches = run_as_triton(lambda *leaves: self.function(*nested_like(args, leaves)), copies)
            errors = {"float32": 0.0, "bfloat16": 0.0}
            for actual, expected in zip(copies, flat, strict=True):
                if isinstance(actual, Tensor) and actual.is_floating_point():
                    dtype = str(actual.dtype).removeprefix("torch.")
                    errors[dtype] = max(errors[dtype], rounding_errors(actual, expected))
            print(json.dumps({"kernel": self.function.__name__, "launches": launches, **errors}), flush=True)


def copied(leaf: Any) -> Any:
    """Returns a tensor of the same strides with the same values; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(leaf)


def nested_like(args: tuple, leaves: tuple) -> list:
    """Returns the arguments of a kernel with `leaves` in place of `inductor.flattened(args)`."""
    remaining, nested = iter(leaves), []
    for arg in args:
        if not isinstance(arg, tuple):
            nested.append(next(remaining))
        else:
            group = [next(remaining) for _ in arg]
            nested.append(type(arg)(*group) if hasattr(arg, "_fields") else tuple(group))
    return nested


def rounding_errors(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, as a multiple of the rounding error of 1 in the tensors' dtype, relative to the
    largest value."""
    largest = expected.double().abs().max().clamp(min=1e-30)
    return ((actual.double() - expected.double()).abs().max() / largest).item() / torch.finfo(actual.dtype).eps


def run_as_triton(function: Callable[..., None], leaves: list) -> int:
    """Runs the Triton code of a function that writes into its arguments, and returns the number of its launches."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def of_tensors(*given: Tensor) -> tuple:
        remaining = iter(given)
        function(*[next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        return ()

    def fake(device: str) -> list[Tensor]:
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in tensors]

    with FakeTensorMode(), config.patch(inductor.ONE_PASS):
        # torch without CUDA cannot trace the views of a tensor on CUDA: the graph is traced on the CPU and moved.
        graph = make_fx(torch.func.functionalize(of_tensors), decomposition_table=select_decomp_table())(*fake("cpu"))
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device("cuda:0"))
        Launch.count = 0
        compiled = compile_fx_inner(graph, fake("cuda:0"))
    compiled.current_callable(tensors)
    return Launch.count


class Launch:
    """Runs one Triton kernel of Inductor's code by the interpreter."""

    count = 0

    def __init__(self, name: str, source: str):
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.py"  # Triton reads a function's source from its file.
            path.write_text(interpretable(source))
            spec = spec_from_file_location(name, path)
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            self.function = getattr(module, name).fn

    def run(self, *args: Any, stream: int) -> None:
        Launch.count += 1
        names = self.function.arg_names
        blocks = {name: BLOCK for name in ("XBLOCK", "R0_BLOCK") if name in names}
        self.function[(-(-args[names.index("xnumel")] // BLOCK),)](*args, **blocks)


def interpretable(source: str) -> str:
    """Returns Triton code with what the interpreter can run: it has none of CUDA's library functions, applies a maximum
    that is not Triton's own to one number at a time, and counts loops by Python's numbers."""
    source = re.sub(r"\b(libdevice|tl_math)\.", "tl.", source).replace("triton_helpers.max2(", "tl.max(")
    sums = re.search(r"r0_numel = (\d+)", source)
    return source.replace("tl.range(0, r0_numel,", f"range(0, {sums[1]},") if sums else source


def pretend_to_have_an_h100() -> None:
    """Makes Inductor write code for an H100, and that code run on the CPU's tensors."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import async_compile, config
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver._active = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    triton_helpers.set_driver_to_gpu = lambda: None
    for place in (CudaInterface, CudaInterface.Worker, torch.cuda):
        place.get_device_properties = staticmethod(lambda device=None: H100)
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    CudaInterface.is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda._DeviceGuard = lambda index: nullcontext()
    torch.cuda.set_device = lambda device: None
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu
    async_compile.AsyncCompile.triton = lambda self, name, source, device_str: Launch(name, source)
    config.force_disable_caches, config.compile_threads = True, 1


def compare_search(norm: str, precision: str) -> None:
    """Runs the kernels of an exact unrolled step."""
    model, batch = with_batch(RNNModelSearch(V, H, tiny.RATES, steps=2, norm=norm), precision)
    gradients = torch.autograd.grad(losses(model, batch, 0.3, 0.7).total, list(model.weights()), create_graph=True)
    torch.autograd.grad(gradients, model.alphas, [torch.randn_like(g) for g in gradients])


def compare_retraining(precision: str) -> None:
    """Runs the kernels of a step of a cell that has all four activations."""
    model, batch = with_batch(retrain_model(V, H, tiny.RATES, DARTS, 1), precision)
    losses(model, batch, 0.3, 0.7).total.backward()


def with_batch(model: RNNModel, precision: str) -> tuple[RNNModel, Batch]:
    """Returns a model with random weights in the precision, and a batch for it."""
    torch.manual_seed(0)
    model = tiny.randomize(model).float().with_engine(Engine("fused", precision))
    x, y = torch.randint(V, (2, T, B))
    return model, Batch(x, y, torch.randn(B, H), model.sample_masks(B))


def take_the_paths_of_cuda() -> None:
    """Makes the engine call the kernels as it does on CUDA, where it decides by the device of its tensors."""
    linear_cross_entropy.mask_if_sparse = lambda mask, compute_dtype: None
    fused.sum_after_loop = lambda h: True
    fused.ROUND_FROM = 0
    fused.padding = linear_cross_entropy.padding = lambda rows, compute_dtype: -rows.size(-1) % matmul.ALIGNMENT


if __name__ == "__main__":
    inductor.Compiled = Compared
    take_the_paths_of_cuda()
    pretend_to_have_an_h100()
    pairs = [pair.split(":") for pair in sys.argv[1:]]
    for norm, precision in pairs:
        compare_search(norm, precision)
    for precision in sorted({precision for _, precision in pairs}):
        compare_retraining(precision)
