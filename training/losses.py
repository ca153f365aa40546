"""What is minimised: the training loss of a batch, and of its parts.

Shapes: T time steps, B batch, H hidden.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from engine.dropout import Masks, drop


class Batch(NamedTuple):
    """A segment of text, the state to start it from, and the dropout masks to hold over it; other masks too for
    losses that compare two passes."""

    x: Tensor  # (T, B) word ids
    y: Tensor  # (T, B) the next words
    hidden: Tensor  # (B, S)
    masks: Masks
    second_masks: Masks | None = None

    def rows(self, start: int, stop: int) -> "Batch":
        """Batch rows start..stop-1."""
        x, y = self.x[:, start:stop], self.y[:, start:stop]
        second_masks = None if self.second_masks is None else self.second_masks.rows(start, stop)
        return Batch(x, y, self.hidden[start:stop], self.masks.rows(start, stop), second_masks)


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

    A batch with second masks passes twice, with either set. Each term is then the mean over both passes, and what their
    difference costs is added: `rdrop` times the mean divergence of their predictions (R-Drop, Liang et al. 2021; see
    `softmax_losses.losses`), `fraternal` times the mean squared difference of their dropped outputs (Zolna et al. 2018,
    with the outputs in the place of the logits). The hidden state of the first pass is the one returned.
    """
    masks = [batch.masks] if batch.second_masks is None else [batch.masks, batch.second_masks]
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


class MicroBatches:
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
