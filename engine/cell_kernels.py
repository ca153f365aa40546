"""Holds the element-wise arithmetic of the two cells between two matrix products, as compiled kernels.

Each kernel is one pass over its arguments and writes the last ones. (A kernel that read a large argument and
overwrote it would be compiled to several passes.) The structures that kernels take are those of relaxed_buffers.py.

Shapes: T time steps, B batch, H hidden, N nodes, K primitives. H includes the padding of `fused.prepare`. The equations
(F1) to (F6) and (B1) to (B7) are in docs/engine.md.
"""

import torch

from engine.elementwise import force_materialize, sigmoid, sigmoid_tanh
from engine.inductor import kernel
from engine.reference import NORM_EPS


@kernel
def relaxed_start(cu, h, constants, node):
    """Writes s_0 to `node`, given the hidden state h (B, H) before the time step and cu (B, 2H) (F1, F5)."""
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    tanh = sigmoid_tanh(u)[1]
    put_normalised(h + sigmoid(c) * (tanh - h), constants, node)


@kernel
def relaxed_node(edges, p, active, constants, node):
    """Writes s_i to `node`, given its `edges`, their probabilities p (i, K) and relu's active set (i, B, H) or None (F3
    to F5)."""
    c, u = edges.cu.chunk(2, dim=-1)
    p = p[:, 1:, None, None]
    *_, mixed, _ = mixture(p, u, active)
    dtype = constants.h_mask.dtype
    carried = p.sum(1) * edges.states.to(dtype)
    each = carried + sigmoid(c.to(dtype)) * (mixed - carried)
    put_normalised(each.sum(0) * sum_factor(constants.norm, len(p)), constants, node)


def mixture(p, u, active):
    """Returns the primitives f_k(u), their slopes f_k'(u), sum_k p_k f_k(u) and sum_k p_k f_k'(u) (F3, B3).

    u (i, B, H) has the dtype in which it was saved, and p is (i, K-1, 1, 1), without `none`. The primitives and the
    slopes are four tensors (i, B, H) each, of tanh, relu, sigmoid and identity. Relu is active where `active` (i, B, H)
    is set, or where u > 0 if it is None.
    """
    sig, tanh = sigmoid_tanh(u, p.dtype)
    u = u.to(p.dtype)
    on = (u > 0 if active is None else active).to(u.dtype)
    primitives = tanh, u * on, sig, u
    mixed = p[:, 0] * tanh + p[:, 1] * primitives[1] + p[:, 2] * sig + p[:, 3] * u
    slopes = 1 - tanh * tanh, on, sig * (1 - sig), torch.ones_like(u)
    slope = p[:, 0] * slopes[0] + p[:, 1] * on + p[:, 2] * sig * (1 - sig) + p[:, 3]
    return primitives, slopes, mixed, slope


def sum_factor(norm, predecessors):
    """Returns the factor r_i of the sum over the predecessors (F4), which makes it a mean if norm is "none"."""
    return 1 / predecessors if norm == "none" else 1


def average(x, constants):
    """Returns the mean of x (B, H) that the norm "batch" or "layer" takes (F5). For "batch" it is the mean of each
    hidden unit over the batch, (H,), and for "layer" that of each batch element over its hidden units, (B, 1)."""
    return x.mean(0) if constants.norm == "batch" else (x * constants.unit_weights).sum(-1, keepdim=True)


def zero_padding(x, constants):
    """Returns x (B, H) with zeros in the padding of H, where layer normalisation would leave other values."""
    return torch.where(constants.unit_weights > 0, x, 0) if constants.norm == "layer" else x


def put_normalised(s, constants, node):
    """Writes s (B, H), normalised (F5), to `node`."""
    if constants.norm != "none":
        s = force_materialize(s)
        centred = s - average(s, constants)
        inv_std = torch.rsqrt(average(centred.square(), constants) + NORM_EPS)
        s = zero_padding(centred * inv_std, constants)
        node.inv_std.copy_(inv_std)
    node.state.copy_(s)
    node.masked.copy_(s * constants.h_mask)


@kernel
def output(states, concat, h_mask, hidden, masked):
    """Writes the mean of the nodes in `concat`, of states (N+1, B, H), to hidden (B, H), and times h_mask to masked."""
    h = sum(states[i].to(hidden.dtype) for i in concat) / len(concat)
    hidden.copy_(h)
    masked.copy_(h * h_mask)


@kernel
def output_back(g, grad_h_direct, grad_h_matmul, h_mask, concat, total):
    """Writes the gradients of s_0 .. s_N that come through the hidden state, their mean, to total (N+1, B, H) (B1).

    The gradient of the hidden state is g (B, H) from the loss, plus grad_h_direct + grad_h_matmul * h_mask from the
    next time step. The mean is over the nodes in `concat`; the other nodes get 0.
    """
    nodes = torch.arange(total.size(0), device=total.device)
    counts = sum((nodes == i).to(total.dtype) for i in concat)
    total.copy_((g + grad_h_direct + grad_h_matmul * h_mask) / len(concat) * counts[:, None, None])


def total_grad(grad, constants):
    """Returns the gradient that `grad`, a StateGrad, stands for, in its shape."""
    return grad.direct + grad.via_matmul * constants.h_mask


