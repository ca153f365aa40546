"""Whether the engines learn alike: loss curves of a search on real text, from one seed, through the same batches.

    python benchmarks/curves.py --data penn                  # 200 first-order steps each; 20 minutes on 2 CPU cores
    python benchmarks/curves.py --data penn --unrolled

Prints the mean loss (nats per word) of every twentieth part for each engine, the largest difference between the
curves of the first two, and each engine's perplexity over the last part. A young search is chaotic, so curves part
whatever the engine; hence also how far the others' loss and gradient are from the first one's at the weights that
the first has at each step.
"""

import argparse
import math
import sys
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from step import BETA, UPDATE, search_parts

from experiment import signals
from data import load_corpus
from engine import Engine
from engine.dropout import DropoutRates, FrozenReLU
from model_search import RNNModelSearch
from training.losses import Batch, clipped_gradient, losses
from utils import Cursor, batchify

ENGINES = {"eager fp32": Engine(), "fused fp32": Engine("fused"), "fused bf16": Engine("fused", "bf16")}
RATES = DropoutRates(dropout=0.3, dropouth=0.1, dropoutx=0.3, dropouti=0.1)
PARTS = 20


def curve(engine: Engine, args: argparse.Namespace, others: tuple[Engine, ...] = ()) -> tuple[list[float], list]:
    """The training loss at each step (nats per word); and for each step and each of the other engines at the same
    weights, how far from it their loss is, and their gradient, relative to its norm."""
    torch.manual_seed(3)
    corpus = load_corpus(args.data)
    train, valid = (Cursor(batchify(ids, args.batch_size)) for ids in (corpus.train, corpus.valid))
    model = RNNModelSearch(len(corpus.words), args.emsize, RATES).with_engine(engine)
    hessian = "finite" if args.unrolled else None
    architect, train_loss, optimizer = search_parts(model, args.batch_size, args.lr, hessian)
    hidden = hidden_valid = model.initial_hidden(args.batch_size)
    nlls, gaps = [], []
    for _ in range(args.steps):
        (x, y, _), (xv, yv, wrapped) = train.take(args.bptt), valid.take(args.bptt)
        hidden_valid = model.initial_hidden(args.batch_size) if wrapped else hidden_valid
        masks_train, masks_valid, masks = (model.sample_masks(args.batch_size) for _ in range(3))
        masks_train = masks_train._replace(relu=FrozenReLU())
        hidden_valid = architect.step(
            Batch(x, y, hidden, masks_train), Batch(xv, yv, hidden_valid, masks_valid), args.lr
        )
        batch = Batch(x, y, hidden, masks)
        if others:
            (loss, gradient), *rest = (loss_and_gradient(model.with_engine(e), batch) for e in (engine, *others))
            gaps.append([(abs(nll - loss), ((g - gradient).norm() / gradient.norm()).item()) for nll, g in rest])
        nll, hidden, _ = clipped_gradient(train_loss(batch), model.weights(), UPDATE)
        optimizer.step()
        optimizer.zero_grad()
        nlls.append(nll.item())
    return nlls, gaps


def loss_and_gradient(model: RNNModelSearch, batch: Batch) -> tuple[float, Tensor]:
    """Nats per word, and the gradient of all weights in a row."""
    batch_losses = losses(model, batch, beta=BETA)
    return batch_losses.nll.item(), torch.cat(
        [g.flatten() for g in torch.autograd.grad(batch_losses.total, model.weights())]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--emsize", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--lr", type=float, default=5.0)
    args = parser.parse_args()
    (first, engine), *others = ENGINES.items()
    curves = {}
    curves[first], gaps = curve(engine, args, tuple(other for _, other in others))
    curves |= {name: curve(other, args)[0] for name, other in others}
    length = max(1, args.steps // PARTS)
    print(f"{'step':>6}" + "".join(f"{name:>14}" for name in curves))
    for at in range(0, args.steps, length):
        means = [sum(part) / len(part) for part in (c[at : at + length] for c in curves.values())]
        print(f"{at + length:>6}" + "".join(f"{mean:14.5f}" for mean in means))
    eager, fused, _ = curves.values()
    print(f"eager and fused differ by at most {max(abs(a - b) for a, b in zip(eager, fused, strict=True)):.2g} nats")
    last = {name: math.exp(sum(c[-length:]) / length) for name, c in curves.items()}
    print("perplexity of the last part: " + ", ".join(f"{name} {ppl:.2f}" for name, ppl in last.items()))
    print(f"at the weights of {first}, over all steps:")
    for (name, _), of_steps in zip(others, zip(*gaps, strict=True), strict=True):
        nats, gradients = zip(*of_steps, strict=True)
        print(f"  {name}: loss at most {max(nats):.2g} nats off, gradient by {median(gradients):.2g} of its norm in "
              f"the median, {max(gradients):.2g} at most")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
