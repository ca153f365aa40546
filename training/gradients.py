"""Computes the gradient of a batch, part by part, and clips it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from architect import WeightUpdate
from training.losses import Losses


def accumulate_gradients(parts: Iterable[Losses], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Adds the gradient of every part to the `.grad` of the weights, and of no other tensor.

    Returns the NLL (nats per word) of the whole batch and its last hidden states (B, S).
    """
    nll, hidden = 0.0, []
    for part in parts:
        part.total.backward(inputs=weights)
        nll = nll + part.nll
        hidden.append(part.hidden)
        del part  # frees its graph before the next one is built
    return nll, torch.cat(hidden)


def clipped_gradient(
    parts: Iterable[Losses],
    weights: list[Tensor],
    update: WeightUpdate,
    average: Callable[[list[Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts the clipped gradient of the sum of the parts into the `.grad` of the weights.

    Returns the NLL (nats per word) of the whole batch, its last hidden states (B, S), and the norm of the gradient
    before it was clipped. `average` replaces tensors by their mean over all ranks (experiment/distributed.py).
    """
    nll, hidden = accumulate_gradients(parts, weights)
    if average is not None:
        average([nll, *(w.grad for w in weights)])
    norm, _ = update.clip_([w.grad for w in weights])
    return nll, hidden, norm


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
