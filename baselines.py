"""torch's own LSTM and GRU in the place of a found cell, with the same dropouts around them: what to judge one by.

Shapes: T time steps, B batch, E embedding, H hidden, G gates (4 of an LSTM, 3 of a GRU).
"""

import torch
from torch import Tensor, nn

from dropout import Masks, drop
from engine import Engine


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
