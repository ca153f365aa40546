"""A second implementation of the recurrent cell, in numpy and from its equations alone, for tests to compare against.

Every sum is a loop, as in its equation; nothing is factored or folded. Source: Liu, Simonyan & Yang,
"DARTS: Differentiable Architecture Search", ICLR 2019, sections 2.1, 2.2, 2.4 and appendix A.1.

The functions of the cell also take complex numbers and are analytic in them (no abs, no conjugate; relu and the
maximum in softmax use the real part alone), so that `complex_step_gradient` is exact to rounding.

Shapes: T time steps, B batch size, E embedding, H hidden, N nodes, K primitives.
"""

import numpy as np

PRIMITIVES = ["none", "tanh", "relu", "sigmoid", "identity"]
NORM_EPS = 1e-5


def tanh(z):
    return np.tanh(z)


def relu(z):
    return np.where(z.real > 0, z, 0)


def sigmoid(z):
    return (1 + np.tanh(z / 2)) / 2  # equals 1 / (1 + exp(-z)), which would overflow


def identity(z):
    return z


ACTIVATION = {"tanh": tanh, "relu": relu, "sigmoid": sigmoid, "identity": identity}


def softmax(logits):
    """Returns the softmax of the logits of one edge, (K,) -> (K,)."""
    e = np.exp(logits - logits.real.max())
    return e / e.sum()


def batch_norm(s):
    """Normalises each unit by its mean and biased variance over the batch, no affine part, (B, H) -> (B, H)."""
    mean = s.sum(axis=0) / len(s)
    deviation = s - mean
    variance = (deviation * deviation).sum(axis=0) / len(s)
    return deviation / np.sqrt(variance + NORM_EPS)


def layer_norm(s):
    """Normalises each batch element by its mean and biased variance over units, no affine part, (B, H) -> (B, H)."""
    normalised = []
    for state in s:
        deviation = state - state.sum() / len(state)
        normalised.append(deviation / np.sqrt((deviation * deviation).sum() / len(state) + NORM_EPS))
    return np.stack(normalised)


NORM = {"batch": batch_norm, "layer": layer_norm, "none": identity}


def split(product):
    """Splits a matrix product (B, 2H) into the gate's c (B, H) and the candidate's h (B, H)."""
    H = product.shape[1] // 2
    return product[:, :H], product[:, H:]


def cell_input(x, h_prev, W0, x_mask, h_mask):
    """Returns s_0 = h_prev + sigmoid(c0) * (tanh(h0) - h_prev), not normalised.

    x (B, E), h_prev (B, H), W0 (E + H, 2H), x_mask (B, E), h_mask (B, H) -> (B, H).
    """
    c0, h0 = split(np.concatenate([x * x_mask, h_prev * h_mask], axis=1) @ W0)
    return h_prev + sigmoid(c0) * (tanh(h0) - h_prev)


def relaxed_step(x, h_prev, W0, Ws, alpha, x_mask, h_mask, norm):
    """Computes one time step of the relaxed cell, x (B, E), h_prev (B, H) -> (B, H); see `relaxed_sequence`."""
    N = len(Ws)
    s = [NORM[norm](cell_input(x, h_prev, W0, x_mask, h_mask))]  # s_0, s_1, ..., s_N, all normalised
    edge = 0  # the index of an edge, a row of alpha
    for i in range(1, N + 1):
        total = 0
        for j in range(i):
            c, h = split((s[j] * h_mask) @ Ws[i - 1])
            p = softmax(alpha[edge])
            for k, name in enumerate(PRIMITIVES):
                if name != "none":
                    f = ACTIVATION[name]
                    total = total + p[k] * (s[j] + sigmoid(c) * (f(h) - s[j]))
            edge += 1
        s.append(NORM[norm](total / i if norm == "none" else total))
    return sum(s[1:]) / N


