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

from engine.cell_kernels import (
    GradAccumulators,
    SavedBackward,
    SavedForward,
    average,
    before_node,
    by_node,
    flat_rows,
    halves,
    held_set,
    mixture,
    of_nodes,
    of_sum,
    output,
    units_alone,
)
from engine.elementwise import force_materialize, sigmoid, sigmoid_tanh
from engine.inductor import kernel
from engine.matmul import matmul


class Tangents(NamedTuple):
    """The results of `r_forward` that `r_backward` needs."""

    states: Tensor  # (T, N+1, B, H)
    products: list[Tensor]  # N+1 times (T, i, B, 2H)
    ratio: Tensor  # (T, N+1, H) or (T, N+1, B, 1), tangent of `inverse` divided by `inverse`
    hiddens: tuple[Tensor, ...]  # T+1 times (B, H)
    direction: list[Tensor]  # directions of W0_h and Ws, (H, 2H) each


def r_forward(
    trace: SavedForward,
    h0: Tensor,
    hiddens: Tensor,
    weights: list[Tensor],
    probs: Tensor,
    h_mask: Tensor,
    vxW: Tensor | None,
    vh0: Tensor | None,
    direction: list[Tensor],
) -> tuple[Tangents, Tensor]:
    """Returns the tangents that `r_backward` needs, and those of the hidden states (T, B, H).

    The direction is vxW (T, B, 2H) for xW, vh0 (B, H) for h0, and `direction` for W0_h and Ws, (H, 2H) each. None
    stands for a vxW or a vh0 of zeros. `trace` was saved by the forward pass with h0 (B, H), the `weights` W0_h and Ws,
    probs (N(N+1)/2, K) and h_mask (B, H), and `hiddens` (T, B, H) is its result.
    """
    space, states, masked, products, previous, inverse, held_relu, norm, share = trace
    (T, B, H), N = hiddens.shape, len(weights) - 1
    r_states = space.take(T, N + 1, B, H)
    r_products = [space.take(T, max(i, 1), B, 2 * H) for i in range(N + 1)]
    r_masked, r_previous = space.take(N + 1, B, H), space.take(B, H)  # of one time step only
    ratio = torch.empty_like(inverse)
    r_hiddens = torch.empty_like(hiddens)
    weights, direction = ([W.to(space.compute_dtype) for W in given] for given in (weights, direction))
    rows = of_nodes(probs)  # N times (i, K)

    state, scale, predecessors = by_node(states), by_node(inverse), before_node(states)
    r_state, r_scale, r_below = by_node(r_states), by_node(ratio), before_node(r_states)
    matmul_inputs = [flat_rows(masked[:, :i]) for i in range(N + 1)]
    r_mask, r_factor = r_masked.unbind(0), [r_masked[:i].flatten(0, 1) for i in range(N + 1)]
    preactivations, r_cus = ([cu.unbind(0) for cu in those] for those in (products, r_products))
    rows_of_r_cu = [flat_rows(cu) for cu in r_products]
    previous_t, r_nodes, concat = previous.unbind(0), r_states.unbind(0), tuple(range(1, N + 1))
    vxW = torch.zeros_like(products[0][:, 0]) if vxW is None else vxW
    vh0 = torch.zeros_like(h0) if vh0 is None else vh0
    hs, r_hs, vxWs = (h0, *hiddens), (vh0, *r_hiddens), vxW.unbind(0)

    r_previous.copy_(vh0 * h_mask)
    for t in range(T):
        torch.addmm(vxWs[t], r_previous, weights[0], out=rows_of_r_cu[0][t])
        rows_of_r_cu[0][t].addmm_(previous_t[t], direction[0])
        r_start(
            preactivations[0][t][0], rows_of_r_cu[0][t], hs[t], r_hs[t], norm, share, h_mask, state[0][t], scale[0][t],
            r_state[0][t], r_mask[0], r_scale[0][t],
        )  # fmt: skip
        for i in range(1, N + 1):
            cu = preactivations[i][t]  # (i, B, 2H)
            matmul(r_factor[i], weights[i], out=rows_of_r_cu[i][t])
            rows_of_r_cu[i][t].addmm_(matmul_inputs[i][t], direction[i])
            active = held_set(cu, held_relu, (t, i))
            r_node(
                cu, r_cus[i][t], predecessors[i][t], r_below[i][t], rows[i - 1], active, norm, share, h_mask,
                state[i][t], scale[i][t], r_state[i][t], r_mask[i], r_scale[i][t],
            )  # fmt: skip
        output(r_nodes[t], concat, h_mask, r_hs[t + 1], r_previous)
    return Tangents(r_states, r_products, ratio, r_hs, direction), r_hiddens


