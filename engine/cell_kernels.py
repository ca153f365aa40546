"""What the fast engine does between two products, one compiled kernel each: the arithmetic of the two cells.

Each kernel is one pass over its arguments, of which it writes the last ones. (One that read a large argument and
wrote over it would be compiled to several passes.)

Shapes: T time steps, B batch, H hidden, N nodes, K primitives. `accum_dtype` is the dtype of sums and
normalisation (that of the masks), `compute_dtype` that of products and of what is saved for backward.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.dropout import FrozenReLU
from engine.elementwise import force_materialize, sigmoid, sigmoid_tanh
from engine.inductor import kernel
from engine.matmul import Workspace
from engine.reference import NORM_EPS


class SavedForward(NamedTuple):
    """What is remembered of a pass of the relaxed cell over a sequence."""

    space: Workspace
    states: Tensor  # (T, N+1, B, H)
    masked: Tensor  # (T, N+1, B, H)
    products: list[Tensor]  # N+1 times (T, i, B, 2H)
    previous: Tensor  # (T+1, B, H)
    inverse: Tensor  # (T, N+1, H) of batch normalisation, (T, N+1, B, 1) of layer normalisation
    held_relu: FrozenReLU | None
    norm: str
    share: Tensor | None  # (H,), see `unit_share`


class SavedBackward(NamedTuple):
    """The same of its way back."""

    received: Tensor  # (T, N+1, B, H), the gradients of the states
    dxW: Tensor  # (T, B, 2H)


# Views for all time steps at once: made one by one in the loop they would cost a small cell as much as its kernels.


def halves(dcu: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of c and those of u, (..., H) each."""
    H = dcu.size(-1) // 2
    return dcu[..., :H], dcu[..., H:]


def by_node(buffer: Tensor) -> list[tuple[Tensor, ...]]:
    """[i][t] of (T, N+1, ...)."""
    return [node.unbind(0) for node in buffer.unbind(1)]


def before_node(states: Tensor) -> list[tuple[Tensor, ...]]:
    """[i][t]: the states s_0 .. s_{i-1}, (i, B, H) each, of (T, N+1, B, H)."""
    return [states[:, :i].unbind(0) for i in range(states.size(1))]


def flat_rows(buffer: Tensor) -> tuple[Tensor, ...]:
    """[t]: (iB, H) each, of (T, i, B, H)."""
    return buffer.flatten(1, 2).unbind(0)


def held_set(cu: Tensor, held_relu: FrozenReLU | None, place: tuple[int, int]) -> Tensor | None:
    """Where relu is held active, (..., H) as bytes, since Inductor reads bool slowly; None where it is free."""
    return None if held_relu is None else held_relu.active_set(halves(cu)[1], place).view(torch.uint8)


def unit_share(width: int, like: Tensor) -> Tensor:
    """(H,) for states like `like` (B, H): 1 / width for each of `width` hidden units, 0 for the zeros behind them."""
    return (torch.arange(like.size(-1), device=like.device) < width).to(like.dtype) / width


def of_nodes(probs: Tensor) -> tuple[Tensor, ...]:
    """The rows of each node, N times (i, K), of all nodes' (N(N+1)/2, K)."""
    nodes = (math.isqrt(8 * len(probs) + 1) - 1) // 2
    return probs.detach().split(list(range(1, nodes + 1)))


class GradAccumulators:
    """What waits on the way back of the relaxed cell to reach a state, and the views by which it gets there."""

    def __init__(self, space: Workspace, N: int, B: int, H: int):
        self.totals = [space.take(N + 1, B, H, accumulator=True) for _ in range(2)]  # gradients, to swap
        self.grad_via_matmul = space.take(N + 1, B, H)  # what comes through the products of the node above
        self.grad_h_direct = space.take(B, H, accumulator=True).zero_()  # of the hidden state before the step
        self.grad_h_matmul = space.take(B, H).zero_()  # the same, through its product with W0
        # Of each primitive's probability, (i, B). (In one tensor they would be a launch more on a GPU.)
        self.sums = [[self.grad_h_direct.new_zeros(i, B) for _ in range(4)] for i in range(1, N + 1)]
        self.each = [half.unbind(0) for half in self.totals]
        self.share = [[half[:i] for i in range(N + 1)] for half in self.totals]
        self.rest, self.rest_of = self.grad_via_matmul.unbind(0), [self.grad_via_matmul[:i] for i in range(N + 1)]
        self.rows_of_rest = [part.flatten(0, 1) for part in self.rest_of]

    def begin_step(self, g: Tensor, h_mask: Tensor) -> None:
        """At a time step whose hidden state has the gradient g (B, H) from the loss."""
        concat = tuple(range(1, len(self.rest)))
        output_back(g, self.grad_h_direct, self.grad_h_matmul, h_mask, concat, self.totals[0])
        self.grad_via_matmul.zero_()

    def grad_h0(self, h_mask: Tensor) -> Tensor:
        """In the end, what has reached the state before the first step (B, H)."""
        return self.grad_h_direct + self.grad_h_matmul * h_mask

    def grad_probs(self) -> Tensor:
        """In the end, the gradient of the probabilities (N(N+1)/2, K): the weight of `none` changes nothing."""
        return torch.cat([torch.stack([torch.zeros_like(sums[0]), *sums], -1).sum(1) for sums in self.sums])


