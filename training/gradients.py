"""The gradient of a batch, part by part, clipped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from training.losses import Losses


def accumulate_gradients(parts: Iterable[Losses], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Add the gradient of every part to the `.grad` of the weights, and of nothing else.

    Returns the NLL (nats per word) of the whole batch and the state (B, S) that it ends in.
    """
    nll, hidden = 0.0, []
    for part in parts:
        part.total.backward(inputs=weights)
        nll = nll + part.nll
        hidden.append(part.hidden)
        del part  # and what it remembers, before the next one
    return nll, torch.cat(hidden)


def clipped_gradient(
    parts: Iterable[Losses],
    weights: list[Tensor],
    clip: float,
    clip_value: float = 0.0,
    average: Callable[[list[Tensor]], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the parts in the `.grad` of the weights, ready for a step; returns what `accumulate_gradients`
    does, and its norm before it was clipped.

    First no element is to be larger than `clip_value`, then the norm of all no larger than `clip`; 0 is for no limit.
    `average` puts the mean over all ranks into tensors (see experiment/distributed.py). `Architect` foresees the same.
    """
    nll, hidden = accumulate_gradients(parts, weights)
    if average is not None:
        average([nll, *(w.grad for w in weights)])
    norm = get_total_norm([w.grad for w in weights])
    if clip_value:
        clip_grad_value_(weights, clip_value)
    if clip:
        clip_grads_with_norm_(weights, clip, get_total_norm([w.grad for w in weights]) if clip_value else norm)
    return nll, hidden, norm


@contextmanager
def scaled_lr(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[float]:
    """The learning rate times `scale` for the steps inside; gives that rate, and restores the old one."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= scale
    try:
        yield optimizer.param_groups[0]["lr"]
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = lr
