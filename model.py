"""Defines the language model in which a genotype is retrained: an embedding, one recurrent cell and a tied decoder.

Shapes: T time steps, B batch, E embedding, H hidden, S state, V words, N nodes. E = H, since the decoder's weight is
the embedding's.
"""

import math
from collections.abc import Callable, Sequence
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
    """Returns the bound of the uniform initial weights of a model with `nhid` hidden units: the published 0.04 for the
    published 850, and in proportion to 1 / sqrt(nhid), so that products over them have the same size in every model."""
    return 0.04 * math.sqrt(850 / nhid)


class DARTSCell(nn.Module):
    """Implements a cell with one operation and one predecessor per node (DARTS, section 3.1.2)."""

    def __init__(self, nhid: int, genotype: Genotype, init_range: float):
        super().__init__()
        self.genotype = genotype
        self.W0, self.Ws = cell_weights(nhid, len(genotype.recurrent), init_range)

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """Returns the hidden states (T, B, H) and the last of them (B, H), for x (T, B, E) and state (B, H)."""
        hiddens = engine.discrete(x, state, self.W0, self.Ws, *self.genotype, masks.x, masks.hidden)
        return hiddens, hiddens[-1]


def cell_weights(nhid: int, nodes: int, init_range: float) -> tuple[nn.Parameter, nn.ParameterList]:
    """Returns W0 (E + H, 2H) and N matrices Ws (H, 2H), uniform between -init_range and init_range."""

    def weight(inputs: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(inputs, 2 * nhid).uniform_(-init_range, init_range))

    return weight(2 * nhid), nn.ParameterList(weight(nhid) for _ in range(nodes))


class RNNModel(nn.Module):
    """Maps word ids to the cell's outputs, and those to log-probabilities of the next word.

    Every mask of a training pass is an argument (see `sample_masks`), so the module has no training mode: without masks
    it drops nothing. With more than one expert, the decoder is a mixture of `n_experts` softmaxes. `init_range` bounds
    the uniform initial weights of the embedding and of the mixture; the cell initialises its own.
    """

    def __init__(
        self, ntoken: int, nhid: int, rates: DropoutRates, cell: nn.Module, init_range: float, n_experts: int = 1
    ):
        super().__init__()
        self.nhid, self.rates = nhid, rates
        self.embedding = nn.Parameter(torch.empty(ntoken, nhid).uniform_(-init_range, init_range))  # (V, E)
        self.bias = nn.Parameter(torch.zeros(ntoken))  # (V,)
        self.cell = cell
        self.mixture = softmax_losses.Mixture(nhid, n_experts, init_range) if n_experts > 1 else None
        self.engine = Engine()

    def with_engine(self, engine: Engine) -> "RNNModel":
        """Returns a model that shares this model's parameters and computes with another engine."""
        other = copy(self)
        other.engine = engine
        return other

    def forward(self, x: Tensor, state: Tensor, masks: Masks = NO_MASKS) -> tuple[Tensor, Tensor]:
        """Returns the hidden states (T, B, H) and the state (B, S) from which the next segment starts, for word ids x
        (T, B) and the state (B, S) before them. S = H, and the state is the last hidden state, except for an LSTM."""
        embedded = F.embedding(x, self.embedding)  # (T, B, E)
        if masks.word is not None:  # It is indexed by word id: a dropped word type is dropped at every position.
            embedded = embedded * F.embedding(x, masks.word)
        return self.cell(drop(embedded, masks.embedding), state, masks, self.engine)

    def nll(self, hiddens: Tensor, y: Tensor, masks: Masks = NO_MASKS) -> Tensor:
        """Returns the mean negative log-likelihood of the words y (T, B), in nats per word, as a scalar, for the hidden
        states (T, B, H) that `forward` returns, before `masks.output` is applied."""
        if self.mixture is None:
            return self.engine.nll(hiddens, masks.output, self.embedding, self.bias, y)
        return self.word_losses([drop(hiddens, masks.output)], y)[0]

    def word_losses(self, passes: Sequence[Tensor], y: Tensor, rdrop: float = 0.0) -> tuple[Tensor, Tensor]:
        """Returns the loss and the mean negative log-likelihood of the words y (T, B), both in nats per word. `passes`
        are the outputs (T, B, H) of one or two passes after dropout, and `rdrop` is the coefficient of R-Drop, which
        compares two of them (see `softmax_losses.losses`). A second derivative raises RuntimeError."""
        log_probs, weights = self.decoder()
        return softmax_losses.losses(log_probs, weights, passes, y, rdrop)

    def log_probs(self, hiddens: Tensor) -> Tensor:
        """Returns the log-probabilities of the next word (T, B, V), for the hidden states (T, B, H) of `forward`. They
        take V numbers for each token, unlike the losses above."""
        log_probs, weights = self.decoder()
        return log_probs(hiddens.flatten(0, 1), *weights).unflatten(0, hiddens.shape[:2])

    def decoder(self) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """Returns the function of `softmax_losses` that maps outputs (n, H) to log-probabilities (n, V), in the
        precision of the engine, and the weights that it takes."""
        log_probs, weights = softmax_losses.tied, [self.embedding, self.bias]
        if self.mixture is not None:
            log_probs, weights = softmax_losses.mixed, [*weights, *self.mixture.parameters()]
        return partial(log_probs, compute_dtype=self.engine.compute_dtype), weights

    def sample_masks(self, batch_size: int) -> Masks:
        """Returns new dropout masks for a batch of `batch_size` elements, sampled from torch's global generator."""
        return sample_masks(self.rates, batch_size, self.embedding, getattr(self.cell, "connections", None))

    def initial_hidden(self, batch_size: int) -> Tensor:
        """Returns the state (B, S) before the first word of a text, which is zero."""
        return self.embedding.new_zeros(batch_size, getattr(self.cell, "state_size", self.nhid))

    def weights(self) -> list[nn.Parameter]:
        """Returns the parameters that the weight step trains; for a retrained cell these are all parameters."""
        return list(self.parameters())


