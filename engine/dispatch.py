"""Which code runs the recurrence and the loss: the readable definition, or the fast one; and in what precision."""

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
    """`eager` is the definition, which autograd differentiates as often as one likes; `fused` is fast.

    In bf16 products and what is saved for backward are rounded, sums, normalisation and softmax are not;
    tf32 is a setting of CUDA's products (`matmul_precision`).
    """

    name: str = "eager"
    precision: str = "fp32"

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of products; None for that of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def relaxed(self, *args) -> Tensor:
        """See `reference.relaxed`."""
        return (
            fused.relaxed(*args, compute_dtype=self.compute_dtype) if self.name == "fused" else reference.relaxed(*args)
        )

    def discrete(self, *args) -> Tensor:
        """See `reference.discrete`."""
        return (
            fused.discrete(*args, compute_dtype=self.compute_dtype)
            if self.name == "fused"
            else reference.discrete(*args)
        )

    def nll(self, hiddens: Tensor, mask: Tensor | None, embedding: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """See `linear_cross_entropy.nll`."""
        if self.name == "fused":
            return linear_cross_entropy.nll(hiddens, mask, embedding, bias, y, self.compute_dtype)
        logits = F.linear(drop(hiddens, mask).flatten(0, 1), embedding, bias)  # (TB, V)
        return F.cross_entropy(logits, y.flatten())

    def with_cuda_graphs(self, step: Step, device: torch.device, beside: Graphs | None = None) -> Graphs:
        """`step`, to be taken again and again in a few shapes; the fast engine replays it on CUDA, by graphs that share
        a pool of memory with those of the step `beside` it, which never runs at the same time.

        Not among several ranks: no graph holds what goes between them, nor may it be captured while NCCL's threads ask
        how far that is.
        """
        if beside is not None:
            return Graphs(step, beside.capture)
        alone = not (distributed.is_available() and distributed.is_initialized())
        return Graphs(step, Capture() if self.name == "fused" and device.type == "cuda" and alone else None)
