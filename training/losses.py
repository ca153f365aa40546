"""Computes the training loss of a batch and of its micro-batches, and the gradient that moves the weights.

Shapes: T time steps, B batch, H hidden, S state.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from architect import Average, WeightUpdate
from engine.dropout import Masks, drop


class Batch(NamedTuple):
    """Holds a segment of text, the state from which it starts, and the dropout masks of all its time steps."""

    x: Tensor  # (T, B), word ids
    y: Tensor  # (T, B), the next words
    hidden: Tensor  # (B, S)
    masks: Masks
    second_masks: Masks | None = None  # those of the second pass, for losses that compare two

    def batch_slice(self, start: int, stop: int) -> "Batch":
        """Returns the part of the batch with the batch elements start..stop-1."""
        x, y = self.x[:, start:stop], self.y[:, start:stop]
        second_masks = None if self.second_masks is None else self.second_masks.batch_slice(start, stop)
        return Batch(x, y, self.hidden[start:stop], self.masks.batch_slice(start, stop), second_masks)


class Losses(NamedTuple):
    """Holds the loss of a batch or of a part of it, and the state from which the next segment starts."""

    total: Tensor  # the scalar that is differentiated
    nll: Tensor  # a scalar in nats per word, detached, which is reported
    hidden: Tensor  # (B, S)


def losses(
    model, batch: Batch, alpha: float = 0.0, beta: float = 0.0, rdrop: float = 0.0, fraternal: float = 0.0
) -> Losses:
    """Returns the `Losses` of a batch: the NLL plus AR and TAR (Merity et al. 2017, section 4.6).

    AR, activation regularisation, is `alpha` times the mean square of the outputs after dropout. TAR, temporal
    activation regularisation, is `beta` times the mean squared difference of successive hidden states, without dropout,
    and is 0 for a single time step.

    A batch with second masks, which `rdrop` and `fraternal` need, passes through the model twice, once with each set.
    Each term is then the mean over both passes, and the penalties of their difference are added that docs/strategies.md
    defines (R-Drop, Liang et al. 2021; fraternal dropout, Zolna et al. 2018). The state is that of the first pass.
    """
    masks = [batch.masks] if batch.second_masks is None else [batch.masks, batch.second_masks]
    passes = len(masks)
    hiddens, states = zip(*(model(batch.x, batch.hidden, mask) for mask in masks), strict=True)  # (T, B, H) each
    if rdrop or alpha or fraternal:
        outputs = [drop(h, mask.output) for h, mask in zip(hiddens, masks, strict=True)]  # (T, B, H) each
    if rdrop:
        total, nll = model.word_losses(outputs, batch.y, rdrop)
    else:
        total = nll = sum(model.nll(h, batch.y, mask) for h, mask in zip(hiddens, masks, strict=True)) / passes
    if alpha:
        total = total + alpha * (sum(output.square().mean() for output in outputs) / passes)
    if beta and len(batch.x) > 1:
        total = total + beta * (sum((h[1:] - h[:-1]).square().mean() for h in hiddens) / passes)
    if fraternal:
        total = total + fraternal * (outputs[0] - outputs[1]).square().mean()
    return Losses(total, nll.detach(), states[0].detach())


class MicroBatches:
    """Yields the `losses` of one micro-batch after another, as shares that sum to the loss of the whole batch.

    A micro-batch has `micro_batch_size` elements, the last one what is left. It is computed when it is asked
    for, so that only one graph is in memory at a time. The masks are the whole batch's, so that every word has the same
    loss as in it, except with the batch normalisation of a relaxed cell, which is over the micro-batch.
    """

    def __init__(self, model, batch: Batch, micro_batch_size: int, **coefficients: float):
        self.model, self.batch, self.size, self.coefficients = model, batch, micro_batch_size, coefficients
        self.starts = range(0, batch.x.size(1), micro_batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Losses]:
        return map(self.part, self.starts)

    def part(self, start: int) -> Losses:
        """Returns the share of the micro-batch that begins with batch element `start`."""
        micro_batch = self.batch.batch_slice(start, start + self.size)
        batch_losses = losses(self.model, micro_batch, **self.coefficients)
        share = micro_batch.x.size(1) / self.batch.x.size(1)
        return Losses(share * batch_losses.total, share * batch_losses.nll, batch_losses.hidden)


def clipped_gradient(
    parts: Iterable[Losses], weights: list[Tensor], update: WeightUpdate, average: Average | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the gradient of the sum of the parts to the `.grad` of the weights, and of no other tensor, and clips it.
    Returns the NLL (nats per word) of the whole batch, its last hidden states (B, S), and the norm of the gradient
    before it was clipped. With `average`, NLL and gradient are the mean over all ranks."""
    nll, hidden = 0.0, []
    for part in parts:
        part.total.backward(inputs=weights)
        nll = nll + part.nll
        hidden.append(part.hidden)
        del part  # frees its graph before the next one is built
    for w in weights:
        if w.grad is None:  # of a node that no output depends on, which the eager engine leaves out of the graph
            w.grad = torch.zeros_like(w)
    gradients = [w.grad for w in weights]
    if average is not None:
        average([nll, *gradients])
    norm, _ = update.clip_(gradients)
    return nll, torch.cat(hidden), norm
