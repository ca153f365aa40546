"""Computes the recurrence of reference.py fast, with the same values and gradients.

`relaxed` and `discrete` take the arguments of their definitions there, and `compute_dtype`. Back-propagation through
time is written out by hand and runs as one autograd function over the whole sequence. Each matrix product is written
straight into its place, between two products runs one compiled kernel, or two where a time step ends
(cell_kernels.py), and the gradients of the weights are computed only if they are needed. The relaxed cell also has the
one second derivative that an architecture step needs, the change of the gradient of the probabilities as the weights
move (second_derivative.py). For any other second derivative use the definition, reference.py.

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives. `accum_dtype` is the dtype of sums and
normalisation (float32, or float64), `compute_dtype` that of products and of what is saved for backward. Inside Relaxed
and Discrete, in cell_kernels.py and second_derivative.py, H includes the padding (`prepare`). The equations (F1) to
(F6) and (B1) to (B7) are in docs/engine.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.autograd import forbid_double_backward, graph_task_id, unformed_grad
from engine.cell_kernels import output, relaxed_node, relaxed_node_back, relaxed_start, relaxed_start_back
from engine.dropout import FrozenReLU, drop
from engine.fused_discrete import Discrete
from engine.matmul import ALIGNMENT, Workspace, addmm_, matmul, padding
from engine.relaxed_buffers import (
    Constants,
    GradAccumulators,
    SavedBackward,
    SavedForward,
    by_node,
    flat_rows,
    frozen_active_set,
    new_products,
    nodes_and_edges,
    split_by_node,
    unit_weights,
)
from engine.second_derivative import r_backward, r_forward

# A CPU needs longer to call a product of bf16 than to compute one of fewer multiplications than this in fp32
# (benchmarks/NOTES.md).
ROUND_FROM = 1 << 19
SMALL_STATE = 1 << 14  # A cell is small if its hidden state has fewer elements than this (benchmarks/NOTES.md).


def relaxed(
    x: Tensor, h0: Tensor, W0: Tensor, Ws: Sequence[Tensor], probs: Tensor, x_mask: Tensor | None = None,
    h_mask: Tensor | None = None, frozen_relu: FrozenReLU | None = None, norm: str = "batch",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Returns the hidden states (T, B, H) of the continuous relaxation, as defined by `reference.relaxed` (F1 to F6).

    The shapes are x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N times (H, 2H), probs (N(N+1)/2, K), x_mask (B, E) and
    h_mask (B, H). `compute_dtype` is the dtype of products, by default that of h0. A second derivative along the alphas
    and any third derivative raise RuntimeError.
    """
    H, compute_dtype, needs_grad = h0.size(-1), compute_dtype or h0.dtype, wants_gradient(x, h0, W0, *Ws, probs)
    # H is padded even where the products gain nothing by it, since the kernels are faster with it in any dtype.
    xW, h0, W0_h, h_mask, Ws = prepare(x, h0, W0, Ws, x_mask, h_mask, compute_dtype, -H % ALIGNMENT)
    weights_of_units = unit_weights(H, h0) if norm == "layer" else None
    return Relaxed.apply(needs_grad, frozen_relu, norm, weights_of_units, xW, h0, W0_h, probs, h_mask, *Ws)[..., :H]


