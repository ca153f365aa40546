"""The recurrence of reference.py, fast: same signatures, same values, same gradients.

Back-propagation through time is written out by hand and run as one autograd function over the whole sequence:
products straight into their place, everything between two products in one compiled pass (cell_kernels.py), and no
gradient of a weight that nobody asked for. The relaxed cell has the one second derivative that an architecture step
asks for too, of the probabilities and along the weights (second_derivative.py); for any other take the definition,
reference.py.

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives. `accum_dtype` is the dtype of sums and
normalisation (float32, or float64), `compute_dtype` that of products and of what is saved for backward. Inside Relaxed
and Discrete, in cell_kernels.py and second_derivative.py, H includes the padding (`prepare`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.autograd import forbid_double_backward, graph_task_id, unformed_grad
from engine.cell_kernels import (
    GradAccumulators,
    SavedBackward,
    SavedForward,
    before_node,
    by_node,
    discrete_node,
    discrete_node_back,
    discrete_start_back,
    flat_rows,
    halves,
    held_set,
    of_nodes,
    output,
    output_back,
    relaxed_node,
    relaxed_node_back,
    relaxed_start,
    relaxed_start_back,
    unit_share,
)
from engine.dropout import FrozenReLU, drop
from engine.matmul import ALIGNMENT, Workspace, addmm_, matmul, padding
from engine.second_derivative import r_backward, r_forward


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
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.relaxed`, (T, B, H); `compute_dtype` is the dtype of products, by default that of h0."""
    H, compute_dtype, keep = h0.size(-1), compute_dtype or h0.dtype, wants_gradient(x, h0, W0, *Ws, probs)
    # Whatever the products gain: the kernels are quicker for it in any dtype.
    xW, h0, W0_h, h_mask, Ws = prepare(x, h0, W0, Ws, x_mask, h_mask, compute_dtype, -H % ALIGNMENT)
    share = unit_share(H, h0) if norm == "layer" else None
    return Relaxed.apply(keep, held_relu, norm, share, xW, h0, W0_h, probs, h_mask, *Ws)[..., :H]


