"""Milliseconds of one step, engine against engine, and of the matrix products that it is made of.

    python benchmarks/step.py                                   # published sizes; 20 minutes on 2 CPU cores
    python benchmarks/step.py --small                           # B 32, H 64: a laptop's
    python benchmarks/step.py --steps search-exact --no_eager   # an eager one takes minutes and 13 GB on a CPU
    python benchmarks/step.py --norms batch layer none --no_eager   # the relaxed cell's norms in turn
    python benchmarks/step.py --growth                          # how the time grows over T, B, H and N
    python benchmarks/step.py --fresh_memory                    # with malloc as it comes (see utils.keep_memory)
    python benchmarks/step.py --precisions fp32 bf16 --json FILE

Five steps: an alpha step and a weight step of a first-order search, the same unrolled, by the central difference and
(if asked for) by the exact product, a step of retraining, and evaluation without gradients. The engines take turns, so
that what else the machine does falls on all; given is the median over the rounds. `floor_ms` is the time of the step's
own matrix products alone, whose shapes, layout, precision and number are recorded while the step runs, and which are
then run one by one on their own.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from architect import Architect, WeightUpdate
from engine import PRECISIONS, Engine
from engine.cuda_graphs import Graphs
from engine.dropout import DropoutRates, FrozenReLU
from engine.inductor import Compiled
from engine.matmul import matmul_precision, onednn
from engine.reference import NORMS
from genotypes import DARTS
from model import retrain_model
from model_search import RNNModelSearch
from training.evaluation import VALID_BATCH_SIZE
from training.losses import Batch, MicroBatches, clipped_gradient
from utils import atomic_write, choose_device

SEARCH = {"T": 35, "B": 256, "H": 300, "V": 10_000, "N": 8}
TRAIN = {"T": 35, "B": 64, "H": 850, "V": 10_000}
SMALL = {"T": 35, "B": 32, "H": 64, "V": 10_000, "N": 8}
GROWTH = {"T": (9, 18, 35, 70), "B": (32, 64, 128, 256), "H": (75, 150, 300, 600), "N": (2, 4, 8, 12)}
STEPS = ("search-first", "search-unrolled", "search-exact", "train", "evaluate")
UPDATE, BETA = WeightUpdate(clip_norm=0.25, weight_decay=5e-7), 1e-3
RATES = {"search": DropoutRates(0.75, 0.25, 0.75, 0.2, 0.0), "train": DropoutRates(0.75, 0.25, 0.75, 0.2, 0.1)}


class Variant(NamedTuple):
    """What is measured beside others: an engine, and the norm of a relaxed cell."""

    engine: Engine
    norm: str


def search_step(variant: Variant, sizes: dict, device: torch.device, hessian: str | None) -> Callable[[], None]:
    """An alpha step and a weight step as in train_search.py."""
    T, B, H, V, N = sizes.values()
    model = RNNModelSearch(V, H, RATES["search"], N, variant.norm).to(device).with_engine(variant.engine)
    architect, train_loss, optimizer = search_parts(model, B, 20.0, hessian)
    (x, y), hidden = torch.randint(V, (2, T, B), device=device), model.initial_hidden(B)

    def step() -> None:
        masks = model.sample_masks(B)._replace(relu=FrozenReLU() if hessian == "finite" else None)
        architect.step(Batch(x, y, hidden, masks), Batch(y, x, hidden, model.sample_masks(B)), eta=20.0)
        clipped_gradient(train_loss(Batch(x, y, hidden, model.sample_masks(B))), model.weights(), UPDATE)
        optimizer.step()
        optimizer.zero_grad(set_to_none=device.type == "cpu")

    return step


def search_parts(model: RNNModelSearch, B: int, lr: float, hessian: str | None) -> tuple:
    """The architect, the loss of the weight step and its optimizer, as in train_search.py."""
    weights, precise = model.weights(), model.with_engine(Engine(model.engine.name))
    valid_loss = partial(MicroBatches, model, micro_batch_size=B)
    train_loss, precise_loss = (partial(MicroBatches, m, micro_batch_size=B, beta=BETA) for m in (model, precise))
    architect = Architect(weights, model.alphas, train_loss, valid_loss, precise_loss, update=UPDATE, hessian=hessian)
    return architect, train_loss, torch.optim.SGD(weights, lr=lr, weight_decay=5e-7)


def train_step(engine: Engine, sizes: dict, device: torch.device) -> Callable[[], None]:
    """A step of train.py."""
    T, B, H, V = (sizes[name] for name in "TBHV")
    model = retrain_model(V, H, RATES["train"], DARTS).to(device).with_engine(engine)
    optimizer = torch.optim.SGD(model.weights(), lr=20.0, weight_decay=8e-7)
    loss = partial(MicroBatches, model, micro_batch_size=B, beta=BETA)
    (x, y), hidden = torch.randint(V, (2, T, B), device=device), model.initial_hidden(B)

    def step() -> None:
        clipped_gradient(loss(Batch(x, y, hidden, model.sample_masks(B))), model.weights(), UPDATE)
        optimizer.step()
        optimizer.zero_grad(set_to_none=device.type == "cpu")

    return step


def evaluate_step(engine: Engine, sizes: dict, device: torch.device) -> Callable[[], None]:
    """A segment of evaluation of a retrained cell."""
    T, B, H, V = (sizes[name] for name in "TBHV")
    model = retrain_model(V, H, RATES["train"], DARTS).to(device).with_engine(engine)
    (x, y), hidden = torch.randint(V, (2, T, B), device=device), model.initial_hidden(B)

    @torch.no_grad()
    def step() -> None:
        model.nll(model(x, hidden)[0], y)

    return step


def build(name: str, variant: Variant, sizes: dict, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    engine = variant.engine
    if name.startswith("search"):
        hessian = {"search-first": None, "search-unrolled": "finite", "search-exact": "exact"}[name]
        step = search_step(variant, sizes, device, hessian)
    else:
        step = (train_step if name == "train" else evaluate_step)(engine, sizes, device)
    replayed = engine.with_cuda_graphs(lambda: step() or (), device)

    def once() -> None:
        with matmul_precision(engine.precision):
            replayed()

    once.plain = step  # as it is before a graph is made of it
    return once


class Products(TorchDispatchMode):
    """Counts the matrix products that are run inside."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if matrices := factors(name, args):
            a, b = matrices
            out = (kwargs or {}).get("out", args[0] if name.endswith("_") else None)
            self.count[name, describe(a), describe(b), None if out is None else describe(out)] += 1
        return func(*args, **(kwargs or {}))

    def floor(self, device: torch.device) -> float:
        """Milliseconds of all of them."""
        return sum(n * product_ms(*product, device) for product, n in self.count.items())


