"""How well the products of the unrolled step agree with the exact one in fp32, on a model that has learned.

    python train_search.py --data penn --unrolled --emsize 100 --batch_size 64 --lr 5 --dropout 0.3 --dropoutx 0.3 \\
        --dropouth 0.1 --dropouti 0.1 --norm batch --init_range 0.04 --arch_lr 0.003 --arch_start 0 --epochs 3 \\
        --save runs/mine                                       # an hour on a CPU core
    python benchmarks/hessian.py runs/mine                     # 10 minutes on a CPU core

For a number of batches forms the product with the mixed second derivative, along one and the same direction and on
one set of dropout masks: by the definition differentiated twice in fp32; exactly, and by a central difference at
several radii, as the run would with its engine and precision. Prints the median and the lowest cosine of these to the
first, and the seconds that the whole gradient of the alphas takes.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment import checkpoint, metrics, signals
from architect import RADIUS, Architect, Product, WeightUpdate
from data import load_corpus
from engine import PRECISIONS, Engine
from engine.dropout import DropoutRates, FrozenReLU
from experiment.search_arguments import search_texts
from model_search import RNNModelSearch
from training.losses import Batch, MicroBatches
from utils import Cursor, batchify

RADII = [RADIUS / 3, RADIUS, 3 * RADIUS, 10 * RADIUS]


class Observed(Architect):
    """One that keeps the product of its last gradient, and what it is along."""

    def exact_hvp(self, train: Batch) -> tuple[list[Tensor], Product]:
        return self.observed(*super().exact_hvp(train))

    def finite_difference_hvp(self, train: Batch) -> tuple[list[Tensor], Product]:
        return self.observed(*super().finite_difference_hvp(train))

    def observed(self, g: list[Tensor], product: Product) -> tuple[list[Tensor], Product]:
        def keeping(v: list[Tensor]) -> Tensor:
            self.v, self.product = v, product(v)
            return self.product

        return g, keeping


class Agreement:
    """The end of a search run, with what its next alpha step would need."""

    def __init__(self, folder: Path, precision: str | None = None):
        saved = checkpoint.load(folder / "last.pt")
        if saved["kind"] != "search":
            raise checkpoint.CheckpointError(f"{folder}: not a search run")
        # A checkpoint does not have the engine, with which a run may be resumed otherwise than it began.
        engine = metrics.read_json(folder / "config.json")["flags"]["engine"]
        self.flags = flags = argparse.Namespace(**saved["flags"])
        rates = DropoutRates(*(getattr(flags, name) for name in DropoutRates._fields))
        model = RNNModelSearch(len(saved["words"]), flags.emsize, rates, norm=flags.norm)
        model.load_state_dict(saved["model"])
        self.model = model.with_engine(Engine(engine, precision or flags.precision))
        corpus = load_corpus(flags.data)
        texts = search_texts(corpus, flags.search_split, flags.limit_tokens)
        self.cursors = [Cursor(batchify(ids, flags.batch_size)) for ids in texts]
        self.hiddens = [self.model.initial_hidden(flags.batch_size)] * 2  # (B, H) each
        parts = {"micro_batch_size": flags.small_batch_size}
        regularised = {**parts, "alpha": flags.alpha, "beta": flags.beta}

        def architect(engine: Engine, hessian: str) -> Observed:  # as in train_search.py
            chosen, precise = model.with_engine(engine), model.with_engine(Engine(engine.name))
            return Observed(
                model.weights(), model.alphas, partial(MicroBatches, chosen, **regularised),
                partial(MicroBatches, chosen, **parts), partial(MicroBatches, precise, **regularised),
                update=WeightUpdate(flags.clip, flags.clip_value, flags.wdecay), hessian=hessian,
            )  # fmt: skip

        self.definition = architect(Engine("eager"), "exact")
        self.kinds = {kind: architect(self.model.engine, kind) for kind in ("exact", "finite")}

    def batches(self) -> list[Batch]:
        """The next batch of train and of valid, with fresh masks; the hidden states go on."""
        taken = []
        for n, cursor in enumerate(self.cursors):
            x, y, _ = cursor.take(self.flags.bptt)
            masks = self.model.sample_masks(self.flags.batch_size)
            taken.append(Batch(x, y, self.hiddens[n], masks))
            with torch.no_grad():
                _, self.hiddens[n] = self.model(x, self.hiddens[n], masks)
        return taken

    def product(self, batches: list[Batch], kind: str) -> tuple[Tensor, float]:
        """That of one kind, flat, and the seconds that the whole gradient took."""
        train, valid = batches
        if kind == "finite":
            train = train._replace(masks=train.masks._replace(relu=FrozenReLU()))
        clock = time.perf_counter()
        self.kinds[kind].gradient(train, valid, self.flags.lr)
        return self.kinds[kind].product.flatten(), time.perf_counter() - clock

    def cosines(self, count: int, radii: list[float]) -> tuple[dict[float | str, list[float]], dict[str, list[float]]]:
        """Over `count` batches, by kind, or radius of the difference, the cosines to the definition's product; by kind
        the seconds."""
        by_kind, seconds = {which: [] for which in ("exact", *radii)}, {kind: [] for kind in self.kinds}
        for _ in range(count):
            batches = self.batches()
            exact, taken = self.product(batches, "exact")
            seconds["exact"].append(taken)
            _, product = self.definition.exact_hvp(batches[0])
            definition = product(self.kinds["exact"].v).flatten()
            by_kind["exact"].append(cosine(definition, exact))
            for radius in radii:
                self.kinds["finite"].radius = radius
                finite, taken = self.product(batches, "finite")
                seconds["finite"].append(taken)
                by_kind[radius].append(cosine(definition, finite))
        return by_kind, seconds


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a search run")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the run's own")
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    args = parser.parse_args()
    torch.manual_seed(0)
    agreement = Agreement(args.run, args.precision)
    cosines, seconds = agreement.cosines(args.batches, args.radii)
    flags = agreement.flags
    print(f"{flags.data}, E = H = {flags.emsize}, B {flags.batch_size}, T {flags.bptt}, lr {flags.lr:g}, "
          f"{agreement.model.engine.name} {agreement.model.engine.precision}")  # fmt: skip
    print(f"{'product':>14}{'median cosine':>16}{'lowest':>10}   over {args.batches} batches")
    for which, values in cosines.items():
        name = which if which == "exact" else f"finite {which:g}"
        print(f"{name:>14}{median(values):>16.5f}{min(values):>10.5f}")
    exact, finite = (median(seconds[kind]) for kind in ("exact", "finite"))
    print(f"alpha gradient: exact {exact:.2f} s, finite {finite:.2f} s, ratio {exact / finite:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