@kernel
def relaxed_start(cu, h, norm, share, h_mask, state, masked, inverse):
    """s_0 from the hidden state: cu (B, 2H), h and h_mask (B, H), `norm` and `share` as in `average` -> state, masked
    (B, H), inverse (H,) or (B, 1)."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    tanh = sigmoid_tanh(u)[1]
    put_normalised(h + sigmoid(c) * (tanh - h), norm, share, h_mask, state, masked, inverse)


@kernel
def relaxed_node(cu, states, p, active, norm, share, h_mask, state, masked, inverse):
    """s_i: cu (i, B, 2H), states (i, B, H), p (i, K), relu's active set (i, B, H) or None -> state, masked (B, H),
    inverse (H,) or (B, 1)."""
    c, u = cu.chunk(2, dim=-1)
    p = p[:, 1:, None, None]
    *_, mixed, _ = mixture(p, u, active)
    kept = p.sum(1) * states.to(h_mask.dtype)
    each = kept + sigmoid(c.to(h_mask.dtype)) * (mixed - kept)
    put_normalised(each.sum(0) * of_sum(norm, len(p)), norm, share, h_mask, state, masked, inverse)


def mixture(p, u, active):
    """The primitives of u (i, B, H), as it is kept, their slopes, and the mixture of either by p (i, K-1, 1, 1)."""
    sig, tanh = sigmoid_tanh(u, p.dtype)
    u = u.to(p.dtype)
    on = (u > 0 if active is None else active).to(u.dtype)
    primitives = tanh, u * on, sig, u
    mixed = p[:, 0] * tanh + p[:, 1] * primitives[1] + p[:, 2] * sig + p[:, 3] * u
    slopes = 1 - tanh * tanh, on, sig * (1 - sig), torch.ones_like(u)
    slope = p[:, 0] * slopes[0] + p[:, 1] * on + p[:, 2] * sig * (1 - sig) + p[:, 3]
    return primitives, slopes, mixed, slope


def of_sum(norm, predecessors):
    """What the sum over the predecessors is multiplied by: without a norm it is a mean."""
    return 1 / predecessors if norm == "none" else 1


def average(x, norm, share):
    """The mean of x (B, H) that a norm subtracts: of each unit over the batch (H,), or of each row over its units
    (B, 1), where `share` (H,) is 1 / their number (`unit_share`)."""
    return x.mean(0) if norm == "batch" else (x * share).sum(-1, keepdim=True)


def units_alone(x, norm, share):
    """x (B, H) with 0 behind the hidden units, where a mean over units would leave something else."""
    return torch.where(share > 0, x, 0) if norm == "layer" else x


def put_normalised(s, norm, share, h_mask, state, masked, inverse):
    if norm != "none":
        s = force_materialize(s)
        centred = s - average(s, norm, share)
        scale = torch.rsqrt(average(centred.square(), norm, share) + NORM_EPS)
        s = units_alone(centred * scale, norm, share)
        inverse.copy_(scale)
    state.copy_(s)
    masked.copy_(s * h_mask)


@kernel
def output(states, concat, h_mask, hidden, masked):
    """The mean of the nodes in `concat`, of states (N+1, B, H) -> hidden, masked (B, H)."""
    h = sum(states[i].to(hidden.dtype) for i in concat) / len(concat)
    hidden.copy_(h)
    masked.copy_(h * h_mask)


@kernel
def output_back(g, grad_h_direct, grad_h_matmul, h_mask, concat, total):
    """Gradient of a hidden state from the loss and from the next step -> of s_0 .. s_N (N+1, B, H)."""
    nodes = torch.arange(total.size(0), device=total.device)
    counts = sum((nodes == i).to(total.dtype) for i in concat)
    total.copy_((g + grad_h_direct + grad_h_matmul * h_mask) / len(concat) * counts[:, None, None])


def normalise_back(g, norm, share, state, inverse):
    """Back through a norm, (B, H): inverse * (g - mean(g) - s mean(g s)), the means as in `average`."""
    if norm == "none":
        return force_materialize(g)
    s = state.to(g.dtype)
    dz = inverse * (g - average(g, norm, share) - s * average(g * s, norm, share))
    return force_materialize(units_alone(dz, norm, share))


@kernel
def relaxed_node_back(
    g, g_through, state, inverse, total, grad_via_matmul, states, cu, p, active, norm, share, h_mask, received, dc, du,
    total_after, *sums,
):  # fmt: skip
    """Back through a node: g, g_through, state (B, H), inverse (H,) or (B, 1), the rest as in `relaxed_node` -> the
    node's own gradient (B, H), dc, du (i, B, H).

    `total_after` (i, B, H) is `total` and `grad_via_matmul`, which waited, and this node's share. The `sums`, (i, B)
    each, gain the gradients of the probabilities.
    """
    g = g + g_through * h_mask
    received.copy_(g)
    dz = normalise_back(g, norm, share, state, inverse) * of_sum(norm, len(p))
    c, u = cu.chunk(2, dim=-1)
    s = states.to(h_mask.dtype)
    p = p[:, 1:, None, None]
    gate = sigmoid(c.to(h_mask.dtype))
    primitives, _, mixed, slope = mixture(p, u, active)
    some = p.sum(1)
    opened = dz * gate
    shut = dz - opened
    d = force_materialize(opened * (1 - gate) * (mixed - some * s))
    dc.copy_(d)
    du.copy_(opened * slope)
    total_after.copy_(total + grad_via_matmul * h_mask + some * shut)
    for gained, f in zip(sums, primitives, strict=True):
        gained.copy_(gained + (opened * f + shut * s).sum(-1))


@kernel
def relaxed_start_back(g, g_through, state, inverse, cu, norm, share, h_mask, h, received, dc, du, grad_h_direct):
    """Back through the norm of s_0 and through s_0, all (B, H) -> the gradient of s_0, dc, du, and the hidden
    state's own share."""
    g = g + g_through * h_mask
    received.copy_(g)
    put_start_back(normalise_back(g, norm, share, state, inverse), cu, h, dc, du, grad_h_direct)


