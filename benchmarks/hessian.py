"""How well the finite difference of the unrolled step agrees with the exact product, on a model that has learned.

    python train_search.py --data penn --unrolled --emsize 100 --batch_size 64 --lr 5 --dropout 0.3 --dropoutx 0.3 \\
        --dropouth 0.1 --dropouti 0.1 --epochs 1 --save runs/mine
    python benchmarks/hessian.py runs/mine                     # 5 minutes on a CPU core

For a number of batches forms the implicit part of the alphas' gradient exactly and by a central difference at
several radii, all on one set of dropout masks, at the flags of the run. Prints for each radius the median and
the lowest cosine to the exact one, and the seconds that the whole gradient takes with either.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import start
from architect import RADIUS, Architect
from data import Cursor, batchify, load_corpus
from dropout import HeldRelu, Rates
from engine import Engine
from model_search import RNNModelSearch
from objective import Batch, small_batch_losses
from train_search import search_texts

RADII = [RADIUS / 3, RADIUS, 3 * RADIUS, 10 * RADIUS]


class Agreement:
    """The end of a search run, with what its next alpha step would need."""

    def __init__(self, folder: Path):
        saved = checkpoint.load(folder / "last.pt")
        if saved["kind"] != "search":
            raise checkpoint.CheckpointError(f"{folder}: not a search run")
        self.flags = flags = argparse.Namespace(**saved["flags"])
        rates = Rates(*(getattr(flags, name) for name in Rates._fields))
        model = RNNModelSearch(len(saved["words"]), flags.emsize, rates)
        model.load_state_dict(saved["model"])
        self.model = model.using(Engine(flags.engine, flags.precision))
        corpus = load_corpus(flags.data)
        texts = search_texts(corpus, flags.search_split, flags.limit_tokens)
        self.cursors = [Cursor(batchify(ids, flags.batch_size)) for ids in texts]
        self.hiddens = [self.model.initial_hidden(flags.batch_size)] * 2  # (B, H) each
        parts = {"small_batch_size": flags.small_batch_size}
        regularised = {**parts, "alpha": flags.alpha, "beta": flags.beta}
        self.architect = Architect(
            model.weights(), model.alphas,
            partial(small_batch_losses, self.model, **regularised), partial(small_batch_losses, self.model, **parts),
            clip=flags.clip, clip_value=flags.clip_value, wdecay=flags.wdecay,
        )  # fmt: skip
        self.product_loss = {  # as in train_search.py
            hessian: partial(small_batch_losses, model.using(engine), **regularised)
            for hessian, engine in (("finite", Engine(flags.engine)), ("exact", Engine("eager")))
        }

    def batches(self) -> list[Batch]:
        """The next batch of train and of valid, with fresh masks; the hidden states go on."""
        taken = []
        for n, cursor in enumerate(self.cursors):
            x, y, _ = cursor.take(self.flags.bptt)
            masks = self.model.draw_masks(self.flags.batch_size)
            taken.append(Batch(x, y, self.hiddens[n], masks._replace(relu=HeldRelu() if n == 0 else None)))
            with torch.no_grad():
                _, self.hiddens[n] = self.model(x, self.hiddens[n], masks)
        return taken

    def implicit(self, batches: list[Batch], hessian: str, radius: float = RADIUS) -> tuple[torch.Tensor, float]:
        """The implicit part of the gradient, flat, and the seconds that the whole gradient took."""
        self.architect.hessian, self.architect.radius = hessian, radius
        self.architect.product_loss = self.product_loss[hessian]
        clock = time.perf_counter()
        _, implicit, _ = self.architect.gradient(*batches, self.flags.lr)
        return implicit.flatten(), time.perf_counter() - clock

    def cosines(self, count: int, radii: list[float]) -> tuple[dict[float, list[float]], dict[str, list[float]]]:
        """By radius the cosines to the exact product over `count` batches; by kind the seconds."""
        found = {radius: [] for radius in radii}
        seconds = {"exact": [], "finite": []}
        for _ in range(count):
            batches = self.batches()
            exact, taken = self.implicit(batches, "exact")
            seconds["exact"].append(taken)
            for radius in radii:
                finite, taken = self.implicit(batches, "finite", radius)
                seconds["finite"].append(taken)
                found[radius].append(torch.cosine_similarity(exact, finite, dim=0).item())
        return found, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a search run")
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    args = parser.parse_args()
    torch.manual_seed(0)
    agreement = Agreement(args.run)
    cosines, seconds = agreement.cosines(args.batches, args.radii)
    flags = agreement.flags
    print(f"{flags.data}, E = H = {flags.emsize}, B {flags.batch_size}, T {flags.bptt}, lr {flags.lr:g}")
    print(f"{'radius':>8}{'median cosine':>16}{'lowest':>10}   over {args.batches} batches")
    for radius, values in cosines.items():
        print(f"{radius:>8g}{median(values):>16.5f}{min(values):>10.5f}")
    exact, finite = (median(seconds[kind]) for kind in ("exact", "finite"))
    print(f"alpha gradient: exact {exact:.2f} s, finite {finite:.2f} s, ratio {exact / finite:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(start.run_script(main))