def retrain_model(
    ntoken: int, nhid: int, rates: DropoutRates, cell: Genotype | str, n_experts: int = 1,
    init_range: float | None = None,
) -> RNNModel:  # fmt: skip
    """Returns an `RNNModel` with the cell of a genotype, or with the baseline "LSTM" or "GRU". `init_range` is
    `default_init_range(nhid)` by default; a baseline's cell keeps torch's own initial weights, whose range depends on
    nhid too."""
    init_range = default_init_range(nhid) if init_range is None else init_range
    built = BaselineCell(nhid, cell) if isinstance(cell, str) else DARTSCell(nhid, cell, init_range)
    return RNNModel(ntoken, nhid, rates, built, init_range, n_experts)


class BaselineCell(nn.Module):
    """Implements an LSTM or a GRU of one layer. torch computes the whole sequence in one call, in which the hidden
    state cannot be dropped. Instead `dropouth` drops elements of the hidden-to-hidden matrix, the same ones at all time
    steps and for all batch elements (Merity et al. 2017, section 2). `dropoutx` drops inputs, as in other cells."""

    def __init__(self, nhid: int, name: str):
        super().__init__()
        self.name, self.rnn = name, {"LSTM": nn.LSTM, "GRU": nn.GRU}[name](nhid, nhid)
        self.state_size = 2 * nhid if name == "LSTM" else nhid  # The state of an LSTM is [h, c].

    @property
    def connections(self) -> Tensor:
        """Returns the hidden-to-hidden matrix (G H, H), where G is 4 for an LSTM and 3 for a GRU."""
        return self.rnn.weight_hh_l0

    def forward(self, x: Tensor, state: Tensor, masks: Masks, engine: Engine) -> tuple[Tensor, Tensor]:
        """Returns the hidden states (T, B, H) and the state (B, S) after them, for x (T, B, E) and state (B, S). The
        engine is not used, and --precision bf16 applies to the decoder alone: torch's kernel runs in fp32 or TF32."""
        rnn = self.rnn
        weights = [rnn.weight_ih_l0, drop(self.connections, masks.connections), rnn.bias_ih_l0, rnn.bias_hh_l0]
        options = (weights, True, 1, 0.0, torch.is_grad_enabled(), False, False)
        parts = tuple(part.contiguous()[None] for part in state.split(rnn.hidden_size, dim=-1))  # (1, B, H) each
        if self.name == "LSTM":
            hiddens, *parts = torch.lstm(drop(x, masks.x), parts, *options)
        else:
            hiddens, *parts = torch.gru(drop(x, masks.x), *parts, *options)
        return hiddens, torch.cat(parts, dim=-1)[0]
