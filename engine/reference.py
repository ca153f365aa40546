"""The recurrence over a whole sequence: what a cell computes, written as in the paper.

    hiddens = relaxed(x, h0, W0, Ws, probs, x_mask, h_mask)                # search: every edge, every primitive
    hiddens = discrete(x, h0, W0, Ws, recurrent, concat, x_mask, h_mask)   # retraining: one genotype

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.dropout import FrozenReLU, drop

NORM_EPS = 1e-5
NORMS = ("batch", "layer", "none")  # of the relaxed cell's states
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda h: h,
}


def normalise(s: Tensor, norm: str) -> Tensor:
    """The states (..., B, H) with mean 0 and variance 1, without affine part; with norm "none" the states themselves.

    "batch" takes mean and variance of each hidden unit over the batch at hand, in evaluation too (DARTS, appendix
    A.1.1), so that there are no buffers that the passes of an architecture step could disturb. "layer" takes them over
    the hidden units of each row (Ba, Kiros & Hinton 2016), so that no row depends on another.
    """
    if norm == "none":
        return s
    dim = -2 if norm == "batch" else -1
    centred = s - s.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + NORM_EPS)


def cell_inputs(x: Tensor, W0: Tensor, x_mask: Tensor | None) -> Iterator[Tensor]:
    """The input's half of `[c0, h0]` for each time step, (B, 2H), from one product over all of them."""
    return (drop(x, x_mask) @ W0[: x.size(-1)]).unbind(0)


def initial_state(xW: Tensor, h: Tensor, W0_h: Tensor, h_mask: Tensor | None) -> Tensor:
    """s_0 = h + sigmoid(c0) * (tanh(h0) - h), (B, H)."""
    c, u = (xW + drop(h, h_mask) @ W0_h).chunk(2, dim=-1)  # (B, H) each
    return h + torch.sigmoid(c) * (torch.tanh(u) - h)


def relaxed(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    probs: Tensor,
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
    held_relu: FrozenReLU | None = None,
    norm: str = "batch",
) -> Tensor:
    """Hidden states (T, B, H) of the continuous relaxation (DARTS, section 2.2 and 3.1.2).

    x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N times (H, 2H), probs (N(N+1)/2, K) the softmaxed
    architecture parameters, x_mask (B, E), h_mask (B, H). Node i reads rows i(i-1)/2 .. of probs, one for
    each predecessor 0..i-1, and

        s_i = norm( sum_j sum_{k != none} p_k * [s_j + sigmoid(c_j) * (f_k(h_j) - s_j)] ),

    where `norm` is one of `NORMS` (see `normalise`); with "none" the sum over j is a mean, since nothing else would
    keep the size of the states from growing with the number of predecessors. s_0 is normalised too.

    The sum over k is taken first: with P = sum_{k != none} p_k each j contributes
    P s_j + sigmoid(c_j) * (sum_k p_k f_k(h_j) - P s_j).
    """
    W0_h = W0[x.size(-1) :]
    rows = probs.split(list(range(1, len(Ws) + 1)))  # N times (i, K)
    h, hiddens = h0, []
    for t, xW in enumerate(cell_inputs(x, W0, x_mask)):
        states = [normalise(initial_state(xW, h, W0_h, h_mask), norm)]
        for W, p in zip(Ws, rows, strict=True):
            s = torch.stack(states)  # (i, B, H)
            c, u = (drop(s, h_mask) @ W).chunk(2, dim=-1)  # (i, B, H) each
            p = p[:, 1:, None, None]  # (i, K-1, 1, 1)
            relu = torch.relu(u) if held_relu is None else held_relu(u, (t, len(states)))
            activations = (torch.tanh(u), relu, torch.sigmoid(u), u)  # (i, B, H) each, in the order of PRIMITIVES
            mixed = sum(p[:, k] * f for k, f in enumerate(activations))  # (i, B, H)
            kept = p.sum(1) * s  # (i, B, H)
            each = kept + torch.sigmoid(c) * (mixed - kept)  # (i, B, H)
            states.append(normalise(each.mean(0) if norm == "none" else each.sum(0), norm))
        h = sum(states[1:]) / len(Ws)  # (B, H)
        hiddens.append(h)
    return torch.stack(hiddens)


def discrete(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    recurrent: Sequence[tuple[str, int]],
    concat: Sequence[int],
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
) -> Tensor:
    """Hidden states (T, B, H) of the cell of one genotype (DARTS, section 3.1.2).

    Shapes as in `relaxed`. Node i with operation f and predecessor j is
    s_i = s_j + sigmoid(c) * (f(h) - s_j) with [c, h] = (s_j * h_mask) @ Ws[i]; the output is the mean of the
    nodes in `concat`.
    """
    W0_h = W0[x.size(-1) :]
    h, hiddens = h0, []
    for xW in cell_inputs(x, W0, x_mask):
        states = [initial_state(xW, h, W0_h, h_mask)]
        for W, (name, j) in zip(Ws, recurrent, strict=True):
            s = states[j]
            c, u = (drop(s, h_mask) @ W).chunk(2, dim=-1)  # (B, H) each
            states.append(s + torch.sigmoid(c) * (ACTIVATIONS[name](u) - s))
        h = sum(states[i] for i in concat) / len(concat)  # (B, H)
        hiddens.append(h)
    return torch.stack(hiddens)