def r_backward(
    trace: SavedForward,
    backward_pass: SavedBackward,
    tangents: Tangents,
    h0: Tensor,
    hiddens: Tensor,
    weights: list[Tensor],
    probs: Tensor,
    h_mask: Tensor,
    r_g_hiddens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tangents of the gradients of xW (T, B, 2H), h0 (B, H) and probs (N(N+1)/2, K).

    r_g_hiddens (T, B, H) is the tangent of the gradient of the hidden states. `backward_pass` was saved by the backward
    pass, `tangents` come from `r_forward`, and the other arguments are those of `r_forward`.
    """
    space, states, _, products, _, inverse, held_relu, norm, share = trace
    received, dxW = backward_pass
    r_states, r_products, ratio, r_hs, direction = tangents
    (T, B, H), N = hiddens.shape, len(weights) - 1
    weights = [W.to(space.compute_dtype) for W in weights]
    r_dxW = space.take(T, B, 2 * H)
    gradient = [space.take(4, i, B, H) for i in range(1, N + 1)]  # r_dc, r_du, dc, du of each node
    w = GradAccumulators(space, N, B, H)
    rows = of_nodes(probs)  # N times (i, K)

    state, scale, predecessors, mine = by_node(states), by_node(inverse), before_node(states), by_node(received)
    r_state, r_scale, r_below = by_node(r_states), by_node(ratio), before_node(r_states)
    preactivations, r_cus = ([cu.unbind(0) for cu in those] for those in (products, r_products))
    four, rows_of = [g.unbind(0) for g in gradient], [g.flatten(1, 2).unbind(0) for g in gradient]
    factors = [  # r_dc and r_du are multiplied by the transposed weights, dc and du by the transposed directions.
        [half.t() for half in (*halves(W), *halves(v))] for W, v in zip(weights, direction, strict=True)
    ]
    W0_t, v0_t = weights[0].t(), direction[0].t()
    gs, hs, dxWs, r_dxWs, r_dcs_0 = r_g_hiddens.unbind(0), (h0, *hiddens), dxW.unbind(0), r_dxW.unbind(0), halves(r_dxW)

    for t in reversed(range(T)):
        here, there = 0, 1  # Each node reads one of the two `totals` and writes the other.
        w.begin_step(gs[t], h_mask)
        for i in range(N, 0, -1):
            cu = preactivations[i][t]
            active = held_set(cu, held_relu, (t, i))
            r_node_back(
                w.each[here][i], w.rest[i], mine[i][t], state[i][t], r_state[i][t], scale[i][t], r_scale[i][t],
                w.share[here][i], w.rest_of[i], predecessors[i][t], r_below[i][t], cu, r_cus[i][t], rows[i - 1], active,
                norm, share, h_mask, *four[i - 1], w.share[there][i], *w.sums[i - 1],
            )  # fmt: skip
            here, there = there, here
            matmul(rows_of[i - 1][0], factors[i][0], out=w.rows_of_rest[i])
            for d, matmul_inputs in zip(rows_of[i - 1][1:], factors[i][1:], strict=True):
                w.rows_of_rest[i].addmm_(d, matmul_inputs)
        r_start_back(
            w.each[here][0], w.rest[0], mine[0][t], state[0][t], r_state[0][t], scale[0][t], r_scale[0][t],
            preactivations[0][t][0], r_cus[0][t][0], norm, share, h_mask, hs[t], r_hs[t], r_dcs_0[0][t],
            r_dcs_0[1][t], w.grad_h_direct,
        )  # fmt: skip
        matmul(r_dxWs[t], W0_t, out=w.grad_h_matmul)
        w.grad_h_matmul.addmm_(dxWs[t], v0_t)
    return r_dxW, w.grad_h0(h_mask), w.grad_probs()


# The functions below follow those of cell_kernels.py. Each kernel is one pass and writes its last arguments.


@kernel
def r_start(cu, r_cu, h, r_h, norm, share, h_mask, state, inverse, r_state, r_masked, ratio):
    """Computes the tangent of s_0 (F1, F5).

    Reads cu and its tangent r_cu (B, 2H), h, r_h, h_mask and state (B, H), `norm` and `share` as in
    `cell_kernels.average`, and inverse (H,) or (B, 1). Writes r_state and r_masked (B, H), and ratio, the tangent of
    inverse divided by inverse, in its shape.
    """
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    opened = (1 - gate) * (tanh - h) * r_c + (1 - tanh * tanh) * r_u
    put_r_normalised(r_h + gate * (opened - r_h), norm, share, h_mask, state, inverse, r_state, r_masked, ratio)


@kernel
def r_node(cu, r_cu, states, r_states, p, active, norm, share, h_mask, state, inverse, r_state, r_masked, ratio):
    """Computes the tangent of s_i (F3 to F5).

    Reads what `cell_kernels.relaxed_node` reads, the state and inverse that it wrote, and the tangents r_cu (i, B, 2H)
    and r_states (i, B, H). Writes r_state and r_masked (B, H), and ratio, the tangent of inverse divided by inverse, in
    its shape.
    """
    c, u = cu.chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h_mask.dtype).chunk(2, dim=-1)
    p = p[:, 1:, None, None]
    *_, mixed, slope = mixture(p, u, active)
    some, gate = p.sum(1), sigmoid(c.to(h_mask.dtype))
    kept, r_kept = some * states.to(h_mask.dtype), some * r_states.to(h_mask.dtype)
    r_z = r_kept + gate * ((1 - gate) * (mixed - kept) * r_c + slope * r_u - r_kept)
    put_r_normalised(r_z.sum(0) * of_sum(norm, len(p)), norm, share, h_mask, state, inverse, r_state, r_masked, ratio)


def put_r_normalised(r_z, norm, share, h_mask, state, inverse, r_state, r_masked, ratio):
    """Writes the tangent of s = (z - mean) / deviation (F5), given that of z, r_z (B, H).

    The Jacobian of the normalisation is symmetric, so that this is the formula of its backward pass. r_state is the
    tangent of s, and r_masked that of s * h_mask, (B, H) each. ratio is the tangent of `inverse` = 1 / deviation,
    divided by `inverse`, in its shape; it is not written if norm is "none".
    """
    r_s = r_z
    if norm != "none":
        r_z, s = force_materialize(r_z), state.to(r_z.dtype)
        common = average(s * r_z, norm, share)
        r_s = units_alone(inverse * (r_z - average(r_z, norm, share) - s * common), norm, share)
        ratio.copy_(-inverse * common)
    r_state.copy_(r_s)
    r_masked.copy_(r_s * h_mask)


def r_normalise_back(r_g, g, norm, share, state, r_state, inverse, ratio):
    """Returns dz = inverse * (g - mean(g) - s mean(g s)) (B2) and its tangent, (B, H) each.

    g (B, H) is the gradient of the normalised s = `state`, and r_g its tangent. The means are those of
    `cell_kernels.average`. If norm is "none", dz is g and its tangent is r_g.
    """
    g = g.to(r_g.dtype)
    if norm == "none":
        return force_materialize(g), force_materialize(r_g)
    s, r_s = state.to(r_g.dtype), r_state.to(r_g.dtype)
    common, r_common = average(g * s, norm, share), average(r_g * s + g * r_s, norm, share)
    dz = force_materialize(units_alone(inverse * (g - average(g, norm, share) - s * common), norm, share))
    r_dz = ratio * dz + inverse * (r_g - average(r_g, norm, share) - r_s * common - s * r_common)
    return dz, force_materialize(units_alone(r_dz, norm, share))


@kernel
def r_node_back(
    r_g, r_g_through, g, state, r_state, inverse, ratio, r_total, r_through, states, r_states, cu, r_cu, p, active,
    norm, share, h_mask, r_dc, r_du, dc, du, r_total_after, *sums,
):  # fmt: skip
    """Computes the tangent of the backward pass through a node, `cell_kernels.relaxed_node_back` (B2 to B5).

    Here g (B, H) is the whole gradient of s_i, and r_g + r_g_through * h_mask its tangent. Writes r_dc, r_du, and also
    dc and du themselves, (i, B, H) each. r_total_after (i, B, H) is r_total + r_through * h_mask plus what this node
    adds directly. The `sums`, (i, B) each, gain the tangents of the gradients of the probabilities.
    """
    dz, r_dz = (
        d * of_sum(norm, len(p))
        for d in r_normalise_back(r_g + r_g_through * h_mask, g, norm, share, state, r_state, inverse, ratio)
    )
    c, u = cu.chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h_mask.dtype).chunk(2, dim=-1)
    s, r_s = states.to(h_mask.dtype), r_states.to(h_mask.dtype)
    p = p[:, 1:, None, None]
    (tanh, relu, sig, u), slopes, mixed, slope = mixture(p, u, active)
    # The second derivatives of relu and identity are zero.
    second_derivative = p[:, 2] * slopes[2] * (1 - 2 * sig) - p[:, 0] * 2 * tanh * slopes[0]
    gate, some = sigmoid(c.to(h_mask.dtype)), p.sum(1)
    r_gate = gate * (1 - gate) * r_c
    opened, r_opened = dz * gate, r_dz * gate + dz * r_gate
    shut, r_shut = dz - opened, r_dz - r_opened
    over = mixed - some * s
    dc.copy_(opened * (1 - gate) * over)
    du.copy_(opened * slope)
    r_dc.copy_(
        force_materialize(
            (r_opened * (1 - gate) - opened * r_gate) * over + opened * (1 - gate) * (slope * r_u - some * r_s)
        )
    )
    r_du.copy_(r_opened * slope + opened * second_derivative * r_u)
    r_total_after.copy_(r_total + r_through * h_mask + some * r_shut)
    rest = r_shut * s + shut * r_s
    for gained, f, df in zip(sums, (tanh, relu, sig, u), slopes, strict=True):
        gained.copy_(gained + (r_opened * f + opened * df * r_u + rest).sum(-1))


@kernel
def r_start_back(
    r_g, r_g_through, g, state, r_state, inverse, ratio, cu, r_cu, norm, share, h_mask, h, r_h, r_dc, r_du, r_direct
):
    """Computes the tangent of the backward pass through s_0, `cell_kernels.relaxed_start_back` (B2, B6).

    Here g (B, H) is the whole gradient of s_0, and r_g + r_g_through * h_mask its tangent. cu and r_cu are (B, 2H),
    inverse and ratio (H,) or (B, 1). Writes r_dc, r_du and r_direct, (B, H) each. The last is the tangent of the part
    of the hidden state's gradient that does not come through the product with W0.
    """
    dz, r_dz = r_normalise_back(r_g + r_g_through * h_mask, g, norm, share, state, r_state, inverse, ratio)
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    r_c, r_u = r_cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    r_gate, slope = gate * (1 - gate) * r_c, 1 - tanh * tanh
    r_opened = r_dz * gate + dz * r_gate
    r_dc.copy_((r_opened * (1 - gate) - dz * gate * r_gate) * (tanh - h) + dz * gate * (1 - gate) * (slope * r_u - r_h))
    r_du.copy_((r_opened - 2 * dz * gate * tanh * r_u) * slope)
    r_direct.copy_(r_dz - r_opened)
