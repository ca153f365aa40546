"""Estimates what several searches as one set of batched operations would gain over one after another, on a GPU.

    python benchmarks/batched_searches.py                      # first order and unrolled, published sizes; 20 seconds
    python benchmarks/batched_searches.py --latency_us 3 --tflops 300

No GPU is used. A step of a search runs on the `meta` device, and its operations are counted: the matrix products, the
compiled kernels and torch's own. On a GPU each is one launch of a CUDA graph, and of K searches of one shape that take
their steps together, K products of one launch become one batched product. The estimate of a step is the sum over its
launches of the largest of three times: that of a launch, that of its arithmetic at --tflops, and that of its memory
traffic at --tb_per_s. The defaults are half of what NVIDIA states for an H100 SXM (989 TFLOP/s in bf16, 3.35 TB/s), and
2 microseconds a launch; none of the three has been measured here.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import step
from engine import Engine, fused, inductor

TOGETHER = (1, 2, 4, 8, 16)  # searches


class Launch(NamedTuple):
    """The arithmetic and the memory traffic of one operation."""

    flop: float
    bytes: float


class Launches(TorchDispatchMode):
    """Lists the launches of what runs inside; views of a tensor need none."""

    # All objects share the list, since a kernel keeps the first stand-in that it is given.
    recorded: ClassVar[list[Launch]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "empty_strided", "detach", "_to_copy"):
            tensors = [*of_tensors(args), *of_tensors((kwargs or {}).values()), *of_tensors([out])]
            self.recorded.append(Launch(flop(func.overloadpacket.__name__, args), traffic(tensors)))
        return out

    @classmethod
    def counted(cls, function: Callable[..., None]) -> Callable[..., None]:
        """Returns what takes the place of `inductor.Compiled(function)`: it lists one launch, and computes nothing."""

        def call(*args: Any) -> None:
            cls.recorded.append(Launch(0.0, traffic(of_tensors(inductor.flattened(args)))))

        return call


def of_tensors(args: Any) -> list[Tensor]:
    leaves = [leaf for arg in args for leaf in (arg if isinstance(arg, list | tuple) else (arg,))]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def traffic(tensors: list[Tensor]) -> float:
    """Returns the bytes of the tensors, each once."""
    return float(sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values()))


def flop(name: str, args: tuple) -> float:
    """Returns the floating-point operations of a matrix product; 0 for anything else, which its traffic bounds."""
    factors = step.factors(name, args)
    return 2.0 * factors[0].numel() * factors[1].size(-1) if factors else 0.0


def launches_of(name: str, precision: str, norm: str) -> list[Launch]:
    """Returns the launches of a step on CUDA, at the published sizes."""
    with Launches() as launches:
        inductor.Compiled = Launches.counted
        fused.sum_after_loop = lambda h: True  # as on CUDA
        variant = step.Variant(Engine("fused", precision), norm)
        once = step.build(name, variant, step.sizes_of(name, small=False), torch.device("meta")).plain
        launches.recorded.clear()
        once()
    return list(launches.recorded)


def milliseconds(launches: list[Launch], searches: int, args: argparse.Namespace) -> float:
    """Returns the estimate of a step of so many searches together."""
    return 1e3 * sum(
        max(
            args.latency_us * 1e-6,
            searches * each.flop / args.tflops / 1e12,
            searches * each.bytes / args.tb_per_s / 1e12,
        )
        for each in launches
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=("search-first", "search-unrolled"), choices=step.STEPS)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--norm", default="none", choices=step.NORMS)
    parser.add_argument("--latency_us", type=float, default=2.0, help="microseconds of a launch in a CUDA graph")
    parser.add_argument("--tflops", type=float, default=495.0, help="TFLOP/s of a matrix product")
    parser.add_argument("--tb_per_s", type=float, default=1.7, help="TB/s of memory traffic")
    args = parser.parse_args()
    print(f"{'step':16}{'launches':>9}{'TFLOP':>7}{'GB':>6}   " + "".join(f"{f'K={k}':>14}" for k in TOGETHER))
    for name in args.steps:
        launches = launches_of(name, args.precision, args.norm)
        alone = milliseconds(launches, 1, args)
        times = (milliseconds(launches, k, args) for k in TOGETHER)
        print(
            f"{name:16}{len(launches):>9,}{sum(each.flop for each in launches) / 1e12:7.2f}"
            f"{sum(each.bytes for each in launches) / 1e9:6.1f}   "
            + "".join(f"{f'{ms:.1f} ms {k * alone / ms:.2f}x':>14}" for k, ms in zip(TOGETHER, times, strict=True))
        )
    print("(ms of a step of K searches together; how many times faster than K steps one after another)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
