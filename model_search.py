"""The language model that is searched: every edge carries every primitive, weighted by the softmaxed alphas.

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives.
"""

import torch
from torch import Tensor, nn

from engine import Engine
from engine.dropout import DropoutRates, Masks
from genotypes import PRIMITIVES, STEPS, Genotype
from model import RNNModel, cell_weights, default_init_range


class DARTSCellSearch(nn.Module):
    """The continuous relaxation of the cell (DARTS, section 2.2), with its architecture parameters.

    `norm` is that of its states, one of `reference.NORMS`.
    """

    def __init__(self, ninp: int, nhid: int, norm: str, init_range: float, steps: int = STEPS):
        super().__init__()
        self.norm = norm
        self.W0, self.Ws = cell_weights(ninp, nhid, steps, init_range)
        self.alphas = nn.Parameter(1e-3 * torch.randn(steps * (steps + 1) // 2, len(PRIMITIVES)))

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """x (T, B, E), state (B, H) -> hidden states (T, B, H), the last of them (B, H)."""
        probs = self.alphas.softmax(dim=-1)  # (N(N+1)/2, K)
        # An active set is held for a difference, which is taken in full precision: so is the set.
        relu = masks.relu if engine.precision == "fp32" else None
        hiddens = engine.relaxed(x, state, self.W0, self.Ws, probs, masks.x, masks.hidden, relu, self.norm)
        return hiddens, hiddens[-1]


class RNNModelSearch(RNNModel):
    """A language model with two sets of parameters: `weights()` and `alphas` (N(N+1)/2, K)."""

    def __init__(
        self,
        ntoken: int,
        nhid: int,
        rates: DropoutRates,
        steps: int = STEPS,
        norm: str = "none",
        init_range: float | None = None,
    ):
        init_range = default_init_range(nhid) if init_range is None else init_range
        super().__init__(ntoken, nhid, rates, DARTSCellSearch(nhid, nhid, norm, init_range, steps), init_range)

    @property
    def alphas(self) -> nn.Parameter:
        return self.cell.alphas

    def weights(self) -> list[nn.Parameter]:
        """Every parameter but the alphas."""
        return [parameter for parameter in self.parameters() if parameter is not self.alphas]

    def genotype(self) -> Genotype:
        """The discrete cell that the alphas point to (`derive`)."""
        return derive(self.alphas.detach().softmax(dim=-1))


def derive(probs: Tensor) -> Genotype:
    """The most likely cell (DARTS, section 2.4): for each node the predecessor whose strongest primitive other
    than `none` has the largest probability, with that primitive; the output is the mean of all nodes.

    probs (N(N+1)/2, K); the rows of node i = 1..N are its predecessors 0..i-1.
    """
    strength, primitive = probs[:, 1:].max(dim=-1)  # (N(N+1)/2,)
    recurrent, start = [], 0
    while start < len(probs):
        stop = start + len(recurrent) + 1
        j = int(strength[start:stop].argmax())
        recurrent.append((PRIMITIVES[1 + int(primitive[start + j])], j))
        start = stop
    return Genotype(tuple(recurrent), tuple(range(1, len(recurrent) + 1)))
