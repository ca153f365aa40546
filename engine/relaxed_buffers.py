"""The buffers of a pass of the relaxed cell over a sequence, as views for each node and time step.

Shapes: T time steps, B batch, H hidden, N nodes, K primitives. H includes the padding of `fused.prepare`. The equations
(F1) to (F6) and (B1) to (B7) are in docs/engine.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cell_kernels import output_back
from engine.dropout import FrozenReLU
from engine.matmul import Workspace


class Constants(NamedTuple):
    """What is the same at every node and time step of a pass over a sequence: the norm and the mask of the states."""

    norm: str  # one of `reference.NORMS`
    unit_weights: Tensor | None  # (H,), `unit_weights` of layer normalisation
    h_mask: Tensor  # (B, H)


class Node(NamedTuple):
    """The results of a node i at one time step, or their tangents."""

    state: Tensor  # s_i, (B, H)
    masked: Tensor  # s_i * h_mask, (B, H)
    inv_std: Tensor  # 1 / deviation, (B, 1) of layer normalisation, else (H,); without a norm it is not written


class Edges(NamedTuple):
    """What node i reads from its i predecessors at one time step, or the tangents of that."""

    cu: Tensor  # the preactivations [c, u], (i, B, 2H), but (B, 2H) for node 0
    states: Tensor  # s_0 .. s_{i-1}, (i, B, H)


class StateGrad(NamedTuple):
    """The gradient of one state (B, H) or several (i, B, H), which is direct + via_matmul * h_mask."""

    direct: Tensor
    via_matmul: Tensor  # through the product of the node that was processed last


class SavedForward(NamedTuple):
    """What a forward pass of the relaxed cell over a sequence saves for the backward pass."""

    space: Workspace
    nodes: list[list[Node]]  # [i][t], of s_0 .. s_N
    edges: list[list[Edges]]  # [i][t]
    masked: Tensor  # (T, N+1, B, H), all states * h_mask
    previous: Tensor  # (T+1, B, H), the hidden state before each time step, masked
    frozen_relu: FrozenReLU | None
    constants: Constants


class SavedBackward(NamedTuple):
    """The tensors that a backward pass of the relaxed cell saves, for it to be differentiated itself."""

    state_grads: Tensor  # (T, N+1, B, H), the gradients of the states
    dxW: Tensor  # (T, B, 2H), the gradient of xW


# The functions below make the views of all time steps before the loop. If the loop made them one by one, they would
# cost a small cell as much time as its kernels.


def by_node(buffer: Tensor) -> list[tuple[Tensor, ...]]:
    """Returns views [i][t] of `buffer` (T, N+1, ...), indexed by node i and time step t."""
    return [node.unbind(0) for node in buffer.unbind(1)]


def new_products(space: Workspace, T: int, N: int, B: int, H: int) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Returns buffers for the preactivations [c, u], (T, B, 2H) for node 0 and (T, i, B, 2H) for node i, and views
    [i][t] of them as matrices, into which products are written."""
    products = [space.take(T, B, 2 * H), *(space.take(T, i, B, 2 * H) for i in range(1, N + 1))]
    return products, [products[0].unbind(0), *map(flat_rows, products[1:])]


def nodes_and_edges(
    states: Tensor, masked: Tensor, inv_std: Tensor, products: Sequence[Tensor]
) -> tuple[list[list[Node]], list[list[Edges]]]:
    """Returns the nodes [i][t] and the edges [i][t] as views of the buffers that hold them, or of their tangents.

    states (T, N+1, B, H) and inv_std (T, N+1, ...) have an entry for each time step, and so has masked, or it is
    (1, N+1, B, H), used again at each step. `products` are those of `new_products`.
    """
    buffers = by_node(states), by_node(masked.expand_as(states)), by_node(inv_std)
    nodes = [list(map(Node, *views)) for views in zip(*buffers, strict=True)]
    edges = [list(map(Edges, cu.unbind(0), states[:, :i].unbind(0))) for i, cu in enumerate(products)]
    return nodes, edges


