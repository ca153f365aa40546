"""The recurrence of recurrence.py, fast: same signatures, same values, one derivative.

Back-propagation through time is written out by hand and run as one autograd function over the whole sequence:
products straight into their place, everything between two products in one compiled pass, and no gradient of a
weight that nobody asked for. For a second derivative take the definition, recurrence.py.

Shapes: T time steps, B batch, E embedding, H hidden, N nodes, K primitives. `wide` is the dtype of sums and
normalisation (float32, or float64), `store` that of products and of what is kept for the way back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dropout import HeldRelu, drop
from kernels import Pool, add_product, first_derivative_only, kernel, product, realised, sigmoid, sigmoid_tanh
from recurrence import BN_EPS

POOL = Pool()


def relaxed(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    probs: Tensor,
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
    held_relu: HeldRelu | None = None,
    store: torch.dtype | None = None,
) -> Tensor:
    """As `recurrence.relaxed`, (T, B, H); `store` is the dtype of products, by default that of h0."""
    xW, W0_h, h_mask, keep = prepare(x, h0, W0, x_mask, h_mask, store, (x, h0, W0, *Ws, probs))
    return Relaxed.apply(keep, held_relu, xW, h0, W0_h, probs, h_mask, *Ws)


def discrete(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    Ws: Sequence[Tensor],
    recurrent: Sequence[tuple[str, int]],
    concat: Sequence[int],
    x_mask: Tensor | None = None,
    h_mask: Tensor | None = None,
    store: torch.dtype | None = None,
) -> Tensor:
    """As `recurrence.discrete`, (T, B, H); `store` is the dtype of products, by default that of h0."""
    xW, W0_h, h_mask, keep = prepare(x, h0, W0, x_mask, h_mask, store, (x, h0, W0, *Ws))
    return Discrete.apply(keep, tuple(recurrent), tuple(concat), xW, h0, W0_h, h_mask, *Ws)


def prepare(
    x: Tensor,
    h0: Tensor,
    W0: Tensor,
    x_mask: Tensor | None,
    h_mask: Tensor | None,
    store: torch.dtype | None,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The input's half of `[c0, h0]` (T, B, 2H), the hidden state's half of W0, a mask, and whether any of the
    inputs wants a gradient."""
    store = h0.dtype if store is None else store
    xW = drop(x, x_mask).to(store) @ W0[: x.size(-1)].to(store)
    h_mask = torch.ones_like(h0) if h_mask is None else h_mask
    return xW, W0[x.size(-1) :], h_mask, torch.is_grad_enabled() and any(i.requires_grad for i in inputs)


class Workspace:
    """Buffers of one pass over a sequence, which go back to the pool when nobody holds the workspace any more."""

    def __init__(self, store: torch.dtype, wide: torch.dtype, device: torch.device):
        self.store, self.wide, self.device = store, wide, device
        self.taken: list[tuple[str, Tensor]] = []

    def take(self, name: str, *shape: int, wide: bool = False) -> Tensor:
        buffer = POOL.take(name, shape, self.wide if wide else self.store, self.device)
        self.taken.append((name, buffer))
        return buffer

    def __del__(self):
        for name, buffer in self.taken:
            POOL.give(name, buffer)


