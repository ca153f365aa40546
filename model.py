"""The language model that a genotype is retrained in: embedding, one recurrent cell, tied decoder.

Shapes: T time steps, B batch, E embedding, H hidden, V words, N nodes. E = H, since the decoder's weight is
the embedding's.
"""

from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropout import Masks, Rates, draw_masks, drop
from engine import Engine
from genotypes import Genotype

INITRANGE = 0.04
NO_MASKS = Masks()


class DARTSCell(nn.Module):
    """A cell with one operation and one predecessor per node (DARTS, section 3.1.2)."""

    def __init__(self, ninp: int, nhid: int, genotype: Genotype):
        super().__init__()
        self.genotype = genotype
        self.W0, self.Ws = cell_weights(ninp, nhid, len(genotype.recurrent))

    def forward(self, x: Tensor, hidden: Tensor, masks: Masks, engine: Engine) -> Tensor:
        """x (T, B, E), hidden (B, H) -> hidden states (T, B, H)."""
        return engine.discrete(x, hidden, self.W0, self.Ws, *self.genotype, masks.x, masks.hidden)


def cell_weights(ninp: int, nhid: int, nodes: int) -> tuple[nn.Parameter, nn.ParameterList]:
    """W0 (E + H, 2H) and N matrices Ws (H, 2H), uniform in +-INITRANGE."""

    def weight(rows: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(rows, 2 * nhid).uniform_(-INITRANGE, INITRANGE))

    return weight(ninp + nhid), nn.ParameterList(weight(nhid) for _ in range(nodes))


class RNNModel(nn.Module):
    """Word ids to the cell's outputs, and those to log-probabilities of the next word.

    Every mask that a training pass needs comes in from outside (`draw_masks`), so the module has no training
    mode: called without masks it drops nothing.
    """

    def __init__(self, ntoken: int, nhid: int, rates: Rates, cell: nn.Module):
        super().__init__()
        self.ntoken, self.nhid, self.rates = ntoken, nhid, rates
        self.embedding = nn.Parameter(torch.empty(ntoken, nhid).uniform_(-INITRANGE, INITRANGE))  # (V, E)
        self.bias = nn.Parameter(torch.zeros(ntoken))  # (V,)
        self.cell = cell
        self.engine = Engine()

    def using(self, engine: Engine) -> "RNNModel":
        """The same parameters behind another engine."""
        other = copy(self)
        other.engine = engine
        return other

    def forward(self, x: Tensor, hidden: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """x (T, B) word ids, hidden (B, H) -> hidden states (T, B, H).

        The last hidden state, `hiddens[-1]`, is where the next segment starts.
        """
        embedded = F.embedding(x, self.embedding)  # (T, B, E)
        if masks.word is not None:
            embedded = embedded * F.embedding(x, masks.word)  # a dropped word type is dropped wherever it stands
        return self.cell(drop(embedded, masks.embedding), hidden, masks, self.engine)

    def nll(self, hiddens: Tensor, y: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """Mean negative log-likelihood in nats of the words y (T, B) given the hidden states (T, B, H)."""
        return self.engine.nll(hiddens, masks.output, self.embedding, self.bias, y)

    def draw_masks(self, batch_size: int) -> Masks:
        """New dropout masks for a batch, from torch's global generator."""
        return draw_masks(self.rates, batch_size, self.embedding, self.nhid)

    def initial_hidden(self, batch_size: int) -> Tensor:
        """Zeros, (B, H)."""
        return self.embedding.new_zeros(batch_size, self.nhid)

    def weights(self) -> list[nn.Parameter]:
        """What the weight step trains; for a retrained cell that is every parameter."""
        return list(self.parameters())


def retrain_model(ntoken: int, nhid: int, rates: Rates, genotype: Genotype) -> RNNModel:
    """The language model around the cell of a genotype."""
    return RNNModel(ntoken, nhid, rates, DARTSCell(nhid, nhid, genotype))
