"""Computes the mixed second derivative of the relaxed cell exactly, not by a finite difference.

It is the change of the gradient of the probabilities as the weights move in a direction (Pearlmutter 1994, "Fast exact
multiplication by the Hessian"). Every quantity that a pass over the sequence computes has a tangent, its derivative
along that direction, named with the prefix `r_`. `r_forward` repeats the forward pass and computes the tangents of the
states. `r_backward` repeats the backward pass and computes the tangents of the gradients. Each has two matrix products
where the first pass had one, since (a b)' = a' b + a b'; together they have as many as the two passes of a central
difference.

Shapes: T time steps, B batch, H hidden, N nodes, K primitives. H includes the padding of `fused.prepare`. The equations
(F1) to (F6) and (B1) to (B7) are in docs/engine.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.cell_kernels import average, mixture, output, sum_factor, total_grad, zero_padding
from engine.elementwise import force_materialize, sigmoid, sigmoid_tanh
from engine.inductor import kernel
from engine.matmul import matmul
from engine.relaxed_buffers import (
    Edges,
    GradAccumulators,
    Node,
    SavedBackward,
    SavedForward,
    by_node,
    flat_rows,
    frozen_active_set,
    new_products,
    nodes_and_edges,
    split_by_node,
)


class Tangents(NamedTuple):
    """The results of `r_forward` that `r_backward` needs."""

    nodes: list[list[Node]]  # [i][t]; in the place of `inv_std`, its tangent divided by `inv_std`
    edges: list[list[Edges]]  # [i][t]
    hiddens: tuple[Tensor, ...]  # T+1 times (B, H)
    direction: list[Tensor]  # directions of W0_h and Ws, (H, 2H) each


def r_forward(
    saved: SavedForward, h0: Tensor, hiddens: Tensor, weights: list[Tensor], probs: Tensor, vxW: Tensor | None,
    vh0: Tensor | None, direction: list[Tensor],
) -> tuple[Tangents, Tensor]:  # fmt: skip
    """Returns the tangents that `r_backward` needs, and those of the hidden states (T, B, H).

    The direction is vxW (T, B, 2H) for xW, vh0 (B, H) for h0, and `direction` for W0_h and Ws, (H, 2H) each. None
    stands for a vxW or a vh0 of zeros. `saved` was saved by the forward pass with h0 (B, H), the `weights` W0_h and Ws,
    and probs (N(N+1)/2, K), and `hiddens` (T, B, H) is its result.
    """
    space, nodes, edges, masked, previous, frozen_relu, constants = saved
    (T, B, H), N = hiddens.shape, len(weights) - 1
    r_states = space.take(T, N + 1, B, H)
    r_products, r_cu_rows = new_products(space, T, N, B, H)
    r_masked, r_previous = space.take(1, N + 1, B, H), space.take(B, H)  # of one time step only
    ratio = h0.new_empty(T, N + 1, *nodes[0][0].inv_std.shape)
    r_hiddens = torch.empty_like(hiddens)
    weights, direction = ([W.to(space.compute_dtype) for W in given] for given in (weights, direction))
    node_probs = split_by_node(probs)  # N times (i, K)

    r_nodes, r_edges = nodes_and_edges(r_states, r_masked, ratio, r_products)
    matmul_inputs = [flat_rows(masked[:, :i]) for i in range(N + 1)]
    r_matmul_inputs = [r_masked[0, :i].flatten(0, 1) for i in range(N + 1)]
    previous_t, r_states_t, concat = previous.unbind(0), r_states.unbind(0), tuple(range(1, N + 1))
    vxW = space.take(T, B, 2 * H).zero_() if vxW is None else vxW
    vh0 = torch.zeros_like(h0) if vh0 is None else vh0
    hs, r_hs, vxWs = (h0, *hiddens), (vh0, *r_hiddens), vxW.unbind(0)

    r_previous.copy_(vh0 * constants.h_mask)
    for t in range(T):
        torch.addmm(vxWs[t], r_previous, weights[0], out=r_cu_rows[0][t])
        r_cu_rows[0][t].addmm_(previous_t[t], direction[0])
        r_start(edges[0][t].cu, r_edges[0][t].cu, hs[t], r_hs[t], constants, nodes[0][t], r_nodes[0][t])
        for i in range(1, N + 1):
            matmul(r_matmul_inputs[i], weights[i], out=r_cu_rows[i][t])
            r_cu_rows[i][t].addmm_(matmul_inputs[i][t], direction[i])
            active = frozen_active_set(edges[i][t].cu, frozen_relu, (t, i))
            r_node(edges[i][t], r_edges[i][t], node_probs[i - 1], active, constants, nodes[i][t], r_nodes[i][t])
        output(r_states_t[t], concat, constants.h_mask, r_hs[t + 1], r_previous)
    return Tangents(r_nodes, r_edges, r_hs, direction), r_hiddens


def r_backward(
    saved: SavedForward, backward_pass: SavedBackward, tangents: Tangents, h0: Tensor, hiddens: Tensor,
    weights: list[Tensor], probs: Tensor, r_g_hiddens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the tangents of the gradients of xW (T, B, 2H), h0 (B, H) and probs (N(N+1)/2, K).

    r_g_hiddens (T, B, H) is the tangent of the gradient of the hidden states. `backward_pass` was saved by the backward
    pass, `tangents` come from `r_forward`, and the other arguments are those of `r_forward`.
    """
    space, nodes, edges, _, _, frozen_relu, constants = saved
    state_grads, dxW = backward_pass
    r_nodes, r_edges, r_hs, direction = tangents
    (T, B, H), N = hiddens.shape, len(weights) - 1
    weights = [W.to(space.compute_dtype) for W in weights]
    r_dxW = space.take(T, B, 2 * H)
    gradient = [space.take(4, i, B, H) for i in range(1, N + 1)]  # r_dc, r_du, dc, du of each node
    acc = GradAccumulators(space, N, B, H)
    node_probs, grads = split_by_node(probs), by_node(state_grads)  # N times (i, K); [i][t]

    dcus, rows_of = [g.unbind(0) for g in gradient], [g.flatten(1, 2).unbind(0) for g in gradient]
    factors = [  # r_dc and r_du are multiplied by the transposed weights, dc and du by the transposed directions.
        [half.t() for half in (*W.chunk(2, -1), *v.chunk(2, -1))] for W, v in zip(weights, direction, strict=True)
    ]
    W0_t, v0_t = weights[0].t(), direction[0].t()
    gs, hs, dxWs, r_dxWs = r_g_hiddens.unbind(0), (h0, *hiddens), dxW.unbind(0), r_dxW.unbind(0)
    r_dcs_0 = r_dxW.chunk(2, -1)

    for t in reversed(range(T)):
        this, other = 0, 1  # Each node reads one of the two `totals` and writes the other.
        acc.begin_step(gs[t], constants.h_mask)
        for i in range(N, 0, -1):
            active = frozen_active_set(edges[i][t].cu, frozen_relu, (t, i))
            r_node_back(
                acc.node_grads[this][i], grads[i][t], nodes[i][t], r_nodes[i][t], edges[i][t], r_edges[i][t],
                node_probs[i - 1], active, constants, acc.predecessor_grads[this][i], acc.sums[i - 1], dcus[i - 1],
                acc.predecessor_grads[other][i].direct,
            )  # fmt: skip
            this, other = other, this
            matmul(rows_of[i - 1][0], factors[i][0], out=acc.rows_via_matmul[i])
            for d, factor in zip(rows_of[i - 1][1:], factors[i][1:], strict=True):
                acc.rows_via_matmul[i].addmm_(d, factor)
        r_start_back(
            acc.node_grads[this][0], grads[0][t], nodes[0][t], r_nodes[0][t], edges[0][t].cu, r_edges[0][t].cu, hs[t],
            r_hs[t], constants, r_dcs_0[0][t], r_dcs_0[1][t], acc.grad_h_direct,
        )  # fmt: skip
        matmul(r_dxWs[t], W0_t, out=acc.grad_h_matmul)
        acc.grad_h_matmul.addmm_(dxWs[t], v0_t)
    return r_dxW, acc.grad_h0(constants.h_mask), acc.grad_probs()


