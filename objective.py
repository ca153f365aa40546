"""What is minimised and what is reported: the training loss, its gradient over small batches, perplexity.

Shapes: T time steps, B batch, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import get_batch
from dropout import Masks, drop

VALID_ROWS, TEST_ROWS = 10, 1  # the published batch sizes of evaluation


class Batch(NamedTuple):
    """A segment of text, the state to start it from, and the dropout masks to hold over it."""

    x: Tensor  # (T, B) word ids
    y: Tensor  # (T, B) the next words
    hidden: Tensor  # (B, H)
    masks: Masks

    def rows(self, start: int, stop: int) -> "Batch":
        """Batch rows start..stop-1."""
        x, y = self.x[:, start:stop], self.y[:, start:stop]
        return Batch(x, y, self.hidden[start:stop], self.masks.rows(start, stop))


class Losses(NamedTuple):
    """`total` is differentiated, `nll` (nats per word, detached) is reported, `hidden` (B, H) goes on."""

    total: Tensor
    nll: Tensor
    hidden: Tensor


def losses(model, batch: Batch, alpha: float = 0.0, beta: float = 0.0) -> Losses:
    """NLL + activation regularisation + temporal activation regularisation (Merity et al. 2017, section 4.3).

    AR is alpha times the mean square of the dropped outputs; TAR is beta times the mean squared difference of
    successive hidden states, without dropout, 0 for a single time step.
    """
    hiddens = model(batch.x, batch.hidden, batch.masks)  # (T, B, H)
    nll = total = model.nll(hiddens, batch.y, batch.masks)
    if alpha:
        total = total + alpha * drop(hiddens, batch.masks.output).square().mean()
    if beta and len(hiddens) > 1:
        total = total + beta * (hiddens[1:] - hiddens[:-1]).square().mean()
    return Losses(total, nll.detach(), hiddens[-1].detach())


def small_batch_losses(
    model, batch: Batch, small_batch_size: int, alpha: float = 0.0, beta: float = 0.0
) -> Iterator[Losses]:
    """The losses of each `small_batch_size` rows, as shares that sum to the loss of the whole batch.

    Lazy: a small batch is computed when it is asked for, so that one graph is held at a time. Word for word
    the whole batch's loss, as the masks are the whole batch's, but for the batch normalisation of a relaxed
    cell, which sees the small batch.
    """
    batch_size = batch.x.size(1)
    share = small_batch_size / batch_size
    for start in range(0, batch_size, small_batch_size):
        part = losses(model, batch.rows(start, start + small_batch_size), alpha, beta)
        yield Losses(share * part.total, share * part.nll, part.hidden)


def accumulate_gradients(parts: Iterator[Losses], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Add the gradient of every part to the `.grad` of the weights, and of nothing else.

    Returns the NLL (nats per word) and the last hidden states (B, H) of the whole batch.
    """
    nll, hidden = 0.0, []
    for part in parts:
        part.total.backward(inputs=weights)
        nll = nll + part.nll
        hidden.append(part.hidden)
    return nll, torch.cat(hidden)


def weight_step(
    parts: Iterator[Losses], weights: list[Tensor], optimizer: torch.optim.Optimizer, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the optimizer down the gradient of the parts, whose norm is clipped; returns what
    `accumulate_gradients` does, and the norm before it was clipped."""
    nll, hidden = accumulate_gradients(parts, weights)
    norm = clip_grad_norm_(weights, clip)
    optimizer.step()
    optimizer.zero_grad()
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


@torch.no_grad()
def evaluate(model, source: Tensor, bptt: int, name: str = "text") -> float:
    """Mean negative log-likelihood in nats per predicted word of `source` (n, B), without dropout.

    The hidden state is carried from segment to segment. exp of it is the perplexity. `name` is for the bar.
    """
    hidden = model.initial_hidden(source.size(1))
    total, count = torch.zeros((), dtype=torch.float64, device=source.device), 0
    starts = range(0, len(source) - 1, bptt)
    for i in tqdm(starts, desc=f"evaluating on {name}", unit="segment", leave=False, disable=None, dynamic_ncols=True):
        x, y = get_batch(source, i, bptt)  # (T, B)
        hiddens = model(x, hidden)  # (T, B, H)
        total += model.nll(hiddens, y).double() * y.numel()
        count += y.numel()
        hidden = hiddens[-1]
    return total.item() / count