def discrete_step(x, h_prev, W0, Ws, recurrent, concat, x_mask, h_mask):
    """Computes one time step of a discrete cell, x (B, E), h_prev (B, H) -> (B, H); see `discrete_sequence`."""
    s = [cell_input(x, h_prev, W0, x_mask, h_mask)]
    for i, (name, j) in enumerate(recurrent, start=1):
        c, h = split((s[j] * h_mask) @ Ws[i - 1])
        f = ACTIVATION[name]
        s.append(s[j] + sigmoid(c) * (f(h) - s[j]))
    return sum(s[i] for i in concat) / len(concat)


def relaxed_sequence(x, h0, W0, Ws, alpha, x_mask, h_mask, norm="batch"):
    """Runs the relaxed cell over T time steps, each output being the next hidden state; returns (T, B, H).

    x (T, B, E), h0 (B, H), W0 (E + H, 2H), Ws N matrices (H, 2H), as a list or one (N, H, 2H) array;
    alpha (N(N+1)/2, K) logits, with the edges in the order 0 to node 1, 0 to 2, 1 to 2, 0 to 3, ..., and the columns
    in the order of PRIMITIVES; x_mask (B, E) and h_mask (B, H), already scaled, the same at all T time steps.
    The masks act on the inputs of matrix products and nowhere else. Every s_j that enters a node is normalised. With
    norm "none" nothing is normalised, and a node is the mean over its predecessors instead of their sum.
    """
    hidden, outputs = h0, []
    for t in range(len(x)):
        hidden = relaxed_step(x[t], hidden, W0, Ws, alpha, x_mask, h_mask, norm)
        outputs.append(hidden)
    return np.stack(outputs)


def discrete_sequence(x, h0, W0, Ws, recurrent, concat, x_mask, h_mask):
    """Runs a discrete cell over T time steps, without batch normalisation; returns (T, B, H).

    recurrent: (op, predecessor) of nodes 1..N, predecessor 0 being s_0; concat: the nodes, counted from 1,
    whose mean is the output. The other arguments are those of `relaxed_sequence`.
    """
    hidden, outputs = h0, []
    for t in range(len(x)):
        hidden = discrete_step(x[t], hidden, W0, Ws, recurrent, concat, x_mask, h_mask)
        outputs.append(hidden)
    return np.stack(outputs)


def derive(alpha):
    """Returns the discrete cell of alpha, real logits (N(N+1)/2, K), as a list of N pairs (op, predecessor).

    Each node keeps the predecessor whose strongest primitive other than none has the largest softmax weight,
    with that primitive. Ties go to the earlier predecessor, then to the earlier primitive.
    """
    recurrent, edge, i = [], 0, 1
    while edge < len(alpha):
        best, choice = -1.0, None
        for j in range(i):
            p = softmax(alpha[edge])
            for k, name in enumerate(PRIMITIVES):
                if name != "none" and p[k] > best:
                    best, choice = p[k], (name, j)
            edge += 1
        recurrent.append(choice)
        i += 1
    return recurrent


def scalar(hiddens, R):
    """Returns sum(hiddens * R), the scalar whose gradients are tested; R is a fixed array of the shape of hiddens."""
    return (hiddens * R).sum()


def complex_step_gradient(f, arrays, step=1e-30):
    """Returns the gradient of the scalar f(**arrays) in every element of every array, Im f(x + i step) / step.

    f must be real for real arguments and analytic; it is called with complex128 copies. Nothing is
    subtracted, so the step can be tiny. Returns float64 arrays under the names and shapes of `arrays`.
    """
    point = {name: np.array(a, dtype=np.complex128) for name, a in arrays.items()}
    gradient = {}
    for name, a in point.items():
        gradient[name] = np.zeros(a.shape)
        for index in np.ndindex(a.shape):
            value = a[index]
            a[index] = value + 1j * step
            gradient[name][index] = f(**point).imag / step
            a[index] = value
    return gradient