def flat_rows(buffer: Tensor) -> tuple[Tensor, ...]:
    """Returns views [t] of `buffer` (T, i, B, H) as a matrix (iB, H) for each time step."""
    return buffer.flatten(1, 2).unbind(0)


def frozen_active_set(cu: Tensor, frozen_relu: FrozenReLU | None, place: tuple[int, int]) -> Tensor | None:
    """Returns the active set of `frozen_relu` (i, B, H) at `place`, a time step and a node i, or None if it is None. cu
    (i, B, 2H) are the preactivations [c, u]. The active set is viewed as uint8, since Inductor reads bool slowly."""
    return None if frozen_relu is None else frozen_relu.active_set(cu.chunk(2, -1)[1], place).view(torch.uint8)


def unit_weights(width: int, like: Tensor) -> Tensor:
    """Returns (H,): 1 / width for each of the first `width` hidden units, and 0 for the padding. `like` (B, H) gives H,
    the dtype and the device."""
    return (torch.arange(like.size(-1), device=like.device) < width).to(like.dtype) / width


def split_by_node(probs: Tensor) -> tuple[Tensor, ...]:
    """Returns the probabilities of each node's edges, N times (i, K), as detached views of probs (N(N+1)/2, K)."""
    nodes = (math.isqrt(8 * len(probs) + 1) - 1) // 2
    return probs.detach().split(list(range(1, nodes + 1)))


class GradAccumulators:
    """The gradients that a backward pass of the relaxed cell accumulates, with the views that its loop uses.

    B is the batch, H the hidden units and N the nodes; `space` allocates the tensors. `r_backward` accumulates the
    tangents of these gradients in the same way.
    """

    def __init__(self, space: Workspace, N: int, B: int, H: int):
        # The gradients of the states. Each node reads one of the two tensors and writes the other.
        self.totals = [space.take(N + 1, B, H, accumulator=True) for _ in range(2)]
        # The gradients of the states through the product of the node that was processed last, not yet masked.
        self.grad_via_matmul = space.take(N + 1, B, H)
        # The gradient of the hidden state before the time step has two terms: that through its product with W0, not
        # yet masked, is `grad_h_matmul`, and the rest is `grad_h_direct`.
        self.grad_h_direct = space.take(B, H, accumulator=True).zero_()
        self.grad_h_matmul = space.take(B, H).zero_()
        # The gradients of the probabilities are one tensor (i, B) for each node and each primitive but `none`. Stacked
        # in one tensor they would take one more launch on a GPU.
        self.sums = [tuple(self.grad_h_direct.new_zeros(i, B) for _ in range(4)) for i in range(1, N + 1)]
        both = [(total, self.grad_via_matmul) for total in self.totals]
        self.node_grads = [[StateGrad(total[i], rest[i]) for i in range(N + 1)] for total, rest in both]
        self.predecessor_grads = [[StateGrad(total[:i], rest[:i]) for i in range(N + 1)] for total, rest in both]
        self.rows_via_matmul = [self.grad_via_matmul[:i].flatten(0, 1) for i in range(N + 1)]  # (iB, H) each

    def begin_step(self, g: Tensor, h_mask: Tensor) -> None:
        """Starts a time step whose hidden state has the gradient g (B, H) from the loss (B1); h_mask is (B, H)."""
        concat = tuple(range(1, len(self.grad_via_matmul)))
        output_back(g, self.grad_h_direct, self.grad_h_matmul, h_mask, concat, self.totals[0])
        self.grad_via_matmul.zero_()

    def grad_h0(self, h_mask: Tensor) -> Tensor:
        """Returns the gradient of the hidden state before the first time step, (B, H), once the loop has ended."""
        return self.grad_h_direct + self.grad_h_matmul * h_mask

    def grad_probs(self) -> Tensor:
        """Returns the gradient of the probabilities (N(N+1)/2, K), once the loop has ended. It is 0 for `none`, whose
        probability changes nothing."""
        return torch.cat([torch.stack([torch.zeros_like(sums[0]), *sums], -1).sum(1) for sums in self.sums])
