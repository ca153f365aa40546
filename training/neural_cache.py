"""A cache of recent hidden states that makes words likely again which followed similar states (Grave et al. 2017).

Shapes: T time steps, B batch, H hidden, C pairs in the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mix(NamedTuple):
    """How a cache is mixed with a model: how sharply it prefers similar states, and its share."""

    theta: float  # the factor of the products of two states (eq. 3)
    share: float  # the probability with which the cache, not the model, gives the next word (lambda of eq. 4)


class NeuralCache:
    """Holds the last `size` pairs of a hidden state and the word that followed it, for each batch element.

    The cache alone gives the word w the probability sum_i [w_i = w] exp(theta h·h_i) / sum_i exp(theta h·h_i) over its
    pairs (h_i, w_i), for the present state h (eq. 2 and 3). `mixes` are several ways to mix that with a model at once.
    """

    def __init__(self, size: int, mixes: Sequence[Mix]):
        self.size, self.mixes = size, mixes
        self.states: Tensor | None = None  # (C, B, H), from the oldest to the newest
        self.words: Tensor | None = None  # (C, B)

    @torch.no_grad()
    def log_probs(self, own: Tensor, hiddens: Tensor, y: Tensor) -> Tensor:
        """Returns the log-probabilities of the words y (T, B) by each mix, (len(mixes), T, B), and adds the pairs of
        this segment to the cache. `own` (T, B) has the log-probabilities by the model, and `hiddens` (T, B, H) the
        states that they are computed from. Each word is predicted from the pairs before it, those of this segment
        included; where there are none, the model alone predicts it."""
        T, C = len(y), 0 if self.words is None else len(self.words)
        states = hiddens if self.states is None else torch.cat([self.states, hiddens])  # (C + T, B, H)
        words = y if self.words is None else torch.cat([self.words, y])  # (C + T, B)
        products = hiddens.transpose(0, 1) @ states.permute(1, 2, 0)  # (B, T, C + T)
        age = torch.arange(C, C + T, device=y.device)[:, None] - torch.arange(C + T, device=y.device)  # (T, C + T)
        absent = (age <= 0) | (age > self.size)
        hits = words.t()[:, None] == y.t()[:, :, None]  # (B, T, C + T)
        empty = torch.arange(C, C + T, device=y.device)[:, None] == 0  # (T, 1)
        by_theta = {}
        for theta in {mix.theta for mix in self.mixes}:
            scores = (theta * products).masked_fill(absent, -torch.inf)
            log_total = scores.logsumexp(-1)  # (B, T); -inf where there are no pairs
            log_cache = scores.masked_fill(~hits, -torch.inf).logsumexp(-1) - log_total
            by_theta[theta] = log_cache.t()  # (T, B); nan where there are no pairs
        self.states, self.words = states[-self.size :], words[-self.size :]
        mixed = []
        for theta, share in self.mixes:
            share = torch.tensor(share, dtype=own.dtype, device=own.device)
            mixed.append(torch.logaddexp(torch.log1p(-share) + own, share.log() + by_theta[theta]))
        return torch.where(empty, own, torch.stack(mixed))
