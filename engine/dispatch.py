"""Selects the code that runs the recurrence and the loss, readable or fast, and its precision."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from engine import fused, linear_cross_entropy, reference
from engine.cuda_graphs import Capture, Graphs, Step
from engine.dropout import drop

ENGINES = ("fused", "eager")
PRECISIONS = ("fp32", "tf32", "bf16")


class Engine(NamedTuple):
    """An implementation of the recurrence and the loss, one of `ENGINES`, with its precision, one of `PRECISIONS`.

    `eager` is the definition, whose recurrence and `nll` autograd differentiates to any order; `fused` is fast. With
    bf16, products of `fused` and what it saves for backward are rounded (but see `fused.ROUND_FROM`), whereas sums,
    normalisation and softmax are not; `eager` disregards it. tf32 is a setting of CUDA's products (see
    `matmul_precision`).
    """

    name: str = "eager"
    precision: str = "fp32"

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Returns the dtype of products, None for that of the weights."""
        return torch.bfloat16 if (self.name, self.precision) == ("fused", "bf16") else None

    def relaxed(self, *args) -> Tensor:
        """Returns the hidden states (T, B, H) of the relaxed cell, for the arguments of `reference.relaxed`."""
        if self.name == "fused":
            return fused.relaxed(*args, compute_dtype=self.compute_dtype)
        return reference.relaxed(*args)

    def discrete(self, *args) -> Tensor:
        """Returns the hidden states (T, B, H) of one genotype's cell, for the arguments of `reference.discrete`."""
        if self.name == "fused":
            return fused.discrete(*args, compute_dtype=self.compute_dtype)
        return reference.discrete(*args)

    def nll(self, hiddens: Tensor, mask: Tensor | None, embedding: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """Returns the mean negative log-likelihood in nats per word of the target words y (T, B), a scalar.

        The logits are (hiddens * mask) @ embedding.T + bias, with hiddens (T, B, H), mask (B, H), embedding (V, H) and
        bias (V,), as in `linear_cross_entropy.nll`.
        """
        if self.name == "fused":
            return linear_cross_entropy.nll(hiddens, mask, embedding, bias, y, self.compute_dtype)
        logits = F.linear(drop(hiddens, mask).flatten(0, 1), embedding, bias)  # (TB, V)
        return F.cross_entropy(logits, y.flatten())

    def with_cuda_graphs(self, step: Step, device: torch.device, beside: Graphs | None = None) -> Graphs:
        """Returns `step` for repeated calls with a few shapes; on CUDA the fast engine replays it from graphs.

        These graphs share a pool of memory with those of the step `beside` it, which must never run at the same time.
        With several ranks there are no graphs: a graph does not contain the communication between ranks, nor may it be
        captured while NCCL's threads query the progress of that communication.
        """
        if beside is not None:
            return Graphs(step, beside.capture)
        alone = not (distributed.is_available() and distributed.is_initialized())
        return Graphs(step, Capture() if self.name == "fused" and device.type == "cuda" and alone else None)