def discrete(
    x: Tensor, h0: Tensor, W0: Tensor, Ws: Sequence[Tensor], recurrent: Sequence[tuple[str, int]],
    concat: Sequence[int], x_mask: Tensor | None = None, h_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Returns the hidden states (T, B, H) of the cell of one genotype, as defined by `reference.discrete`.

    The shapes are x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N times (H, 2H), x_mask (B, E) and h_mask (B, H).
    `compute_dtype` is the dtype of products, by default that of h0, as it always is for small products on a CPU. A
    second derivative raises RuntimeError.
    """
    H, needs_grad = h0.size(-1), wants_gradient(x, h0, W0, *Ws)
    small = h0.device.type == "cpu" and 2 * h0.numel() * H < ROUND_FROM
    compute_dtype = h0.dtype if small else compute_dtype or h0.dtype
    # In an evaluation on a CPU, the products have too few rows to make up for the time that padding the weights takes.
    more = padding(h0, compute_dtype) if needs_grad or h0.is_cuda else 0
    xW, h0, W0_h, h_mask, Ws = prepare(x, h0, W0, Ws, x_mask, h_mask, compute_dtype, more)
    return Discrete.apply(needs_grad, tuple(recurrent), tuple(concat), xW, h0, W0_h, h_mask, *Ws)[..., :H]


def wants_gradient(*inputs: Tensor) -> bool:
    """Returns whether autograd will ask for the gradient of any of the inputs."""
    return torch.is_grad_enabled() and any(i.requires_grad for i in inputs)


def prepare(
    x: Tensor, h0: Tensor, W0: Tensor, Ws: Sequence[Tensor], x_mask: Tensor | None, h_mask: Tensor | None,
    compute_dtype: torch.dtype, more: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]:  # fmt: skip
    """Returns xW, h0, W0_h, h_mask and Ws, with H padded by `more` hidden units.

    xW (T, B, 2H), in `compute_dtype`, is the input's term of the preactivations [c_0, u_0] (F1), and W0_h (H, 2H) the
    part of W0 that multiplies the hidden state. A mask h_mask (B, H) that is None becomes ones. All weights of the
    added hidden units are 0, and the callers cut these units off again.
    """
    E = x.size(-1)
    h_mask = torch.ones_like(h0) if h_mask is None else h_mask
    W0_x, W0_h = W0[:E], W0[E:]
    if more:
        h0, h_mask = F.pad(h0, (0, more)), F.pad(h_mask, (0, more))
        W0_x, W0_h, *Ws = [
            F.pad(W.unflatten(1, (2, -1)), (0, more, 0, 0, 0, rows)).flatten(1)
            for W, rows in ((W0_x, 0), (W0_h, more), *((W, more) for W in Ws))
        ]
    return drop(x, x_mask).to(compute_dtype) @ W0_x.to(compute_dtype), h0, W0_h, h_mask, Ws


class Relaxed(torch.autograd.Function):
    """Runs the relaxed cell over a sequence as one autograd function (F1 to F6, B1 to B7).

    The product of node i holds the preactivations [c_j, u_j] of each of its predecessors j, (i, B, 2H). `needs_grad`
    tells whether to save what the backward pass needs.
    """

    @staticmethod
    def forward(ctx, needs_grad, frozen_relu, norm, unit_weights, xW, h0, W0_h, probs, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        saved_steps = T if needs_grad else 1  # Without a backward pass, each time step overwrites the one before.
        states = space.take(saved_steps, N + 1, B, H)  # s_0 .. s_N
        masked = space.take(saved_steps, N + 1, B, H)
        products, cu_rows = new_products(space, saved_steps, N, B, H)
        previous = space.take(T + 1, B, H)  # the hidden state before each step, masked
        inv_std = h0.new_empty(saved_steps, N + 1, *((B, 1) if norm == "layer" else (H,)))  # 1 / standard deviation
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        node_probs, constants = split_by_node(probs), Constants(norm, unit_weights, h_mask)  # N times (i, K)

        nodes, edges = nodes_and_edges(states, masked, inv_std, products)
        matmul_inputs = [flat_rows(masked[:, :i]) for i in range(N + 1)]
        states_t, xWs, hs, concat = states.unbind(0), xW.unbind(0), hiddens.unbind(0), tuple(range(1, N + 1))

        h = h0
        previous[0] = h0 * h_mask
        previous_t = previous.unbind(0)
        for t in range(T):
            k = t if needs_grad else 0
            torch.addmm(xWs[t], previous_t[t], weights[0], out=cu_rows[0][k])
            relaxed_start(edges[0][k].cu, h, constants, nodes[0][k])
            for i in range(1, N + 1):
                matmul(matmul_inputs[i][k], weights[i], out=cu_rows[i][k])
                active = frozen_active_set(edges[i][k].cu, frozen_relu, (t, i))
                relaxed_node(edges[i][k], node_probs[i - 1], active, constants, nodes[i][k])
            h = hs[t]
            output(states_t[k], concat, h_mask, h, previous_t[t + 1])

        if needs_grad:
            ctx.saved = SavedForward(space, nodes, edges, masked, previous, frozen_relu, constants)
            ctx.tangents = {}  # from `RelaxedBack.backward`, by `graph_task_id`
            ctx.save_for_backward(h0, probs, hiddens, W0_h, *Ws)
        return hiddens

    @staticmethod
    def backward(ctx, g_hiddens):
        h0, probs, hiddens, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            dxW, dh0, dprobs, *dWs = RelaxedBack.apply(ctx, g_hiddens, hiddens)
        elif (call := graph_task_id()) in ctx.tangents:
            backward_pass, tangents = ctx.tangents.pop(call)
            dxW, dh0, dprobs = r_backward(ctx.saved, backward_pass, tangents, h0, hiddens, weights, probs, g_hiddens)
            dWs = [unformed_grad(W) for W in weights]
        else:
            (dxW, dh0, dprobs, *dWs), _ = Relaxed.backward_pass(ctx, g_hiddens)
        return None, None, None, None, dxW, dh0, dWs[0], dprobs, None, *dWs[1:]

    @staticmethod
    def backward_pass(ctx, g_hiddens: Tensor, save: bool = False) -> tuple[tuple[Tensor | None, ...], SavedBackward]:
        """Returns the gradients of xW, h0, probs, W0_h and Ws, and what `r_backward` needs of this pass (B1 to B7).

        g_hiddens (T, B, H) is the gradient of the hidden states. The gradients of xW and of the weights are None if
        autograd does not need them. `save` tells whether to save the gradients of the states of every time step, so
        that the pass can be differentiated.
        """
        space, nodes, edges, masked, previous, frozen_relu, constants = ctx.saved
        h0, probs, hiddens, W0_h, *Ws = ctx.saved_tensors
        T, B, H = hiddens.shape
        N = len(Ws)
        needs_weight_grads = ctx.needs_input_grad[6] or any(ctx.needs_input_grad[9:])
        node_probs = split_by_node(probs)  # N times (i, K)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        dxW = space.take(T, B, 2 * H)
        state_grads = space.take(T if save else 1, N + 1, B, H)  # gradients of the states
        # On CUDA the gradient of a weight is one product over all time steps, after the loop. A CPU forms it step by
        # step, unless the cell is small, while the factors are in its cache (benchmarks/NOTES.md).
        after_loop = needs_weight_grads and sum_after_loop(h0)
        dcus = [space.take(T if after_loop else 1, 2, i, B, H) for i in range(1, N + 1)]  # dc and du of each node
        dWs = [torch.zeros_like(W, dtype=space.accum_dtype) for W in Ws] if needs_weight_grads else []
        acc = GradAccumulators(space, N, B, H)

        grads = by_node(state_grads)
        matmul_inputs = [masked[:, :i].flatten(1, 2).mT.unbind(0) for i in range(N + 1)]  # (H, iB) each
        dcu_views = [[d.unbind(0) for d in dcu] for dcu in dcus]  # [i - 1][t], (i, B, H) each
        dcu_rows = [[d.flatten(1, 2).unbind(0) for d in dcu] for dcu in dcus]  # [i - 1][t], (iB, H) each
        transposed = [tuple(half.t() for half in W.chunk(2, -1)) for W in weights]
        halves_of_dW = [dW.chunk(2, -1) for dW in dWs]
        W0_t, gs, hs, dxWs, dcs_0 = weights[0].t(), g_hiddens.unbind(0), (h0, *hiddens), dxW.unbind(0), dxW.chunk(2, -1)

        for t in reversed(range(T)):
            this, other = 0, 1  # Each node reads one of the two `totals` and writes the other.
            acc.begin_step(gs[t], constants.h_mask)
            for i in range(N, 0, -1):
                k = t if after_loop else 0
                dc_rows, du_rows = dcu_rows[i - 1][k]
                active = frozen_active_set(edges[i][t].cu, frozen_relu, (t, i))
                relaxed_node_back(
                    acc.node_grads[this][i], nodes[i][t], edges[i][t], node_probs[i - 1], active, constants,
                    acc.predecessor_grads[this][i], acc.sums[i - 1], grads[i][t if save else 0], dcu_views[i - 1][k],
                    acc.predecessor_grads[other][i].direct,
                )  # fmt: skip
                this, other = other, this
                matmul(dc_rows, transposed[i][0], out=acc.rows_via_matmul[i])
                acc.rows_via_matmul[i].addmm_(du_rows, transposed[i][1])
                if needs_weight_grads and not after_loop:
                    for dW, d in zip(halves_of_dW[i - 1], (dc_rows, du_rows), strict=True):
                        addmm_(dW, matmul_inputs[i][t], d)
            relaxed_start_back(
                acc.node_grads[this][0], nodes[0][t], edges[0][t].cu, hs[t], constants, grads[0][t if save else 0],
                dcs_0[0][t], dcs_0[1][t], acc.grad_h_direct,
            )  # fmt: skip
            matmul(dxWs[t], W0_t, out=acc.grad_h_matmul)

        dW0_h = None
        if needs_weight_grads:
            dW0_h = (previous[:T].flatten(0, 1).t() @ dxW.flatten(0, 1)).to(space.accum_dtype)
            if after_loop:
                for i, dW in enumerate(dWs, 1):
                    s = masked[:, :i].flatten(1, 2).mT  # (T, H, iB)
                    for half, d in zip(dW.chunk(2, -1), dcus[i - 1].unbind(1), strict=True):
                        half.copy_((s @ d.flatten(1, 2)).sum(0, dtype=space.accum_dtype))
        # Autograd may take over the tensor that it is given, and a saved one must not change.
        grad_xW = (dxW.clone() if save else dxW) if ctx.needs_input_grad[4] else None
        gradients = grad_xW, acc.grad_h0(constants.h_mask), acc.grad_probs(), dW0_h, *(dWs or [None] * N)
        return gradients, SavedBackward(state_grads, dxW)


class RelaxedBack(torch.autograd.Function):
    """Runs the backward pass of the relaxed cell where it is to be differentiated itself.

    `backward` receives the directions in which xW, h0 and the weights move. It computes the tangents of all states,
    which give those of the hidden states. The tangent of the backward pass also depends on how g_hiddens changes with
    the hidden states, which autograd has not computed yet, so the call of `Relaxed.backward` that follows computes it.

    `backward` raises RuntimeError for a third derivative, for a direction of the probabilities, and if a second
    gradient of the same forward pass is to be differentiated in one call of autograd.
    """

    @staticmethod
    def forward(ctx, relaxed, g_hiddens, hiddens):
        ctx.set_materialize_grads(False)
        ctx.relaxed = relaxed  # Autograd keeps it alive, since `hiddens` came from there.
        gradients, ctx.backward_pass = Relaxed.backward_pass(relaxed, g_hiddens, save=True)
        return gradients

    @staticmethod
    def backward(ctx, vxW, vh0, vprobs, *direction):
        forbid_double_backward("the fused engine has no third derivative here; use the eager engine")
        if vprobs is not None:
            raise RuntimeError("the fused engine has no second derivative along the alphas; use the eager engine")
        relaxed = ctx.relaxed
        h0, probs, hiddens, *weights = relaxed.saved_tensors
        direction = [torch.zeros_like(W) if v is None else v for v, W in zip(direction, weights, strict=True)]
        if (call := graph_task_id()) in relaxed.tangents:
            raise RuntimeError("the fused engine differentiates one gradient of a pass at a time")
        tangents, r_hiddens = r_forward(relaxed.saved, h0, hiddens, weights, probs, vxW, vh0, direction)
        relaxed.tangents[call] = ctx.backward_pass, tangents
        return None, r_hiddens, torch.zeros_like(hiddens)  # Zeros make autograd call `Relaxed.backward` in any case.


def sum_after_loop(h: Tensor) -> bool:
    """Returns whether to form the gradient of a node's weight after the loop, by a batched product over all time steps.

    That is so on CUDA, and on a CPU for a cell with a small hidden state h (B, H), where calling a product costs more
    than the product itself.
    """
    return h.device.type == "cuda" or h.numel() < SMALL_STATE
