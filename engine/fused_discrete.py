"""The recurrence of a discrete cell as one autograd function, with its backward pass written by hand.

`fused.discrete` prepares its arguments. The equations are in docs/engine.md, the shapes those of fused.py.
"""

import torch

from engine.autograd import forbid_double_backward
from engine.cell_kernels import discrete_node, discrete_node_back, discrete_start_back, output, output_back
from engine.matmul import Workspace, matmul


class Discrete(torch.autograd.Function):
    """Runs the cell of one genotype over a sequence as one autograd function.

    The buffers have the axis of nodes before that of time steps, so that the gradient of a weight is one product.
    `needs_grad` tells whether to save what the backward pass needs.
    """

    @staticmethod
    def forward(ctx, needs_grad, recurrent, concat, xW, h0, W0_h, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        saved_steps = T if needs_grad else 1
        states = space.take(N + 1, saved_steps, B, H)
        masked = space.take(N + 1, saved_steps, B, H)
        products = space.take(N + 1, saved_steps, B, 2 * H)
        previous = space.take(T + 1, B, H)  # the hidden state before each step, masked
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]

        state, masked_states, cu = (
            [node.unbind(0) for node in buffer] for buffer in (states, masked, products)
        )  # [i][t]
        nodes, xWs, hs = states.unbind(1), xW.unbind(0), hiddens.unbind(0)

        h = h0
        previous[0] = h0 * h_mask
        previous_t = previous.unbind(0)
        for t in range(T):
            k = t if needs_grad else 0
            torch.addmm(xWs[t], previous_t[t], weights[0], out=cu[0][k])
            discrete_node("tanh", cu[0][k], h, h_mask, state[0][k], masked_states[0][k])
            for i, (name, j) in enumerate(recurrent, 1):
                matmul(masked_states[j][k], weights[i], out=cu[i][k])
                discrete_node(name, cu[i][k], state[j][k], h_mask, state[i][k], masked_states[i][k])
            h = hs[t]
            output(nodes[k], concat, h_mask, h, previous_t[t + 1])

        if needs_grad:
            ctx.space, ctx.cell = space, (recurrent, concat)
            ctx.buffers = states, masked, products, previous
            ctx.save_for_backward(h0, W0_h, h_mask, *Ws)
            ctx.hiddens = hiddens.detach()
        return hiddens

    @staticmethod
    def backward(ctx, g_hiddens):
        forbid_double_backward("the fused engine has no second derivative here; use the eager engine")
        states, masked, products, previous = ctx.buffers
        h0, W0_h, h_mask, *Ws = ctx.saved_tensors
        space, hiddens, (recurrent, concat) = ctx.space, ctx.hiddens, ctx.cell
        T, B, H = hiddens.shape
        N = len(Ws)
        needs_weight_grads = ctx.needs_input_grad[5] or any(ctx.needs_input_grad[7:])
        weights = [W.to(space.compute_dtype) for W in (W0_h, *Ws)]
        gradients = space.take(N + 1, T, B, 2 * H)  # gradients of the products
        total = space.take(N + 1, B, H, accumulator=True)  # gradients of the states
        grad_h_direct = space.take(B, H, accumulator=True)
        grad_h_matmul = space.take(B, H)
        state, cu, gradient, dc, du = (
            [node.unbind(0) for node in buffer] for buffer in (states, products, gradients, *gradients.chunk(2, -1))
        )  # [i][t]
        transposed, grads = [W.t() for W in weights], total.unbind(0)
        gs, hs, backwards = g_hiddens.unbind(0), (h0, *hiddens), list(enumerate(recurrent, 1))[::-1]

        grad_h_direct.zero_()
        grad_h_matmul.zero_()
        for t in reversed(range(T)):
            output_back(gs[t], grad_h_direct, grad_h_matmul, h_mask, concat, total)
            for i, (name, j) in backwards:
                discrete_node_back(name, grads[i], cu[i][t], state[j][t], dc[i][t], du[i][t], grads[j])
                matmul(gradient[i][t], transposed[i], out=grad_h_matmul)
                grads[j].addcmul_(grad_h_matmul.to(space.accum_dtype), h_mask)
            discrete_start_back(grads[0], cu[0][t], hs[t], dc[0][t], du[0][t], grad_h_direct)
            matmul(gradient[0][t], transposed[0], out=grad_h_matmul)

        dh0 = grad_h_direct + grad_h_matmul * h_mask
        matmul_inputs = [previous[:T]] + [masked[j] for _, j in recurrent]  # N+1 times (T, B, H)
        dWs = [None] * (N + 1)
        if needs_weight_grads:
            dWs = [
                (s.flatten(0, 1).t() @ d.flatten(0, 1)).to(space.accum_dtype)
                for s, d in zip(matmul_inputs, gradients, strict=True)
            ]
        dxW = gradients[0].clone() if ctx.needs_input_grad[3] else None
        return None, None, None, dxW, dh0, dWs[0], None, *dWs[1:]
