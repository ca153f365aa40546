"""The language model that a genotype is retrained in: embedding, one recurrent cell, tied decoder.

Shapes: T time steps, B batch, E embedding, H hidden, V words, N nodes. E = H, since the decoder's weight is
the embedding's.
"""

import math
from collections.abc import Sequence
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import Engine, softmax_losses
from engine.dropout import DropoutRates, Masks, drop, sample_masks
from genotypes import Genotype

NO_MASKS = Masks()


def default_init_range(nhid: int) -> float:
    """The bound of the uniform initial weights at a width: 0.04, the published one, at the published 850 hidden units,
    and elsewhere such that a product over the width keeps the size that it has there."""
    return 0.04 * math.sqrt(850 / nhid)


class DARTSCell(nn.Module):
    """A cell with one operation and one predecessor per node (DARTS, section 3.1.2)."""

    def __init__(self, ninp: int, nhid: int, genotype: Genotype, init_range: float):
        super().__init__()
        self.genotype = genotype
        self.W0, self.Ws = cell_weights(ninp, nhid, len(genotype.recurrent), init_range)

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """x (T, B, E), state (B, H) -> hidden states (T, B, H), the last of them (B, H)."""
        hiddens = engine.discrete(x, state, self.W0, self.Ws, *self.genotype, masks.x, masks.hidden)
        return hiddens, hiddens[-1]


def cell_weights(ninp: int, nhid: int, nodes: int, init_range: float) -> tuple[nn.Parameter, nn.ParameterList]:
    """W0 (E + H, 2H) and N matrices Ws (H, 2H), uniform between -init_range and init_range."""

    def weight(rows: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(rows, 2 * nhid).uniform_(-init_range, init_range))

    return weight(ninp + nhid), nn.ParameterList(weight(nhid) for _ in range(nodes))


class RNNModel(nn.Module):
    """Word ids to the cell's outputs, and those to log-probabilities of the next word.

    Every mask that a training pass needs comes in from outside (`sample_masks`), so the module has no training
    mode: called without masks it drops nothing. `init_range` bounds the uniform initial weights of the embedding and
    of a mixture; the cell comes with weights of its own.
    """

    def __init__(
        self, ntoken: int, nhid: int, rates: DropoutRates, cell: nn.Module, init_range: float, n_experts: int = 1
    ):
        super().__init__()
        self.ntoken, self.nhid, self.rates = ntoken, nhid, rates
        self.embedding = nn.Parameter(torch.empty(ntoken, nhid).uniform_(-init_range, init_range))  # (V, E)
        self.bias = nn.Parameter(torch.zeros(ntoken))  # (V,)
        self.cell = cell
        self.mixture = softmax_losses.Mixture(nhid, n_experts, init_range) if n_experts > 1 else None
        self.engine = Engine()

    def with_engine(self, engine: Engine) -> "RNNModel":
        """The same parameters behind another engine."""
        other = copy(self)
        other.engine = engine
        return other

    def forward(self, x: Tensor, state: Tensor, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
        """x (T, B) word ids, state (B, S) -> hidden states (T, B, H), the state (B, S) that the next segment starts
        from. S = H, and the state is the last hidden state, but for an LSTM."""
        embedded = F.embedding(x, self.embedding)  # (T, B, E)
        if masks.word is not None:
            embedded = embedded * F.embedding(x, masks.word)  # a dropped word type is dropped wherever it stands
        return self.cell(drop(embedded, masks.embedding), state, masks, self.engine)

    def nll(self, hiddens: Tensor, y: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """Mean negative log-likelihood in nats of the words y (T, B) given the hidden states (T, B, H)."""
        if self.mixture is None:
            return self.engine.nll(hiddens, masks.output, self.embedding, self.bias, y)
        return self.word_losses([drop(hiddens, masks.output)], y)[0]

    def word_losses(self, passes: Sequence[Tensor], y: Tensor, rdrop: float = 0.0) -> tuple[Tensor, Tensor]:
        """See `softmax_losses.losses`; passes are dropped outputs (T, B, H)."""
        log_probs = softmax_losses.tied if self.mixture is None else softmax_losses.mixed
        weights = [self.embedding, self.bias, *([] if self.mixture is None else self.mixture.parameters())]
        return softmax_losses.losses(
            partial(log_probs, compute_dtype=self.engine.compute_dtype), weights, passes, y, rdrop
        )

    def sample_masks(self, batch_size: int) -> Masks:
        """New dropout masks for a batch, from torch's global generator."""
        return sample_masks(self.rates, batch_size, self.embedding, self.nhid, getattr(self.cell, "connections", None))

    def initial_hidden(self, batch_size: int) -> Tensor:
        """The state before a text's first word: zeros, (B, S)."""
        return self.embedding.new_zeros(batch_size, getattr(self.cell, "state_size", self.nhid))

    def weights(self) -> list[nn.Parameter]:
        """What the weight step trains; for a retrained cell that is every parameter."""
        return list(self.parameters())


def retrain_model(
    ntoken: int,
    nhid: int,
    rates: DropoutRates,
    cell: Genotype | str,
    n_experts: int = 1,
    init_range: float | None = None,
) -> RNNModel:
    """The language model around the cell of a genotype, or a baseline of that name, with so many softmaxes.

    `init_range` is by default that of the width (`default_init_range`); a baseline's cell keeps torch's own initial
    weights, which follow the width too.
    """
    init_range = default_init_range(nhid) if init_range is None else init_range
    built = BaselineCell(nhid, nhid, cell) if isinstance(cell, str) else DARTSCell(nhid, nhid, cell, init_range)
    return RNNModel(ntoken, nhid, rates, built, init_range, n_experts)


class BaselineCell(nn.Module):
    """An LSTM or a GRU of one layer.

    torch computes the whole sequence in one call, in which the hidden state cannot be dropped: `dropouth` drops
    connections instead, elements of the hidden-to-hidden matrix, which are then missing over the whole sequence and in
    every row (Merity et al. 2017, section 2). `dropoutx` drops inputs as it does for other cells.
    """

    def __init__(self, ninp: int, nhid: int, name: str):
        super().__init__()
        self.name, self.rnn = name, {"LSTM": nn.LSTM, "GRU": nn.GRU}[name](ninp, nhid)
        self.state_size = 2 * nhid if name == "LSTM" else nhid  # an LSTM's is [h, c]

    @property
    def connections(self) -> Tensor:
        """The hidden-to-hidden matrix (G H, H)."""
        return self.rnn.weight_hh_l0

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """x (T, B, E), state (B, S) -> hidden states (T, B, H), the state (B, S) after them.

        The engine is not asked, and --precision bf16 is for the decoder alone: torch's kernel runs in fp32, or TF32.
        """
        rnn = self.rnn
        weights = [rnn.weight_ih_l0, drop(self.connections, masks.connections), rnn.bias_ih_l0, rnn.bias_hh_l0]
        how = (weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
        parts = tuple(part.contiguous()[None] for part in state.split(rnn.hidden_size, dim=-1))  # (1, B, H) each
        if self.name == "LSTM":
            hiddens, *parts = torch.lstm(drop(x, masks.x), parts, *how)
        else:
            hiddens, *parts = torch.gru(drop(x, masks.x), *parts, *how)
        return hiddens, torch.cat(parts, dim=-1)[0]
