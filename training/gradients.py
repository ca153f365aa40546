"""Computes the gradient of a batch, part by part, and clips it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from architect import Average, WeightUpdate
from training.losses import Losses


def clipped_gradient(
    parts: Iterable[Losses], weights: list[Tensor], update: WeightUpdate, average: Average | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradient of the sum of the parts to the `.grad` of the weights, and of no other tensor, and clips it.

    Returns the NLL (nats per word) of the whole batch, its last hidden states (B, S), and the norm of the gradient
    before it was clipped. With `average`, NLL and gradient are the mean over all ranks.
    """
    nll, hidden = 0.0, []
    for part in parts:
        part.total.backward(inputs=weights)
        nll = nll + part.nll
        hidden.append(part.hidden)
        del part  # frees its graph before the next one is built
    gradients = [w.grad for w in weights]
    if average is not None:
        average([nll, *gradients])
    norm, _ = update.clip_(gradients)
    return nll, torch.cat(hidden), norm


@contextmanager
def scaled_lr(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[float]:
    """Multiplies the learning rate by `scale` inside, yields the scaled rate, and restores the old one afterwards."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= scale
    try:
        yield optimizer.param_groups[0]["lr"]
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
