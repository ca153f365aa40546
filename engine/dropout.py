"""Dropout for a recurrent language model, with masks that are sampled once per batch and then held fixed.

A mask is a tensor of zeros and 1 / (1 - p), sampled for one batch and applied to each of its time steps. The masks of
a batch are an explicit value, `Masks`, so that several passes over the same batch can share them. Otherwise a
difference between two passes would measure the masks and not the weights (see architect.py). Where such a difference is
taken, the active set of relu is held fixed in the same way.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DropoutRates(NamedTuple):
    """The probabilities of dropping an element, each in [0, 1)."""

    dropout: float = 0.0  # output of the cell, before the decoder
    dropouth: float = 0.0  # hidden state, inside the cell's products
    dropoutx: float = 0.0  # input of the cell, inside the cell's product
    dropouti: float = 0.0  # word embeddings, element by element
    dropoute: float = 0.0  # word embeddings, whole word types


class FrozenReLU:
    """A relu that keeps the active set of the first pass in every later pass over the same batch.

    Between two nearby sets of weights a few of the millions of activations cross relu's kink. Each of them makes the
    gradient jump, and a difference of gradients measures those jumps. With a fixed active set, the network is smooth in
    its weights, and at the weights of the first pass it has the same derivatives of every order as with relu. The
    active set of one engine does not fit the other engine, which may pad H.
    """

    def __init__(self):
        self.active: dict[tuple[int, int], Tensor] = {}  # (i, B, H) of bool, by time step and node i
        self.parts: dict[tuple[int, int], FrozenReLU] = {}  # of micro-batches, by `start` and `stop`

    def active_set(self, u: Tensor, place: tuple[int, int]) -> Tensor:
        """Returns where relu is active at `place`, a time step and a node i, bool (i, B, H). The first call for a place
        records where u (i, B, H) is positive, and later calls return that record."""
        if place not in self.active:
            self.active[place] = u.detach() > 0
        return self.active[place]

    def __call__(self, u: Tensor, place: tuple[int, int]) -> Tensor:
        return u * self.active_set(u, place)

    def batch_slice(self, start: int, stop: int) -> "FrozenReLU":
        """Returns the relu of the micro-batch of elements start..stop-1, which has an active set of its own."""
        return self.parts.setdefault((start, stop), FrozenReLU())


class Masks(NamedTuple):
    """The masks, and the relu, that all passes over one batch share; None where nothing is dropped or relu is plain."""

    word: Tensor | None = None  # (V, 1)
    connections: Tensor | None = None  # (G H, H), for torch's own cells, instead of `hidden`
    embedding: Tensor | None = None  # (B, E)
    x: Tensor | None = None  # (B, E)
    hidden: Tensor | None = None  # (B, H)
    output: Tensor | None = None  # (B, H)
    relu: FrozenReLU | None = None

    def batch_slice(self, start: int, stop: int) -> "Masks":
        """Returns the masks of the batch elements start..stop-1, with the whole batch's `word` and `connections`."""
        per_element = (None if mask is None else mask[start:stop] for mask in self[2:-1])
        relu = None if self.relu is None else self.relu.batch_slice(start, stop)
        return Masks(self.word, self.connections, *per_element, relu=relu)


def drop(value: Tensor, mask: Tensor | None) -> Tensor:
    """Returns `value * mask`, or `value` itself if the mask is None."""
    return value if mask is None else value * mask


def sample_mask(length: int, width: int, p: float, like: Tensor) -> Tensor | None:
    """Returns a new mask (length, width), whose elements are 0 with probability p, else 1 / (1 - p); None for p = 0.
    The mask has the dtype and the device of `like`."""
    if p == 0:
        return None
    return torch.empty(length, width, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)


def sample_masks(rates: DropoutRates, batch_size: int, embedding: Tensor, connections: Tensor | None = None) -> Masks:
    """Returns new masks for a batch of `batch_size` elements, an embedding matrix (V, E) and as many hidden units.

    The rate `dropouth` applies to the hidden-to-hidden `connections` (G H, H) if they are given, else to the hidden
    state.
    """
    ntoken, width = embedding.shape
    return Masks(
        word=sample_mask(ntoken, 1, rates.dropoute, embedding),
        embedding=sample_mask(batch_size, width, rates.dropouti, embedding),
        x=sample_mask(batch_size, width, rates.dropoutx, embedding),
        hidden=sample_mask(batch_size, width, rates.dropouth, embedding) if connections is None else None,
        connections=None if connections is None else sample_mask(*connections.shape, rates.dropouth, embedding),
        output=sample_mask(batch_size, width, rates.dropout, embedding),
    )