# The functions below follow those of cell_kernels.py. Each kernel is one pass and writes its last arguments.


@kernel
def r_start(cu, r_cu, h, r_h, constants, node, r_node):
    """Computes the tangent of s_0 (F1, F5). Reads cu and its tangent r_cu (B, 2H), h and r_h (B, H), and the results
    `node`. Writes `r_node` as in `put_r_normalised`."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    r_update = (1 - gate) * (tanh - h) * r_c + (1 - tanh * tanh) * r_u
    put_r_normalised(r_h + gate * (r_update - r_h), constants, node, r_node)


@kernel
def r_node(edges, r_edges, p, active, constants, node, r_node):
    """Computes the tangent of s_i (F3 to F5). Reads what `cell_kernels.relaxed_node` reads, the results `node` that it
    wrote, and the tangents `r_edges`. Writes `r_node` as in `put_r_normalised`."""
    dtype = constants.h_mask.dtype
    c, u = edges.cu.chunk(2, dim=-1)
    r_c, r_u = r_edges.cu.to(dtype).chunk(2, dim=-1)
    p = p[:, 1:, None, None]
    *_, mixed, slope = mixture(p, u, active)
    P, gate = p.sum(1), sigmoid(c.to(dtype))
    carried, r_carried = P * edges.states.to(dtype), P * r_edges.states.to(dtype)
    r_z = r_carried + gate * ((1 - gate) * (mixed - carried) * r_c + slope * r_u - r_carried)
    put_r_normalised(r_z.sum(0) * sum_factor(constants.norm, len(p)), constants, node, r_node)


def put_r_normalised(r_z, constants, node, r_node):
    """Writes the tangents of the results `node` to `r_node`, given the tangent of z, r_z (B, H), where s = node.state =
    (z - mean) / deviation (F5).

    The Jacobian of the normalisation is symmetric, so that this is the formula of its backward pass. r_node.inv_std is
    the tangent of node.inv_std = 1 / deviation, divided by it. Without a norm it is not written.
    """
    r_s = r_z
    if constants.norm != "none":
        r_z, s = force_materialize(r_z), node.state.to(r_z.dtype)
        common = average(s * r_z, constants)
        r_s = zero_padding(node.inv_std * (r_z - average(r_z, constants) - s * common), constants)
        r_node.inv_std.copy_(-node.inv_std * common)
    r_node.state.copy_(r_s)
    r_node.masked.copy_(r_s * constants.h_mask)


def r_normalise_back(r_g, g, node, r_node, constants):
    """Returns dz = inv_std * (g - mean(g) - s mean(g s)) (B2) and its tangent, (B, H) each.

    g (B, H) is the gradient of the normalised s = node.state, and r_g its tangent. The means are those of
    `cell_kernels.average`. Without a norm, dz is g and its tangent is r_g.
    """
    g = g.to(r_g.dtype)
    if constants.norm == "none":
        return force_materialize(g), force_materialize(r_g)
    s, r_s, inv_std = node.state.to(r_g.dtype), r_node.state.to(r_g.dtype), node.inv_std
    common, r_common = average(g * s, constants), average(r_g * s + g * r_s, constants)
    dz = force_materialize(zero_padding(inv_std * (g - average(g, constants) - s * common), constants))
    r_dz = r_node.inv_std * dz + inv_std * (r_g - average(r_g, constants) - r_s * common - s * r_common)
    return dz, force_materialize(zero_padding(r_dz, constants))


@kernel
def r_node_back(
    r_grad, g, node, r_node, edges, r_edges, p, active, constants, r_predecessor_grads, sums, dcus, r_total_after
):
    """Computes the tangent of the backward pass through a node, `cell_kernels.relaxed_node_back` (B2 to B5).

    Here g (B, H) is the whole gradient of s_i, `r_grad` its tangent so far, and `r_predecessor_grads` that of the
    predecessors' gradient. Writes r_dc, r_du, and also dc and du themselves, the `dcus`, (i, B, H) each.
    `r_total_after` (i, B, H) is the tangent of the predecessors' gradient plus what this node adds directly. The four
    `sums`, (i, B) each, gain the tangents of the gradients of the probabilities.
    """
    (r_dc, r_du, dc, du), dtype = dcus, constants.h_mask.dtype
    dz, r_dz = (
        d * sum_factor(constants.norm, len(p))
        for d in r_normalise_back(total_grad(r_grad, constants), g, node, r_node, constants)
    )
    c, u = edges.cu.chunk(2, dim=-1)
    r_c, r_u = r_edges.cu.to(dtype).chunk(2, dim=-1)
    s, r_s = edges.states.to(dtype), r_edges.states.to(dtype)
    p = p[:, 1:, None, None]
    (tanh, relu, sig, u), slopes, mixed, slope = mixture(p, u, active)
    # The second derivatives of relu and identity are zero.
    second_derivative = p[:, 2] * slopes[2] * (1 - 2 * sig) - p[:, 0] * 2 * tanh * slopes[0]
    gate, P = sigmoid(c.to(dtype)), p.sum(1)
    r_gate = gate * (1 - gate) * r_c
    gated, r_gated = dz * gate, r_dz * gate + dz * r_gate
    ungated, r_ungated = dz - gated, r_dz - r_gated
    update = mixed - P * s
    dc.copy_(gated * (1 - gate) * update)
    du.copy_(gated * slope)
    r_dc.copy_(
        force_materialize(
            (r_gated * (1 - gate) - gated * r_gate) * update + gated * (1 - gate) * (slope * r_u - P * r_s)
        )
    )
    r_du.copy_(r_gated * slope + gated * second_derivative * r_u)
    r_total_after.copy_(total_grad(r_predecessor_grads, constants) + P * r_ungated)
    rest = r_ungated * s + ungated * r_s
    for gained, f, df in zip(sums, (tanh, relu, sig, u), slopes, strict=True):
        gained.copy_(gained + (r_gated * f + gated * df * r_u + rest).sum(-1))


@kernel
def r_start_back(r_grad, g, node, r_node, cu, r_cu, h, r_h, constants, r_dc, r_du, r_direct):
    """Computes the tangent of the backward pass through s_0, `cell_kernels.relaxed_start_back` (B2, B6).

    Here g (B, H) is the whole gradient of s_0, and `r_grad` its tangent. cu and r_cu are (B, 2H). Writes r_dc, r_du and
    r_direct, (B, H) each. The last is the tangent of the part of the hidden state's gradient that does not come through
    the product with W0.
    """
    dz, r_dz = r_normalise_back(total_grad(r_grad, constants), g, node, r_node, constants)
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    r_gate, slope = gate * (1 - gate) * r_c, 1 - tanh * tanh
    r_gated = r_dz * gate + dz * r_gate
    r_dc.copy_((r_gated * (1 - gate) - dz * gate * r_gate) * (tanh - h) + dz * gate * (1 - gate) * (slope * r_u - r_h))
    r_du.copy_((r_gated - 2 * dz * gate * tanh * r_u) * slope)
    r_direct.copy_(r_dz - r_gated)
