"""Defines what a cell computes over a whole sequence, written as in the paper (DARTS).

    hiddens = relaxed(x, h0, W0, Ws, probs, x_mask, h_mask)                # search: every edge, every primitive
    hiddens = discrete(x, h0, W0, Ws, recurrent, concat, x_mask, h_mask)   # retraining: one genotype

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives. The equations (F1) to (F6) are in
docs/engine.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.dropout import FrozenReLU, drop

NORM_EPS = 1e-5
NORMS = ("batch", "layer", "none")  # These are the ways to normalise the states of the relaxed cell.
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda h: h}


def normalise(s: Tensor, norm: str) -> Tensor:
    """Returns the states s (..., B, H) normalised to mean 0 and variance 1 (F5), without an affine part.

    The norm "batch" takes the mean and variance of each hidden unit over the current batch, in evaluation too (DARTS,
    appendix A.1.1), so that there are no buffers that the passes of an architecture step could change. "layer" takes
    them over the hidden units of each batch element (Ba, Kiros & Hinton 2016), so that no batch element depends on
    another. "none" returns s itself.
    """
    if norm == "none":
        return s
    dim = -2 if norm == "batch" else -1
    centred = s - s.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + NORM_EPS)


def cell_inputs(x: Tensor, W0: Tensor, x_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the input's term of the preactivations [c_0, u_0] (F1) of each time step, (B, 2H). One product over all
    time steps computes them, from x (T, B, E), W0 (E + H, 2H) and x_mask (B, E)."""
    return (drop(x, x_mask) @ W0[: x.size(-1)]).unbind(0)


def initial_state(xW: Tensor, h: Tensor, W0_h: Tensor, h_mask: Tensor | None) -> Tensor:
    """Returns node 0 before normalisation, h + sigmoid(c_0) * (tanh(u_0) - h), (B, H) (F1).

    Here [c_0, u_0] = xW + (h * h_mask) @ W0_h, with xW (B, 2H) the input's term, h (B, H) the hidden state of the
    previous time step, W0_h (H, 2H) and h_mask (B, H).
    """
    c, u = (xW + drop(h, h_mask) @ W0_h).chunk(2, dim=-1)  # (B, H) each
    return h + torch.sigmoid(c) * (torch.tanh(u) - h)


def relaxed(
    x: Tensor, h0: Tensor, W0: Tensor, Ws: Sequence[Tensor], probs: Tensor, x_mask: Tensor | None = None,
    h_mask: Tensor | None = None, frozen_relu: FrozenReLU | None = None, norm: str = "batch",
) -> Tensor:  # fmt: skip
    """Returns the hidden states (T, B, H) of the continuous relaxation (DARTS, sections 2.2 and 3.1.2; F1 to F6).

    The shapes are x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N times (H, 2H), x_mask (B, E), h_mask (B, H), and probs
    (N(N+1)/2, K), the softmax of the architecture parameters. The edges of node i = 1..N, one for each predecessor
    j = 0..i-1, are the i rows of probs from i(i-1)/2 on. With [c_j, u_j] = (s_j * h_mask) @ Ws[i - 1],

        s_i = norm( sum_j sum_{k != none} p_k * [s_j + sigmoid(c_j) * (f_k(u_j) - s_j)] ),

    where `norm` is one of `NORMS` (see `normalise`). With "none" the sum over j is a mean, since nothing else would
    keep the size of the states from growing with the number of predecessors. s_0 is normalised too. The hidden state
    is the mean of s_1 .. s_N. A `frozen_relu` replaces relu.

    The sum over k is taken first: with P = sum_{k != none} p_k, each j contributes
    P s_j + sigmoid(c_j) * (sum_k p_k f_k(u_j) - P s_j).
    """
    W0_h = W0[x.size(-1) :]
    node_probs = probs.split(list(range(1, len(Ws) + 1)))  # N times (i, K)
    h, hiddens = h0, []
    for t, xW in enumerate(cell_inputs(x, W0, x_mask)):
        states = [normalise(initial_state(xW, h, W0_h, h_mask), norm)]
        for W, p in zip(Ws, node_probs, strict=True):
            s = torch.stack(states)  # (i, B, H)
            c, u = (drop(s, h_mask) @ W).chunk(2, dim=-1)  # (i, B, H) each
            p = p[:, 1:, None, None]  # (i, K-1, 1, 1)
            relu = torch.relu(u) if frozen_relu is None else frozen_relu(u, (t, len(states)))
            activations = (torch.tanh(u), relu, torch.sigmoid(u), u)  # (i, B, H) each, in the order of `PRIMITIVES`
            mixed = sum(p[:, k] * f for k, f in enumerate(activations))  # (i, B, H)
            carried = p.sum(1) * s  # (i, B, H)
            each = carried + torch.sigmoid(c) * (mixed - carried)  # (i, B, H)
            states.append(normalise(each.mean(0) if norm == "none" else each.sum(0), norm))
        h = sum(states[1:]) / len(Ws)  # (B, H)
        hiddens.append(h)
    return torch.stack(hiddens)


def discrete(
    x: Tensor, h0: Tensor, W0: Tensor, Ws: Sequence[Tensor], recurrent: Sequence[tuple[str, int]],
    concat: Sequence[int], x_mask: Tensor | None = None, h_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the hidden states (T, B, H) of the cell of one genotype (DARTS, section 3.1.2).

    The shapes are x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N times (H, 2H), x_mask (B, E) and h_mask (B, H).
    `recurrent` has for each node i = 1..N the name of its operation f (see `ACTIVATIONS`) and its predecessor j, and
    s_i = s_j + sigmoid(c) * (f(u) - s_j) with [c, u] = (s_j * h_mask) @ Ws[i - 1]. The hidden state is the mean of the
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
