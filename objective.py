"""What is minimised and what is reported: the training loss, its gradient over small batches, perplexity.

Shapes: T time steps, B batch, H hidden.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from data import get_batch
from dropout import Masks, drop
from kernels import products_in

VALID_ROWS, TEST_ROWS = 10, 1  # the published batch sizes of evaluation


class Batch(NamedTuple):
    """A segment of text, the state to start it from, and the dropout masks to hold over it; other masks too for
    losses that compare two passes."""

    x: Tensor  # (T, B) word ids
    y: Tensor  # (T, B) the next words
    hidden: Tensor  # (B, S)
    masks: Masks
    twin: Masks | None = None

    def rows(self, start: int, stop: int) -> "Batch":
        """Batch rows start..stop-1."""
        x, y = self.x[:, start:stop], self.y[:, start:stop]
        twin = None if self.twin is None else self.twin.rows(start, stop)
        return Batch(x, y, self.hidden[start:stop], self.masks.rows(start, stop), twin)


class Losses(NamedTuple):
    """`total` is differentiated, `nll` (nats per word, detached) is reported, `hidden` (B, S) goes on."""

    total: Tensor
    nll: Tensor
    hidden: Tensor


def losses(
    model, batch: Batch, alpha: float = 0.0, beta: float = 0.0, rdrop: float = 0.0, fraternal: float = 0.0
) -> Losses:
    """NLL + activation regularisation + temporal activation regularisation (Merity et al. 2017, section 4.3).

    AR is alpha times the mean square of the dropped outputs; TAR is beta times the mean squared difference of
    successive hidden states, without dropout, 0 for a single time step.

    A batch with a twin passes twice, with either set of masks. Each term is then the mean over both passes, and what
    their difference costs comes on top: `rdrop` times the mean divergence of their predictions (R-Drop, Liang et al.
    2021; see `softmaxes.losses`), `fraternal` times the mean squared difference of their dropped outputs (Zolna et al.
    2018, with the outputs in the place of the logits). The state of the first pass goes on.
    """
    masks = [batch.masks] if batch.twin is None else [batch.masks, batch.twin]
    hiddens, states = zip(*(model(batch.x, batch.hidden, held) for held in masks), strict=True)  # (T, B, H) each
    if rdrop or alpha or fraternal:
        outputs = [drop(h, held.output) for h, held in zip(hiddens, masks, strict=True)]  # (T, B, H) each
    if rdrop:
        total, nll = model.word_losses(outputs, batch.y, rdrop)
    else:
        total = nll = mean(model.nll(h, batch.y, held) for h, held in zip(hiddens, masks, strict=True))
    if alpha:
        total = total + alpha * mean(output.square().mean() for output in outputs)
    if beta and len(batch.x) > 1:
        total = total + beta * mean((h[1:] - h[:-1]).square().mean() for h in hiddens)
    if fraternal:
        total = total + fraternal * (outputs[0] - outputs[1]).square().mean()
    return Losses(total, nll.detach(), states[0].detach())


def mean(terms: Iterable[Tensor]) -> Tensor:
    """Of one term, that term."""
    first, *others = terms
    return sum(others, first) / (1 + len(others)) if others else first


class SmallBatches:
    """The `losses` of each `small_batch_size` rows, as shares that sum to the loss of the whole batch.

    A small batch is computed when its turn comes, so that one graph is held at a time. Word for word
    the whole batch's loss, as the masks are the whole batch's, but for the batch normalisation of a relaxed
    cell, which sees the small batch.
    """

    def __init__(self, model, batch: Batch, small_batch_size: int, **coefficients: float):
        self.model, self.batch, self.size, self.coefficients = model, batch, small_batch_size, coefficients
        self.starts = range(0, batch.x.size(1), small_batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Losses]:
        return map(self.part, self.starts)

    def part(self, start: int) -> Losses:
        """The share of the rows from `start` on."""
        found = losses(self.model, self.batch.rows(start, start + self.size), **self.coefficients)
        share = self.size / self.batch.x.size(1)
        return Losses(share * found.total, share * found.nll, found.hidden)


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
    `average` puts the mean over all ranks into tensors (see ranks.py). `Architect` foresees the same.
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


@torch.no_grad()
def evaluate(model, source: Tensor, bptt: int, name: str = "text") -> float:
    """Mean negative log-likelihood in nats per predicted word of `source` (n, B), without dropout, in the precision of
    the model's engine.

    The hidden state is carried from segment to segment. exp of it is the perplexity. `name` is for the bar.
    """

    def segment(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hiddens, hidden = model(x, hidden)  # (T, B, H), (B, S)
        return model.nll(hiddens, y), hidden

    hidden = model.initial_hidden(source.size(1))
    quick_segment = model.engine.replayed(segment, source.device)  # anew: the weights may lie elsewhere than last time
    total, count = torch.zeros((), dtype=torch.float64, device=source.device), 0
    starts = range(0, len(source) - 1, bptt)
    segments = tqdm(starts, desc=f"evaluating on {name}", unit="segment", leave=False, disable=None, dynamic_ncols=True)
    with products_in(model.engine.precision):
        for i in segments:
            x, y = get_batch(source, i, bptt)  # (T, B)
            nll, hidden = quick_segment(x, y, hidden)
            total += nll.double() * y.numel()
            count += y.numel()
    return total.item() / count