@kernel
def discrete_start_back(g, cu, h, dc, du, grad_h_direct):
    """Back through s_0, all (B, H) -> dc, du, and the hidden state's own share."""
    put_start_back(g, cu, h, dc, du, grad_h_direct)


def put_start_back(g, cu, h, dc, du, grad_h_direct):
    """Back through s = h + sigmoid(c) (tanh(u) - h)."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    dc.copy_(g * gate * (1 - gate) * (tanh - h))
    du.copy_(g * gate * (1 - tanh * tanh))
    grad_h_direct.copy_(g * (1 - gate))


def activation(name, u):
    """f(u) and f'(u)."""
    if name == "identity":
        return u, torch.ones_like(u)
    if name == "relu":
        return u.clamp(min=0), (u > 0).to(u.dtype)
    sig, tanh = sigmoid_tanh(u)
    return (tanh, 1 - tanh * tanh) if name == "tanh" else (sig, sig * (1 - sig))


@kernel
def discrete_node(name, cu, s, h_mask, state, masked):
    """s_i: cu (B, 2H), the predecessor s (B, H) -> state, masked (B, H)."""
    c, u = cu.to(h_mask.dtype).chunk(2, dim=-1)
    s = s.to(h_mask.dtype)
    s = s + sigmoid(c) * (activation(name, u)[0] - s)
    state.copy_(s)
    masked.copy_(s * h_mask)


@kernel
def discrete_node_back(name, g, cu, s, dc, du, total):
    """Back through a node: g (B, H) -> dc, du (B, H); `total` (B, H), the predecessor's, gains this node's share."""
    c, u = cu.to(g.dtype).chunk(2, dim=-1)
    s = s.to(g.dtype)
    gate = sigmoid(c)
    f, slope = activation(name, u)
    dc.copy_(g * gate * (1 - gate) * (f - s))
    du.copy_(g * gate * slope)
    total.copy_(total + g * (1 - gate))
