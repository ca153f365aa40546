"""How well the finite difference of the unrolled step agrees with the exact product, on a model that has learned.

    python benchmarks/hessian.py --data penn --steps 400        # 25 minutes on 2 CPU cores

Trains a small search model by first-order steps, then forms the product d/d alpha (d/dw L_train . v) for a
number of fresh batches, exactly and by a central difference at several radii, each pair on one set of masks.
Prints for each radius the median and the lowest cosine between the two, and the time of each.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parent.parent))

from architect import RADIUS, Architect
from data import Cursor, batchify, load_corpus
from dropout import Rates
from model_search import RNNModelSearch
from objective import Batch, accumulate_gradients, small_batch_losses

CLIP, WDECAY, TAR, BPTT = 0.25, 5e-7, 1e-3, 35


class Searcher:
    """A relaxed model with everything that a step needs, at the search's default dropout."""

    def __init__(self, corpus, emsize: int, batch_size: int, lr: float, seed: int = 0):
        torch.manual_seed(seed)
        self.model = RNNModelSearch(len(corpus.words), emsize, Rates(0.75, 0.25, 0.75, 0.2))
        self.batch_size, self.lr = batch_size, lr
        self.weights = self.model.weights()
        self.valid_loss = partial(small_batch_losses, self.model, small_batch_size=batch_size)
        self.train_loss = partial(self.valid_loss, beta=TAR)
        self.architect = Architect(
            self.weights, self.model.alphas, self.train_loss, self.valid_loss, clip=CLIP, wdecay=WDECAY
        )
        self.optimizer = torch.optim.SGD(self.weights, lr=lr, weight_decay=WDECAY)
        self.cursors = [Cursor(batchify(ids, batch_size)) for ids in (corpus.train, corpus.valid)]
        self.hiddens = [self.model.initial_hidden(batch_size)] * 2  # (B, H) each

    def batches(self) -> list[Batch]:
        """The next batch of train and of valid, with fresh masks."""
        taken = []
        for n, cursor in enumerate(self.cursors):
            x, y, wrapped = cursor.take(BPTT)
            if wrapped:
                self.hiddens[n] = self.model.initial_hidden(self.batch_size)
            taken.append(Batch(x, y, self.hiddens[n], self.model.draw_masks(self.batch_size)))
        return taken

    def train(self, steps: int) -> float:
        """First-order search steps; returns the loss of the last one."""
        self.architect.hessian = None
        for _ in range(steps):
            train, valid = self.batches()
            self.hiddens[1] = self.architect.step(train, valid, self.lr)
            train = train._replace(masks=self.model.draw_masks(self.batch_size))
            nll, self.hiddens[0] = accumulate_gradients(self.train_loss(train), self.weights)
            clip_grad_norm_(self.weights, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return nll.item()

    def implicit(self, train: Batch, valid: Batch, hessian: str, radius: float = RADIUS) -> torch.Tensor:
        self.architect.hessian, self.architect.radius = hessian, radius
        return self.architect.gradient(train, valid, self.lr)[1]

    def cosines(self, count: int, radii: list[float]) -> tuple[dict[float, list[float]], list[float], list[float]]:
        """By radius the cosines to the exact product over `count` batches; seconds of an exact, a finite gradient."""
        found = {radius: [] for radius in radii}
        seconds = [], []
        for _ in range(count):
            train, valid = self.batches()
            clock = time.perf_counter()
            exact = self.implicit(train, valid, "exact").flatten()
            seconds[0].append(time.perf_counter() - clock)
            for radius in radii:
                clock = time.perf_counter()
                finite = self.implicit(train, valid, "finite", radius).flatten()
                seconds[1].append(time.perf_counter() - clock)
                found[radius].append(torch.cosine_similarity(exact, finite, dim=0).item())
        return found, *seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="penn")
    parser.add_argument("--emsize", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--radii", type=float, nargs="+", default=[0.0025, RADIUS, 0.01, 0.02])
    args = parser.parse_args()
    searcher = Searcher(load_corpus(args.data), args.emsize, args.batch_size, args.lr)
    if args.steps:
        print(f"{args.data}, E = H = {args.emsize}, B {args.batch_size}, T {BPTT}, lr {args.lr:g}: "
              f"loss {searcher.train(args.steps):.3f} after {args.steps} steps")  # fmt: skip
    cosines, exact, finite = searcher.cosines(args.batches, args.radii)
    print(f"{'radius':>8}{'median cosine':>16}{'lowest':>10}   over {args.batches} batches")
    for radius, values in cosines.items():
        print(f"{radius:>8g}{median(values):>16.5f}{min(values):>10.5f}")
    print(f"seconds of an alpha gradient: exact {median(exact):.2f}, finite {median(finite):.2f}")


if __name__ == "__main__":
    main()
