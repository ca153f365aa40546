"""Computes the gradients of a search step on one or more ranks, for test_distributed.py, which also calls torchrun.

python tests/gradients.py FILE MICRO_BATCH_SIZE
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from architect import Architect, WeightUpdate
from engine import Engine
from engine.dropout import DropoutRates, FrozenReLU, Masks
from engine.reference import NORMS
from experiment.distributed import Distributed, exit_process
from model_search import RNNModelSearch
from training.losses import Batch, MicroBatches, clipped_gradient

V, H, B, T, N = 50, 12, 8, 4, 3


def batch(ranks, seed, relu=None):
    """Returns this rank's shard of a random batch with a nonzero state and without dropout."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (T + 1, B), generator=generator)
    hidden = 0.1 * torch.randn(B, H, generator=generator, dtype=torch.float64)
    x, y = ranks.shard(text[:-1], dim=1), ranks.shard(text[1:], dim=1)
    return Batch(x, y, ranks.shard(hidden), Masks(relu=relu))


def gradients(ranks, micro_batch_size, norm):
    """Returns by name the gradients of the alphas (first-order, unrolled) and of the weights, the loss and the norm."""
    result = {}
    for name in ("eager", "fused"):
        torch.manual_seed(5)
        model = RNNModelSearch(V, H, DropoutRates(), steps=N, norm=norm, init_range=0.32).double()
        model = model.with_engine(Engine(name))
        with torch.no_grad():
            model.alphas.normal_()
        weights, micro = model.weights(), {"micro_batch_size": micro_batch_size}
        valid_loss = partial(MicroBatches, model, **micro)
        train_loss = partial(MicroBatches, model, **micro, alpha=0.5, beta=0.5)
        for hessian in (None, "finite", "exact"):
            architect = Architect(
                weights, model.alphas, train_loss, valid_loss, update=WeightUpdate(0.25, weight_decay=1e-3),
                hessian=hessian, average=ranks.all_reduce_mean,
            )  # fmt: skip
            train, valid = batch(ranks, 1, FrozenReLU()), batch(ranks, 2)
            direct, implicit, hidden = architect.gradient(train, valid, eta=5.0)
            result[f"{name}, alphas, {hessian}"] = direct if implicit is None else direct - implicit
            result[f"{name}, hidden, {hessian}"] = ranks.all_gather(hidden)
        nll, hidden, size = clipped_gradient(
            train_loss(batch(ranks, 1)), weights, WeightUpdate(0.25), ranks.all_reduce_mean
        )
        result |= {f"{name}, nll": nll, f"{name}, norm": size, f"{name}, hidden": ranks.all_gather(hidden)}
        result |= {f"{name}, weight {i}": weight.grad for i, weight in enumerate(weights)}
    return result


if __name__ == "__main__":
    ranks = Distributed()
    result = {norm: gradients(ranks, int(sys.argv[2]), norm) for norm in NORMS}
    if ranks.is_main:
        torch.save(result, sys.argv[1])
    exit_process(0)
