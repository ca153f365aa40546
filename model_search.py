"""Defines the language model of the search, whose edges carry every primitive, weighted by the softmax of the alphas.

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives.
"""

import torch
from torch import Tensor, nn

from engine import Engine
from engine.dropout import DropoutRates, Masks
from genotypes import PRIMITIVES, STEPS, Genotype
from model import RNNModel, cell_weights, default_init_range


class DARTSCellSearch(nn.Module):
    """Implements the continuous relaxation of the cell (DARTS, section 2.2), with its architecture parameters."""

    def __init__(self, nhid: int, norm: str, init_range: float, steps: int):
        super().__init__()
        self.norm = norm  # the normalisation of the states, one of `reference.NORMS`
        self.W0, self.Ws = cell_weights(nhid, steps, init_range)
        self.alphas = nn.Parameter(1e-3 * torch.randn(steps * (steps + 1) // 2, len(PRIMITIVES)))

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """Returns the hidden states (T, B, H) and the last of them (B, H), for x (T, B, E) and state (B, H)."""
        probs = self.alphas.softmax(dim=-1)  # (N(N+1)/2, K)
        # Relu's active set is frozen for the central difference alone, which is computed in full precision: only a pass
        # in full precision may record or use the set.
        relu = masks.relu if engine.precision == "fp32" else None
        hiddens = engine.relaxed(x, state, self.W0, self.Ws, probs, masks.x, masks.hidden, relu, self.norm)
        return hiddens, hiddens[-1]


class RNNModelSearch(RNNModel):
    """Implements a language model with two sets of parameters: `weights()` and `alphas` (N(N+1)/2, K)."""

    def __init__(
        self, ntoken: int, nhid: int, rates: DropoutRates, steps: int = STEPS, norm: str = "none",
        init_range: float | None = None,
    ):  # fmt: skip
        init_range = default_init_range(nhid) if init_range is None else init_range
        super().__init__(ntoken, nhid, rates, DARTSCellSearch(nhid, norm, init_range, steps), init_range)

    @property
    def alphas(self) -> nn.Parameter:
        return self.cell.alphas

    def weights(self) -> list[nn.Parameter]:
        """Returns every parameter except the alphas."""
        return [parameter for parameter in self.parameters() if parameter is not self.alphas]


def derive(probs: Tensor) -> Genotype:
    """Returns the most likely discrete cell (DARTS, section 2.4). Each node gets the predecessor whose strongest
    primitive other than `none` has the largest probability, and that primitive. The output is the mean of all nodes.
    probs (N(N+1)/2, K) has one row for each edge, and the edges of node i = 1..N come from its predecessors 0..i-1."""
    strength, primitive = probs[:, 1:].max(dim=-1)  # (N(N+1)/2,)
    recurrent, start = [], 0
    while start < len(probs):
        stop = start + len(recurrent) + 1
        j = int(strength[start:stop].argmax())
        recurrent.append((PRIMITIVES[1 + int(primitive[start + j])], j))
        start = stop
    return Genotype(tuple(recurrent), tuple(range(1, len(recurrent) + 1)))
