"""Dropout for a recurrent language model: masks that are drawn once and then held.

A mask is a tensor of zeros and 1 / (1 - p), drawn for one batch and applied to every time step of it. The
masks of a batch are an explicit value, `Masks`, so that several passes over the same batch can share them:
without that, a difference between two passes measures the masks and not the weights (see architect.py). The
active set of relu is held in the same way where such a difference is taken.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DropoutRates(NamedTuple):
    """Probability of dropping, each in [0, 1)."""

    dropout: float = 0.0  # output of the cell, before the decoder
    dropouth: float = 0.0  # hidden state, inside the cell's products
    dropoutx: float = 0.0  # input of the cell, inside the cell's product
    dropouti: float = 0.0  # word embeddings, element by element
    dropoute: float = 0.0  # word embeddings, whole word types


class FrozenReLU:
    """relu whose active set is that of the first pass, in every later pass over the same batch.

    Between two nearby sets of weights a few of the millions of activations cross relu's kink; each makes the
    gradient jump, and a difference of gradients measures those jumps. With the active set held, the network
    is smooth in its weights, and where the set was taken it has the same derivatives of every order. One engine's set
    is not for another, whose H may be filled up.
    """

    def __init__(self):
        self.active: dict[tuple[int, int], Tensor] = {}  # by time step and node, (i, B, H) of bool
        self.parts: dict[tuple[int, int], FrozenReLU] = {}  # of small batches

    def active_set(self, u: Tensor, place: tuple[int, int]) -> Tensor:
        """Where relu lets through the u (i, B, H) of this place, bool (i, B, H)."""
        if place not in self.active:
            self.active[place] = u.detach() > 0
        return self.active[place]

    def __call__(self, u: Tensor, place: tuple[int, int]) -> Tensor:
        return u * self.active_set(u, place)

    def rows(self, start: int, stop: int) -> "FrozenReLU":
        """The one for batch rows start..stop-1."""
        return self.parts.setdefault((start, stop), FrozenReLU())


class Masks(NamedTuple):
    """What is held over every pass over one batch; None where nothing is dropped, or relu is free."""

    word: Tensor | None = None  # (V, 1)
    connections: Tensor | None = None  # (G H, H), of torch's own cells, in the place of `hidden`
    embedding: Tensor | None = None  # (B, E)
    x: Tensor | None = None  # (B, E)
    hidden: Tensor | None = None  # (B, H)
    output: Tensor | None = None  # (B, H)
    relu: FrozenReLU | None = None

    def rows(self, start: int, stop: int) -> "Masks":
        """The masks of batch rows start..stop-1; the word types and connections dropped are the whole batch's."""
        per_row = (None if mask is None else mask[start:stop] for mask in self[2:-1])
        return Masks(
            self.word, self.connections, *per_row, relu=None if self.relu is None else self.relu.rows(start, stop)
        )


def drop(value: Tensor, mask: Tensor | None) -> Tensor:
    """`value * mask`, or `value` itself where there is no mask."""
    return value if mask is None else value * mask


def sample_mask(rows: int, columns: int, p: float, like: Tensor) -> Tensor | None:
    """(rows, columns) of zeros with probability p and 1 / (1 - p) otherwise; None for p = 0."""
    if p == 0:
        return None
    return torch.empty(rows, columns, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)


def sample_masks(
    rates: DropoutRates, batch_size: int, embedding: Tensor, nhid: int, connections: Tensor | None = None
) -> Masks:
    """Masks of one batch of `batch_size` rows for an embedding matrix (V, E) and `nhid` hidden units; `dropouth` is of
    the hidden-to-hidden connections (G H, H) where they are given, else of the hidden state."""
    ntoken, ninp = embedding.shape
    return Masks(
        word=sample_mask(ntoken, 1, rates.dropoute, embedding),
        embedding=sample_mask(batch_size, ninp, rates.dropouti, embedding),
        x=sample_mask(batch_size, ninp, rates.dropoutx, embedding),
        hidden=sample_mask(batch_size, nhid, rates.dropouth, embedding) if connections is None else None,
        connections=None if connections is None else sample_mask(*connections.shape, rates.dropouth, embedding),
        output=sample_mask(batch_size, nhid, rates.dropout, embedding),
    )