def discrete(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    recurrent: Sequence[tuple[str, int]],
    concat: Sequence[int],
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.discrete`, (T, B, H); `compute_dtype` is the dtype of products, by default that of h0."""
    H, compute_dtype, keep = h0.size(-1), compute_dtype or h0.dtype, wants_gradient(x, h0, W0, *Ws)
    # On a CPU the few rows of an evaluation do not make up for filling up the weights.
    more = padding(h0, compute_dtype) if keep or h0.is_cuda else 0
    xW, h0, W0_h, h_mask, Ws = prepare(x, h0, W0, Ws, x_mask, h_mask, compute_dtype, more)
    return Discrete.apply(keep, tuple(recurrent), tuple(concat), xW, h0, W0_h, h_mask, *Ws)[..., :H]


def wants_gradient(*inputs: Tensor) -> bool:
    """Whether autograd will ask for one of any of them."""
    return torch.is_grad_enabled() and any(i.requires_grad for i in inputs)


def prepare(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    x_mask: Tensor | None,
    h_mask: Tensor | None,
    compute_dtype: torch.dtype,
    more: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """The input's half of `[c0, h0]` (T, B, 2H), the hidden state, its half of W0, its mask, and Ws, with H wider by
    `more`: the hidden units that are added have no weights but 0, nor are they seen by anyone."""
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
    """The relaxed cell. The product of node i holds `[c_j, u_j]` of each of its predecessors, (i, B, 2H)."""

    @staticmethod
    def forward(ctx, keep, held_relu, norm, share, xW, h0, W0_h, probs, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        kept = T if keep else 1  # steps that are remembered
        states = space.take(kept, N + 1, B, H)  # s_0 .. s_N
        masked = space.take(kept, N + 1, B, H)
        products = [space.take(kept, max(i, 1), B, 2 * H) for i in range(N + 1)]
        previous = space.take(T + 1, B, H)  # the hidden state before each step, masked
        inverse = h0.new_empty(kept, N + 1, *((B, 1) if norm == "layer" else (H,)))  # 1 / standard deviation
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        rows = of_nodes(probs)  # N times (i, K)

        state, mask, scale = (by_node(buffer) for buffer in (states, masked, inverse))  # [i][t]
        predecessors, matmul_inputs = before_node(states), [flat_rows(masked[:, :i]) for i in range(N + 1)]
        preactivations, rows_of_cu = [cu.unbind(0) for cu in products], [flat_rows(cu) for cu in products]
        nodes, xWs, hs, concat = states.unbind(0), xW.unbind(0), hiddens.unbind(0), tuple(range(1, N + 1))

        h = h0
        previous[0] = h0 * h_mask
        previous_t = previous.unbind(0)
        for t in range(T):
            k = t if keep else 0
            torch.addmm(xWs[t], previous_t[t], weights[0], out=rows_of_cu[0][k])
            relaxed_start(rows_of_cu[0][k], h, norm, share, h_mask, state[0][k], mask[0][k], scale[0][k])
            for i in range(1, N + 1):
                cu = preactivations[i][k]  # (i, B, 2H)
                matmul(matmul_inputs[i][k], weights[i], out=rows_of_cu[i][k])
                active = held_set(cu, held_relu, (t, i))
                relaxed_node(
                    cu,
                    predecessors[i][k],
                    rows[i - 1],
                    active,
                    norm,
                    share,
                    h_mask,
                    state[i][k],
                    mask[i][k],
                    scale[i][k],
                )
            h = hs[t]
            output(nodes[k], concat, h_mask, h, previous_t[t + 1])

        if keep:
            ctx.trace = SavedForward(space, states, masked, products, previous, inverse, held_relu, norm, share)
            ctx.tangents = {}  # by the call of autograd that left them
            ctx.save_for_backward(h0, probs, h_mask, hiddens, W0_h, *Ws)
        return hiddens

    @staticmethod
    def backward(ctx, g_hiddens):
        h0, probs, h_mask, hiddens, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            dxW, dh0, dprobs, *dWs = RelaxedBack.apply(ctx, g_hiddens, hiddens)
        elif (call := graph_task_id()) in ctx.tangents:
            backward_pass, tangents = ctx.tangents.pop(call)
            dxW, dh0, dprobs = r_backward(
                ctx.trace, backward_pass, tangents, h0, hiddens, weights, probs, h_mask, g_hiddens
            )
            dWs = [unformed_grad(weights[0]), *(None for _ in weights[1:])]  # W0 has another share, of xW
        else:
            (dxW, dh0, dprobs, *dWs), _ = Relaxed.backward_pass(ctx, g_hiddens)
        return None, None, None, None, dxW, dh0, dWs[0], dprobs, None, *dWs[1:]

    @staticmethod
    def backward_pass(ctx, g_hiddens: Tensor, keep: bool = False) -> tuple[tuple[Tensor | None, ...], SavedBackward]:
        """Gradients of xW, h0, probs, W0_h and Ws, and what of the way is remembered if it is to be differentiated."""
        space, states, masked, products, previous, inverse, held_relu, norm, share = ctx.trace
        h0, probs, h_mask, hiddens, W0_h, *Ws = ctx.saved_tensors
        T, B, H = hiddens.shape
        N = len(Ws)
        of_weights = ctx.needs_input_grad[6] or any(ctx.needs_input_grad[9:])
        rows = of_nodes(probs)  # N times (i, K)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        dxW = space.take(T, B, 2 * H)
        received = space.take(T if keep else 1, N + 1, B, H)  # gradients of the states
        # On CUDA a weight's gradient is one product over all steps, after them; a CPU forms it step by step,
        # while the factors are in its cache (benchmarks/NOTES.md).
        at_once = of_weights and sum_after_loop(h0)
        dcs = [space.take(T if at_once else 1, 2, i, B, H) for i in range(1, N + 1)]
        dWs = [torch.zeros_like(W, dtype=space.accum_dtype) for W in Ws] if of_weights else []
        w = GradAccumulators(space, N, B, H)

        state, scale, predecessors, mine = by_node(states), by_node(inverse), before_node(states), by_node(received)
        preactivations = [cu.unbind(0) for cu in products]
        matmul_inputs = [masked[:, :i].flatten(1, 2).mT.unbind(0) for i in range(N + 1)]  # (H, iB) each
        gradient = [[(dc, du, dc.flatten(0, 1), du.flatten(0, 1)) for dc, du in d] for d in dcs]
        transposed = [tuple(half.t() for half in halves(W)) for W in weights]
        halves_of_dW = [halves(dW) for dW in dWs]
        W0_t, gs, hs, dxWs, dcs_0 = weights[0].t(), g_hiddens.unbind(0), (h0, *hiddens), dxW.unbind(0), halves(dxW)

        for t in reversed(range(T)):
            here, there = 0, 1  # which of totals
            w.begin_step(gs[t], h_mask)
            for i in range(N, 0, -1):
                cu, (dc, du, dc_rows, du_rows) = preactivations[i][t], gradient[i - 1][t if at_once else 0]
                active = held_set(cu, held_relu, (t, i))
                relaxed_node_back(
                    w.each[here][i], w.rest[i], state[i][t], scale[i][t], w.share[here][i], w.rest_of[i],
                    predecessors[i][t], cu, rows[i - 1], active, norm, share, h_mask, mine[i][t if keep else 0], dc, du,
                    w.share[there][i], *w.sums[i - 1],
                )  # fmt: skip
                here, there = there, here
                matmul(dc_rows, transposed[i][0], out=w.rows_of_rest[i])
                w.rows_of_rest[i].addmm_(du_rows, transposed[i][1])
                if of_weights and not at_once:
                    for dW, d in zip(halves_of_dW[i - 1], (dc_rows, du_rows), strict=True):
                        addmm_(dW, matmul_inputs[i][t], d)
            relaxed_start_back(
                w.each[here][0], w.rest[0], state[0][t], scale[0][t], preactivations[0][t][0], norm, share, h_mask,
                hs[t], mine[0][t if keep else 0], dcs_0[0][t], dcs_0[1][t], w.grad_h_direct,
            )  # fmt: skip
            matmul(dxWs[t], W0_t, out=w.grad_h_matmul)

        dW0_h = None
        if of_weights:
            dW0_h = (previous[:T].flatten(0, 1).t() @ dxW.flatten(0, 1)).to(space.accum_dtype)
            if at_once:
                for i, dW in enumerate(dWs, 1):
                    s = masked[:, :i].flatten(1, 2).mT  # (T, H, iB)
                    for half, d in zip(halves(dW), dcs[i - 1].unbind(1), strict=True):
                        half.copy_((s @ d.flatten(1, 2)).sum(0, dtype=space.accum_dtype))
        of_xW = (dxW.clone() if keep else dxW) if ctx.needs_input_grad[4] else None  # which autograd makes its own
        found = of_xW, w.grad_h0(h_mask), w.grad_probs(), dW0_h, *(dWs or [None] * N)
        return found, SavedBackward(received, dxW)


class RelaxedBack(torch.autograd.Function):
    """The way back through the relaxed cell, where it is to be differentiated itself.

    Back from here, along directions in which xW, h0 and the weights go: first the tangents of all states, which give
    that of the hidden states. Then the tangent of the way back; it needs to know how g_hiddens changes with the
    hidden states, which autograd has yet to find out. So it is left to the call of `Relaxed.backward` that follows.
    """

    @staticmethod
    def forward(ctx, relaxed, g_hiddens, hiddens):
        ctx.set_materialize_grads(False)
        ctx.relaxed = relaxed  # which autograd keeps alive, since `hiddens` came from there
        found, ctx.backward_pass = Relaxed.backward_pass(relaxed, g_hiddens, keep=True)
        return found

    @staticmethod
    def backward(ctx, vxW, vh0, vprobs, *direction):
        forbid_double_backward("third")
        if vprobs is not None:
            raise RuntimeError("the fused engine has no second derivative along the alphas; use the eager engine")
        relaxed = ctx.relaxed
        h0, probs, h_mask, hiddens, *weights = relaxed.saved_tensors
        direction = [torch.zeros_like(W) if v is None else v for v, W in zip(direction, weights, strict=True)]
        if (call := graph_task_id()) in relaxed.tangents:
            raise RuntimeError("the fused engine differentiates one gradient of a pass at a time")
        tangents, r_hiddens = r_forward(relaxed.trace, h0, hiddens, weights, probs, h_mask, vxW, vh0, direction)
        relaxed.tangents[call] = ctx.backward_pass, tangents
        return None, r_hiddens, torch.zeros_like(hiddens)  # zeros, so that `Relaxed.backward` is called in any case


class Discrete(torch.autograd.Function):
    """The cell of one genotype. Time stands inside the nodes, so that a weight's gradient is one product."""

    @staticmethod
    def forward(ctx, keep, recurrent, concat, xW, h0, W0_h, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        kept = T if keep else 1
        states = space.take(N + 1, kept, B, H)
        masked = space.take(N + 1, kept, B, H)
        products = space.take(N + 1, kept, B, 2 * H)
        previous = space.take(T + 1, B, H)  # the hidden state before each step, masked
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]

        state, mask, cu = ([node.unbind(0) for node in buffer] for buffer in (states, masked, products))  # [i][t]
        nodes, xWs, hs = states.unbind(1), xW.unbind(0), hiddens.unbind(0)

        h = h0
        previous[0] = h0 * h_mask
        previous_t = previous.unbind(0)
        for t in range(T):
            k = t if keep else 0
            torch.addmm(xWs[t], previous_t[t], weights[0], out=cu[0][k])
            discrete_node("tanh", cu[0][k], h, h_mask, state[0][k], mask[0][k])
            for i, (name, j) in enumerate(recurrent, 1):
                matmul(mask[j][k], weights[i], out=cu[i][k])
                discrete_node(name, cu[i][k], state[j][k], h_mask, state[i][k], mask[i][k])
            h = hs[t]
            output(nodes[k], concat, h_mask, h, previous_t[t + 1])

        if keep:
            ctx.space, ctx.cell = space, (recurrent, concat)
            ctx.buffers = states, masked, products, previous
            ctx.save_for_backward(h0, W0_h, h_mask, *Ws)
            ctx.hiddens = hiddens.detach()
        return hiddens

    @staticmethod
    def backward(ctx, g_hiddens):
        forbid_double_backward("second")
        states, masked, products, previous = ctx.buffers
        h0, W0_h, h_mask, *Ws = ctx.saved_tensors
        space, hiddens, (recurrent, concat) = ctx.space, ctx.hiddens, ctx.cell
        T, B, H = hiddens.shape
        N = len(Ws)
        of_weights = ctx.needs_input_grad[5] or any(ctx.needs_input_grad[7:])
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        gradients = space.take(N + 1, T, B, 2 * H)  # of the products
        total = space.take(N + 1, B, H, accumulator=True)  # of the states
        grad_h_direct = space.take(B, H, accumulator=True)
        grad_h_matmul = space.take(B, H)
        state, cu, gradient, dc, du = (
            [node.unbind(0) for node in buffer] for buffer in (states, products, gradients, *halves(gradients))
        )  # [i][t]
        transposed, share = [W.t() for W in weights], total.unbind(0)
        gs, hs, backwards = g_hiddens.unbind(0), (h0, *hiddens), list(enumerate(recurrent, 1))[::-1]

        grad_h_direct.zero_()
        grad_h_matmul.zero_()
        for t in reversed(range(T)):
            output_back(gs[t], grad_h_direct, grad_h_matmul, h_mask, concat, total)
            for i, (name, j) in backwards:
                discrete_node_back(name, share[i], cu[i][t], state[j][t], dc[i][t], du[i][t], share[j])
                matmul(gradient[i][t], transposed[i], out=grad_h_matmul)
                share[j].addcmul_(grad_h_matmul.to(space.accum_dtype), h_mask)
            discrete_start_back(share[0], cu[0][t], hs[t], dc[0][t], du[0][t], grad_h_direct)
            matmul(gradient[0][t], transposed[0], out=grad_h_matmul)

        dh0 = grad_h_direct + grad_h_matmul * h_mask
        factors = [previous[:T]] + [masked[j] for _, j in recurrent]  # N+1 times (T, B, H)
        dWs = [None] * (N + 1)
        if of_weights:
            dWs = [
                (matmul_inputs.flatten(0, 1).t() @ gradient.flatten(0, 1)).to(space.accum_dtype)
                for matmul_inputs, gradient in zip(factors, gradients, strict=True)
            ]
        dxW = gradients[0].clone() if ctx.needs_input_grad[3] else None
        return None, None, None, dxW, dh0, dWs[0], None, *dWs[1:]


def sum_after_loop(h: Tensor) -> bool:
    """Also for a small cell (B, H), where a call costs more than its product."""
    return h.device.type == "cuda" or h.numel() < 1 << 14