def factors(name: str, args: tuple) -> tuple[Tensor, ...]:
    """Returns the two factors of torch's operation `name` if it is a matrix product, and () if it is not."""
    if name.rstrip("_") not in ("mm", "bmm", "addmm", "baddbmm", "_linear_pointwise"):
        return ()
    return args[1:3] if "add" in name else args[:2]


def describe(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def product_ms(name: str, a: tuple, b: tuple, out: tuple | None, device: torch.device) -> float:
    """The median milliseconds of one product, into memory that is there already."""
    a, b = (torch.empty_strided(*shape, dtype=dtype, device=device).fill_(0.01) for *shape, dtype in (a, b))
    if name == "_linear_pointwise":
        b = b.t()  # which takes a weight (out, in)
    columns = b.size(-1)
    target = torch.empty(*a.shape[:-1], columns, dtype=a.dtype, device=device)
    if out is not None:
        *shape, dtype = out
        target = torch.empty_strided(*shape, dtype=dtype, device=device).zero_()
    run = {
        "addmm_": lambda: target.addmm_(a, b),
        "baddbmm_": lambda: target.baddbmm_(a, b),
        "_linear_pointwise": lambda: onednn(a, b),
    }.get(name, lambda: torch.matmul(a, b, out=target))
    [times] = timed([run], device, rounds=5, repeats=2 if device.type == "cpu" else 20)
    return median(times)


def timed(steps: list[Callable[[], None]], device: torch.device, rounds: int, repeats: int = 1) -> list[list[float]]:
    """Milliseconds of each step in each round, the steps in turn."""
    times_by_step = [[] for _ in steps]
    for round_ in range(rounds + 1):
        for step, times in zip(steps, times_by_step, strict=True):
            synchronise(device)
            clock = perf_counter()
            for _ in range(repeats):
                step()
            synchronise(device)
            if round_:  # the first one warms up
                times.append(1e3 * (perf_counter() - clock) / repeats)
    return times_by_step


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(name: str, variant: Variant, sizes: dict, device: torch.device, fresh: bool) -> float:
    """The most memory that a process of its own has in use in two steps, in MB: Python, torch, model and all. On CUDA
    what tensors there take in a step, beside what else this process has there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        step = build(name, variant, sizes, device).plain
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_mb_here, name, variant, sizes, device, fresh).result()


def peak_mb_here(name: str, variant: Variant, sizes: dict, device: torch.device, fresh: bool) -> float:
    step = build(name, variant, sizes, device if fresh else choose_device(str(device)))
    for _ in range(2):
        step()
    status = Path("/proc/self/status")  # getrusage would count what the parent had
    if not status.exists():
        return float("nan")
    [peak] = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(peak) * 1024 / 1e6


def measure(
    name: str, variants: list[Variant], sizes: dict, device: torch.device, rounds: int, fresh: bool
) -> Iterator[dict]:
    """Yields one object for each variant. One that raises an error, such as for lack of memory, is left out, and a line
    on stderr says why."""
    steps, compile_s = {}, []
    for variant in variants:
        clock = perf_counter()
        try:
            step = build(name, variant, sizes, device)
            step()
            synchronise(device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            print(f"{name} {variant.engine.name} {variant.engine.precision}: left out, {reason}", file=sys.stderr)
            continue
        steps[variant] = step
        compile_s.append(perf_counter() - clock)
    all_times = timed(list(steps.values()), device, rounds)
    for (variant, step), times, first in zip(steps.items(), all_times, compile_s, strict=True):
        engine = variant.engine
        with matmul_precision(engine.precision):
            with Products() as products:
                step.plain()
            floor = products.floor(device)
        ms = median(times)
        yield {
            "step": name, "engine": engine.name, "precision": engine.precision,
            "norm": variant.norm if name.startswith("search") else None,
            **{key: sizes.get(key) for key in "TBHVN"}, "ms": ms, "floor_ms": floor,
            "tokens_per_s": 1e3 * sizes["T"] * sizes["B"] / ms, "peak_mb": peak_mb(name, variant, sizes, device, fresh),
            "first_s": first, "fresh_memory": fresh,
            "compiled": engine.name == "fused" and not Compiled.failed,
            "graphs": device.type == "cuda" and engine.name == "fused" and not Graphs.failed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        }  # fmt: skip


def sizes_of(name: str, small: bool) -> dict:
    if small:
        return SMALL
    return {"evaluate": {**TRAIN, "B": VALID_BATCH_SIZE}, "train": TRAIN}.get(name, SEARCH)


def grown() -> Iterator[dict]:
    for letter, values in GROWTH.items():
        for value in values:
            yield {**SEARCH, "B": 64, letter: value}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[s for s in STEPS if s != "search-exact"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=("fp32", "bf16"))
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=("none",), help="of the relaxed cell")
    parser.add_argument("--no_eager", action="store_true", help="leave the eager engine out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--growth", action="store_true", help="first-order search over T, B, H and N, from B 64")
    parser.add_argument("--fresh_memory", action="store_true", help="leave malloc on a CPU as it comes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device) if args.fresh_memory else choose_device(args.device)
    engines = [Engine("fused", precision) for precision in args.precisions]
    engines = engines if args.no_eager else [Engine(), *engines]
    variants = [Variant(engine, norm) for engine in engines for norm in args.norms]
    jobs = [("search-first", sizes) for sizes in grown()] if args.growth else []
    jobs = jobs or [(name, sizes_of(name, args.small)) for name in args.steps]
    lines = []
    print(f"{'step':16}{'engine':>7}{'':>6}{'norm':>6}  {'T':>3}{'B':>5}{'H':>5}{'N':>4}{'ms':>10}{'floor':>10}"
          f"{'ms/floor':>9}{'tokens/s':>10}{'peak MB':>9}{'against first':>15}")  # fmt: skip
    for name, sizes in jobs:
        first = None
        applicable = variants if name.startswith("search") else [v for v in variants if v.norm == args.norms[0]]
        for line in measure(name, applicable, sizes, device, args.rounds, args.fresh_memory):
            lines.append(line)
            first = first or line["ms"]
            print(
                f"{name:16}{line['engine']:>7}{line['precision']:>6}{line['norm'] or '':>6}  {line['T']:>3}"
                f"{line['B']:>5}{line['H']:>5}{line['N'] or '':>4}{line['ms']:10.1f}{line['floor_ms']:10.1f}"
                f"{line['ms'] / line['floor_ms']:9.2f}{line['tokens_per_s']:10.0f}{line['peak_mb']:9.0f}"
                f"{first / line['ms']:14.2f}x",
                flush=True,
            )
            if args.json:
                with atomic_write(args.json) as file:
                    file.write(json.dumps(lines, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