def normalise_back(g, node, constants):
    """Returns the gradient before a norm, inv_std * (g - mean(g) - s mean(g s)), (B, H) (B2). g (B, H) is the gradient
    of s = node.state, and the means are those of `average`. Without a norm, the result is g."""
    if constants.norm == "none":
        return force_materialize(g)
    s = node.state.to(g.dtype)
    dz = node.inv_std * (g - average(g, constants) - s * average(g * s, constants))
    return force_materialize(zero_padding(dz, constants))


@kernel
def relaxed_node_back(grad, node, edges, p, active, constants, predecessor_grads, sums, state_grad, dcu, total_after):
    """Computes the backward pass through node i of the relaxed cell (B2 to B5).

    Reads the gradients of s_i and of its predecessors so far, `grad` and `predecessor_grads`, and the rest as in
    `relaxed_node`. Writes the gradient of s_i to state_grad (B, H), and dcu = dc, du, (i, B, H) each. `total_after`
    (i, B, H) is the predecessors' gradient plus what this node adds directly. The four `sums`, (i, B) each, gain the
    gradients of the probabilities.
    """
    (dc, du), dtype = dcu, constants.h_mask.dtype
    g = total_grad(grad, constants)
    state_grad.copy_(g)
    dz = normalise_back(g, node, constants) * sum_factor(constants.norm, len(p))
    c, u = edges.cu.chunk(2, dim=-1)
    s = edges.states.to(dtype)
    p = p[:, 1:, None, None]
    gate = sigmoid(c.to(dtype))
    primitives, _, mixed, slope = mixture(p, u, active)
    P = p.sum(1)
    gated = dz * gate
    ungated = dz - gated
    d = force_materialize(gated * (1 - gate) * (mixed - P * s))
    dc.copy_(d)
    du.copy_(gated * slope)
    total_after.copy_(total_grad(predecessor_grads, constants) + P * ungated)
    for gained, f in zip(sums, primitives, strict=True):
        gained.copy_(gained + (gated * f + ungated * s).sum(-1))


@kernel
def relaxed_start_back(grad, node, cu, h, constants, state_grad, dc, du, grad_h_direct):
    """Computes the backward pass through the norm of s_0 and through s_0 (B2, B6).

    Reads the gradient `grad` of s_0 = node.state, cu (B, 2H) and h (B, H). Writes the whole gradient of s_0 to
    state_grad, and dc, du and grad_h_direct as in `put_start_back`, (B, H) each.
    """
    g = total_grad(grad, constants)
    state_grad.copy_(g)
    put_start_back(normalise_back(g, node, constants), cu, h, dc, du, grad_h_direct)


@kernel
def discrete_start_back(g, cu, h, dc, du, grad_h_direct):
    """Computes the backward pass through s_0 of the discrete cell (B6). Reads g and h (B, H) and cu (B, 2H), and writes
    dc, du and grad_h_direct as in `put_start_back`, (B, H) each."""
    put_start_back(g, cu, h, dc, du, grad_h_direct)


def put_start_back(g, cu, h, dc, du, grad_h_direct):
    """Writes the gradients of c, u and h for s = h + sigmoid(c) (tanh(u) - h), given that of s, g (B, H) (B6).

    h, dc, du and grad_h_direct are (B, H), cu = [c, u] is (B, 2H). grad_h_direct leaves out the term of the gradient
    of h through the product with W0.
    """
    c, u = cu.to(h.dtype).chunk(2, dim=-1)
    gate, tanh = sigmoid(c), sigmoid_tanh(u)[1]
    dc.copy_(g * gate * (1 - gate) * (tanh - h))
    du.copy_(g * gate * (1 - tanh * tanh))
    grad_h_direct.copy_(g * (1 - gate))


def activation(name, u):
    """Returns f(u) and f'(u) for the activation f called `name`, in the shape of u. `name` is one of
    `reference.ACTIVATIONS`."""
    if name == "identity":
        return u, torch.ones_like(u)
    if name == "relu":
        return u.clamp(min=0), (u > 0).to(u.dtype)
    sig, tanh = sigmoid_tanh(u)
    return (tanh, 1 - tanh * tanh) if name == "tanh" else (sig, sig * (1 - sig))


@kernel
def discrete_node(name, cu, s, h_mask, state, masked):
    """Computes s_i of the discrete cell, s + sigmoid(c) * (f(u) - s), with the activation f called `name`. Reads cu =
    [c, u] (B, 2H), the predecessor s (B, H) and h_mask (B, H). Writes state and masked (B, H)."""
    c, u = cu.to(h_mask.dtype).chunk(2, dim=-1)
    s = s.to(h_mask.dtype)
    s = s + sigmoid(c) * (activation(name, u)[0] - s)
    state.copy_(s)
    masked.copy_(s * h_mask)


@kernel
def discrete_node_back(name, g, cu, s, dc, du, total):
    """Computes the backward pass through a node of the discrete cell (B3, B4, with one predecessor and P = 1).

    Reads the gradient g of the node and the predecessor s, (B, H) each, and cu (B, 2H). Writes dc and du (B, H). The
    gradient of the predecessor, `total` (B, H), gains the term that does not come through the product.
    """
    c, u = cu.to(g.dtype).chunk(2, dim=-1)
    s = s.to(g.dtype)
    gate = sigmoid(c)
    f, slope = activation(name, u)
    dc.copy_(g * gate * (1 - gate) * (f - s))
    du.copy_(g * gate * slope)
    total.copy_(total + g * (1 - gate))
