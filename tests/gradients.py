"""Gradients of a search's step, on as many ranks as there are: what test_ranks.py runs by itself and by torchrun.

python tests/gradients.py FILE ROWS_AT_ONCE NORM
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from architect import Architect
from engine import Engine
from engine.dropout import HeldRelu, Masks, Rates
from experiment.distributed import Ranks, leave
from model_search import RNNModelSearch
from training.gradients import clipped_gradient
from training.losses import Batch, SmallBatches

V, H, B, T = 50, 12, 8, 4


def batch(ranks, seed, relu=None):
    """This rank's rows of it, with a state that is not zero and nothing dropped."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (T + 1, B), generator=generator)
    hidden = 0.1 * torch.randn(B, H, generator=generator, dtype=torch.float64)
    x, y = ranks.rows(text[:-1], dim=1), ranks.rows(text[1:], dim=1)
    return Batch(x, y, ranks.rows(hidden), Masks(relu=relu))


def gradients(ranks, rows_at_once, norm):
    """By name: of the alphas in first order and unrolled, of the weights, and the loss and the norm."""
    found = {}
    for name in ("eager", "fused"):
        torch.manual_seed(5)
        model = RNNModelSearch(V, H, Rates(), norm=norm, init_range=0.32).double().using(Engine(name))
        with torch.no_grad():
            model.alphas.normal_()
        weights, rows = model.weights(), {"small_batch_size": rows_at_once}
        valid_loss = partial(SmallBatches, model, **rows)
        train_loss = partial(SmallBatches, model, **rows, alpha=0.5, beta=0.5)
        for hessian in (None, "finite", "exact"):
            architect = Architect(
                weights, model.alphas, train_loss, valid_loss, clip=0.25, wdecay=1e-3, hessian=hessian,
                average=ranks.average,
            )  # fmt: skip
            train, valid = batch(ranks, 1, HeldRelu()), batch(ranks, 2)
            direct, implicit, hidden = architect.gradient(train, valid, eta=5.0)
            found[f"{name}, alphas, {hessian}"] = direct if implicit is None else direct - implicit
            found[f"{name}, hidden, {hessian}"] = ranks.all_rows(hidden)
        nll, hidden, size = clipped_gradient(train_loss(batch(ranks, 1)), weights, 0.25, 0.0, ranks.average)
        found |= {f"{name}, nll": nll, f"{name}, norm": size, f"{name}, hidden": ranks.all_rows(hidden)}
        found |= {f"{name}, weight {i}": weight.grad for i, weight in enumerate(weights)}
    return found


if __name__ == "__main__":
    here = Ranks()
    result = gradients(here, int(sys.argv[2]), sys.argv[3])
    if here.first:
        torch.save(result, sys.argv[1])
    leave(0)