def halves(dcu: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of c and those of u, (..., H) each."""
    H = dcu.size(-1) // 2
    return dcu[..., :H], dcu[..., H:]


class Relaxed(torch.autograd.Function):
    """The relaxed cell. The product of node i holds `[c_j, u_j]` of each of its predecessors, (i, B, 2H)."""

    @staticmethod
    def forward(ctx, keep, held_relu, xW, h0, W0_h, probs, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        kept = T if keep else 1  # steps that are remembered
        states = space.take("states", kept, N + 1, B, H)  # s_0 .. s_N
        masked = space.take("masked", kept, N + 1, B, H)
        products = [space.take(f"product {i}", kept, max(i, 1), B, 2 * H) for i in range(N + 1)]
        previous = space.take("previous", T + 1, B, H)  # the hidden state before each step, masked
        inverse = h0.new_empty(kept, N + 1, H)  # 1 / standard deviation
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.store) for W in (W0_h, *Ws)]
        rows = probs.detach().split(list(range(1, N + 1)))  # N times (i, K)

        state, mask, scale = (by_node(buffer) for buffer in (states, masked, inverse))  # [i][t]
        below, factor = before_node(states), [flat_rows(masked[:, :i]) for i in range(N + 1)]
        cus, rows_of_cu = [cu.unbind(0) for cu in products], [flat_rows(cu) for cu in products]
        nodes, xWs, hs, concat = states.unbind(0), xW.unbind(0), hiddens.unbind(0), tuple(range(1, N + 1))

        h = h0
        previous[0] = h0 * h_mask
        previous_t = previous.unbind(0)
        for t in range(T):
            k = t if keep else 0
            torch.addmm(xWs[t], previous_t[t], weights[0], out=rows_of_cu[0][k])
            relaxed_start(rows_of_cu[0][k], h, h_mask, state[0][k], mask[0][k], scale[0][k])
            for i in range(1, N + 1):
                cu = cus[i][k]  # (i, B, 2H)
                product(factor[i][k], weights[i], out=rows_of_cu[i][k])
                active = held_set(cu, held_relu, (t, i))
                relaxed_node(cu, below[i][k], rows[i - 1], active, h_mask, state[i][k], mask[i][k], scale[i][k])
            h = hs[t]
            output(nodes[k], concat, h_mask, h, previous_t[t + 1])

        if keep:
            ctx.space, ctx.held_relu = space, held_relu
            ctx.buffers = states, masked, products, previous, inverse
            ctx.save_for_backward(h0, W0_h, probs, h_mask, *Ws)
            ctx.hiddens = hiddens.detach()
        return hiddens

    @staticmethod
    def backward(ctx, g_hiddens):
        first_derivative_only()
        states, masked, products, previous, inverse = ctx.buffers
        space = Workspace(ctx.space.store, ctx.space.wide, ctx.space.device)
        h0, W0_h, probs, h_mask, *Ws = ctx.saved_tensors
        hiddens = ctx.hiddens
        T, B, H = hiddens.shape
        N = len(Ws)
        of_weights = ctx.needs_input_grad[4] or any(ctx.needs_input_grad[7:])
        rows = probs.detach().split(list(range(1, N + 1)))  # N times (i, K)
        weights = [W.to(space.store) for W in (W0_h, *Ws)]
        dxW = space.take("xW", T, B, 2 * H)
        # On CUDA a weight's gradient is one product over all steps, after them; a CPU forms it step by step,
        # while the factors are in its cache (benchmarks/NOTES.md).
        at_once = of_weights and sum_after_loop(h0)
        dcs = [space.take(f"gradient {i}", T if at_once else 1, 2, i, B, H) for i in range(1, N + 1)]
        dWs = [torch.zeros_like(W, dtype=space.wide) for W in Ws] if of_weights else []
        totals = [space.take("total", N + 1, B, H, wide=True) for _ in range(2)]  # gradient of the states, to swap
        through = space.take("through", N + 1, B, H)  # what comes through the product of the node above
        direct = space.take("direct", B, H, wide=True)  # of the hidden state before the step
        into = space.take("into", B, H)  # the same, through its product with W0
        sums = [probs.new_zeros(4, i, B) for i in range(1, N + 1)]  # of each primitive's probability

        state, scale, below = by_node(states), by_node(inverse), before_node(states)
        cus = [cu.unbind(0) for cu in products]
        factor = [masked[:, :i].flatten(1, 2).mT.unbind(0) for i in range(N + 1)]  # (H, iB) each
        gradient = [[(dc, du, dc.flatten(0, 1), du.flatten(0, 1)) for dc, du in d] for d in dcs]
        each, share = [half.unbind(0) for half in totals], [[half[:i] for i in range(N + 1)] for half in totals]
        rest, rest_of = through.unbind(0), [through[:i] for i in range(N + 1)]
        rows_of_rest = [part.flatten(0, 1) for part in rest_of]
        transposed = [tuple(half.t() for half in halves(W)) for W in weights]
        halves_of_dW = [halves(dW) for dW in dWs]
        W0_t, gs, hs, dxWs, dcs_0 = weights[0].t(), g_hiddens.unbind(0), (h0, *hiddens), dxW.unbind(0), halves(dxW)

        concat = tuple(range(1, N + 1))

        direct.zero_()
        into.zero_()
        for t in reversed(range(T)):
            here, there = 0, 1  # which of totals
            output_back(gs[t], direct, into, h_mask, concat, totals[here])
            through.zero_()
            for i in range(N, 0, -1):
                cu, (dc, du, dc_rows, du_rows) = cus[i][t], gradient[i - 1][t if at_once else 0]
                active = held_set(cu, ctx.held_relu, (t, i))
                relaxed_node_back(
                    each[here][i], rest[i], state[i][t], scale[i][t], share[here][i], rest_of[i], below[i][t],
                    cu, rows[i - 1], active, h_mask, dc, du, share[there][i], sums[i - 1],
                )  # fmt: skip
                here, there = there, here
                product(dc_rows, transposed[i][0], out=rows_of_rest[i])
                rows_of_rest[i].addmm_(du_rows, transposed[i][1])
                if of_weights and not at_once:
                    for dW, d in zip(halves_of_dW[i - 1], (dc_rows, du_rows), strict=True):
                        add_product(dW, factor[i][t], d)
            relaxed_start_back(
                each[here][0], rest[0], state[0][t], scale[0][t], cus[0][t][0], h_mask, hs[t],
                dcs_0[0][t], dcs_0[1][t], direct,
            )  # fmt: skip
            product(dxWs[t], W0_t, out=into)

        dprobs = torch.cat([torch.cat([s.new_zeros(1, s.size(1)), s.sum(-1)]).t() for s in sums])
        dh0 = direct + into * h_mask
        dW0_h = None
        if of_weights:
            dW0_h = (previous[:T].flatten(0, 1).t() @ dxW.flatten(0, 1)).to(space.wide)
            if at_once:
                for i, dW in enumerate(dWs, 1):
                    s = masked[:, :i].flatten(1, 2).mT  # (T, H, iB)
                    for half, d in zip(halves(dW), dcs[i - 1].unbind(1), strict=True):
                        half.copy_((s @ d.flatten(1, 2)).sum(0, dtype=space.wide))
        dxW = dxW.clone() if ctx.needs_input_grad[2] else None
        return None, None, dxW, dh0, dW0_h, dprobs, None, *(dWs or [None] * N)


class Discrete(torch.autograd.Function):
    """The cell of one genotype. Time stands inside the nodes, so that a weight's gradient is one product."""

    @staticmethod
    def forward(ctx, keep, recurrent, concat, xW, h0, W0_h, h_mask, *Ws):
        (T, B, _), H, N = xW.shape, h0.size(-1), len(Ws)
        space = Workspace(xW.dtype, h0.dtype, h0.device)
        kept = T if keep else 1
        states = space.take("states", N + 1, kept, B, H)
        masked = space.take("masked", N + 1, kept, B, H)
        products = space.take("products", N + 1, kept, B, 2 * H)
        previous = space.take("previous", T + 1, B, H)  # the hidden state before each step, masked
        hiddens = h0.new_empty(T, B, H)
        weights = [W.to(space.store) for W in (W0_h, *Ws)]

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
                product(mask[j][k], weights[i], out=cu[i][k])
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
        first_derivative_only()
        states, masked, products, previous = ctx.buffers
        space = Workspace(ctx.space.store, ctx.space.wide, ctx.space.device)
        h0, W0_h, h_mask, *Ws = ctx.saved_tensors
        hiddens, (recurrent, concat) = ctx.hiddens, ctx.cell
        T, B, H = hiddens.shape
        N = len(Ws)
        of_weights = ctx.needs_input_grad[5] or any(ctx.needs_input_grad[7:])
        weights = [W.to(space.store) for W in (W0_h, *Ws)]
        gradients = space.take("gradients", N + 1, T, B, 2 * H)  # of the products
        total = space.take("total", N + 1, B, H, wide=True)  # of the states
        direct = space.take("direct", B, H, wide=True)
        into = space.take("into", B, H)
        state, cu, gradient, dc, du = (
            [node.unbind(0) for node in buffer] for buffer in (states, products, gradients, *halves(gradients))
        )  # [i][t]
        transposed, share = [W.t() for W in weights], total.unbind(0)
        gs, hs, backwards = g_hiddens.unbind(0), (h0, *hiddens), list(enumerate(recurrent, 1))[::-1]

        direct.zero_()
        into.zero_()
        for t in reversed(range(T)):
            output_back(gs[t], direct, into, h_mask, concat, total)
            for i, (name, j) in backwards:
                discrete_node_back(name, share[i], cu[i][t], state[j][t], dc[i][t], du[i][t], share[j])
                product(gradient[i][t], transposed[i], out=into)
                share[j].addcmul_(into.to(space.wide), h_mask)
            discrete_start_back(share[0], cu[0][t], hs[t], dc[0][t], du[0][t], direct)
            product(gradient[0][t], transposed[0], out=into)

        dh0 = direct + into * h_mask
        factors = [previous[:T]] + [masked[j] for _, j in recurrent]  # N+1 times (T, B, H)
        dWs = [None] * (N + 1)
        if of_weights:
            dWs = [
                (factor.flatten(0, 1).t() @ gradient.flatten(0, 1)).to(space.wide)
                for factor, gradient in zip(factors, gradients, strict=True)
            ]
        dxW = gradients[0].clone() if ctx.needs_input_grad[3] else None
        return None, None, None, dxW, dh0, dWs[0], None, *dWs[1:]


def sum_after_loop(h: Tensor) -> bool:
    """Also for a small cell (B, H), where a call costs more than its product."""
    return h.device.type == "cuda" or h.numel() < 1 << 14


# Views for all time steps at once: made one by one in the loop they would cost a small cell as much as its kernels.


def by_node(buffer: Tensor) -> list[tuple[Tensor, ...]]:
    """[i][t] of (T, N+1, ...)."""
    return [node.unbind(0) for node in buffer.unbind(1)]


def before_node(states: Tensor) -> list[tuple[Tensor, ...]]:
    """[i][t]: the states s_0 .. s_{i-1}, (i, B, H) each, of (T, N+1, B, H)."""
    return [states[:, :i].unbind(0) for i in range(states.size(1))]


def flat_rows(buffer: Tensor) -> tuple[Tensor, ...]:
    """[t]: (iB, H) each, of (T, i, B, H)."""
    return buffer.flatten(1, 2).unbind(0)


def held_set(cu: Tensor, held_relu: HeldRelu | None, place: tuple[int, int]) -> Tensor | None:
    """Where relu is held active, (..., H) as bytes, since Inductor reads bool slowly; None where it is free."""
    return None if held_relu is None else held_relu.active_set(halves(cu)[1], place).view(torch.uint8)


# The kernels: each one pass over its arguments, of which it writes the last ones. (A kernel that read a large
# argument and wrote over it would be compiled to several passes.)


@kernel
def relaxed_start(cu, h, h_mask, state, masked, inverse):
    """s_0 from the hidden state: cu (B, 2H), h and h_mask (B, H) -> state, masked (B, H), inverse (H,)."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    tanh = sigmoid_tanh(u)[1]
    put_normalised(h + sigmoid(c) * (tanh - h), h_mask, state, masked, inverse)


@kernel
def relaxed_node(cu, states, p, active, h_mask, state, masked, inverse):
    """s_i: cu (i, B, 2H), states (i, B, H), p (i, K), relu's active set (i, B, H) or None -> state, masked (B, H),
    inverse (H,)."""
    c, u = cu.to(h_mask.dtype).chunk(2, dim=-1)
    p = p[:, 1:, None, None]
    sig, tanh = sigmoid_tanh(u)
    mixed = p[:, 0] * tanh + p[:, 1] * (u * slope_of_relu(u, active)) + p[:, 2] * sig + p[:, 3] * u
    kept = p.sum(1) * states.to(h_mask.dtype)
    put_normalised((kept + sigmoid(c) * (mixed - kept)).sum(0), h_mask, state, masked, inverse)


def slope_of_relu(u, active):
    return (u > 0 if active is None else active).to(u.dtype)


def put_normalised(s, h_mask, state, masked, inverse):
    s = realised(s)
    centred = s - s.mean(0)
    scale = torch.rsqrt(centred.square().mean(0) + BN_EPS)
    s = centred * scale
    state.copy_(s)
    masked.copy_(s * h_mask)
    inverse.copy_(scale)


@kernel
def output(states, concat, h_mask, hidden, masked):
    """The mean of the nodes in `concat`, of states (N+1, B, H) -> hidden, masked (B, H)."""
    h = sum(states[i].to(hidden.dtype) for i in concat) / len(concat)
    hidden.copy_(h)
    masked.copy_(h * h_mask)


@kernel
def output_back(g, direct, into, h_mask, concat, total):
    """Gradient of a hidden state from the loss and from the next step -> of s_0 .. s_N (N+1, B, H)."""
    each = (g + direct + into * h_mask) / len(concat)
    total.copy_(torch.stack([each * concat.count(i) for i in range(total.size(0))]))


def normalise_back(g, state, inverse):
    """Back through batch normalisation, (B, H): inverse * (g - mean(g) - s mean(g s))."""
    s = state.to(g.dtype)
    return realised(inverse * (g - g.mean(0) - s * (g * s).mean(0)))


@kernel
def relaxed_node_back(
    g, g_through, state, inverse, total, through, states, cu, p, active, h_mask, dc, du, total_after, sums
):
    """Back through a node: g, g_through, state (B, H), inverse (H,), the rest as in `relaxed_node` -> dc, du (i, B, H).

    `total_after` (i, B, H) is `total` and `through`, which waited, and this node's share. `sums` (4, i, B) gains
    the gradients of the probabilities.
    """
    dz = normalise_back(g + g_through * h_mask, state, inverse)
    c, u = cu.to(h_mask.dtype).chunk(2, dim=-1)
    s = states.to(h_mask.dtype)
    p = p[:, 1:, None, None]
    gate = sigmoid(c)
    sig, tanh = sigmoid_tanh(u)
    active = slope_of_relu(u, active)
    relu = u * active
    mixed = p[:, 0] * tanh + p[:, 1] * relu + p[:, 2] * sig + p[:, 3] * u
    slope = p[:, 0] * (1 - tanh * tanh) + p[:, 1] * active + p[:, 2] * sig * (1 - sig) + p[:, 3]
    some = p.sum(1)
    opened = dz * gate
    shut = dz - opened
    d = realised(opened * (1 - gate) * (mixed - some * s))
    dc.copy_(d)
    du.copy_(opened * slope)
    total_after.copy_(total + through * h_mask + some * shut)
    sums.copy_(sums + torch.stack([(opened * f + shut * s).sum(-1) for f in (tanh, relu, sig, u)]))


@kernel
def relaxed_start_back(g, g_through, state, inverse, cu, h_mask, h, dc, du, direct):
    """Back through the normalisation of s_0 and through s_0, all (B, H) -> dc, du, and the hidden state's own share."""
    put_start_back(normalise_back(g + g_through * h_mask, state, inverse), cu, h, dc, du, direct)


@kernel
def discrete_start_back(g, cu, h, dc, du, direct):
    """Back through s_0, all (B, H) -> dc, du, and the hidden state's own share."""
    put_start_back(g, cu, h, dc, du, direct)


def put_start_back(g, cu, h, dc, du, direct):
    """Back through s = h + sigmoid(c) (tanh(u) - h)."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    dc.copy_(g * gate * (1 - gate) * (tanh - h))
    du.copy_(g * gate * (1 - tanh * tanh))
    direct.copy_(g * (1 - gate))


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
