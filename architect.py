"""The architecture step: alphas move down the validation loss that the weights would have after their step.

    first order:  grad = d/d alpha L_valid(w, alpha)
    unrolled:     grad = d/d alpha L_valid(w', alpha) - eta c d/d alpha (d/dw L_train(w, alpha) . v)

with w' = w - eta (c g + wdecay w), g = d/dw L_train(w, alpha), c = min(1, clip / |g|) held constant, and
v = d/dw' L_valid(w', alpha) (DARTS, equations 6 and 7, for the weight step that is really taken). The first
term is the direct part, the second the implicit part. The product in the second is had by differentiating twice
("exact"), or is a central difference of d/d alpha L_train at w +- R v / |v| ("finite"). With momentum the step
adds what is kept of earlier gradients, which no alpha of now can change; where each element of g is limited, v counts
only at those below the limit.

A loss is given as a function of a batch that gives it in parts which sum to the whole, computed one by one; of
several, only one part's graph lives at a time. Every pass over one batch uses the masks that the batch carries; for a
difference also the same active set of relu, which the first pass takes at w: it would else measure masks and kinks
instead of curvature.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.matmul import matmul_precision

RADIUS = 1e-4
Product = Callable[[list[Tensor]], Tensor]  # v -> d/d alpha (d/dw L_train . v), shape of the alphas


class Architect:
    """Owns the alphas' optimizer and computes their gradient; the weights come back bit for bit.

    Args:
        weights: the parameters w, any shapes.
        alphas: the architecture parameters (N(N+1)/2, K).
        train_loss, valid_loss: batch -> parts of the loss, each with `.total` (scalar to differentiate) and
            `.hidden` (rows of the state to go on from). `train_loss` is the loss of the weight step.
        precise_loss: the same loss as `train_loss` for a difference, in full precision.
        clip, clip_value, wdecay: of the weight step, which the virtual step imitates.
        hessian: None for the first-order step, else "finite" or "exact".
        lr, arch_wdecay: of Adam on the alphas.
        average: puts the mean over all ranks into tensors, where the batch's rows are split
            (experiment/distributed.py).
        mean_alphas: whether a mean of the alphas over the steps is kept, for `averaged(architect.optimizer)`.
        radius: R of the central difference.
    """

    def __init__(
        self,
        weights: list[Tensor],
        alphas: Tensor,
        train_loss: Callable[[Any], Collection],
        valid_loss: Callable[[Any], Iterable],
        precise_loss: Callable[[Any], Iterable] | None = None,
        *,
        clip: float,
        wdecay: float,
        clip_value: float = 0.0,
        hessian: str | None = None,
        lr: float = 3e-3,
        arch_wdecay: float = 1e-3,
        mean_alphas: bool = False,
        radius: float = RADIUS,
        average: Callable[[list[Tensor]], None] | None = None,
    ):
        self.weights, self.alphas = weights, alphas
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.precise_loss = precise_loss or train_loss
        self.clip, self.clip_value, self.wdecay = clip or math.inf, clip_value or math.inf, wdecay
        self.hessian, self.radius = hessian, radius
        self.average = average or (lambda tensors: None)
        adam = AveragedAdam if mean_alphas else torch.optim.Adam
        self.optimizer = adam([alphas], lr=lr, weight_decay=arch_wdecay, capturable=alphas.is_cuda)

    def state_dict(self) -> dict[str, Any]:
        """The state of `optimizer`; there is no other."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of `optimizer` as it was saved, on whatever kind of device that was."""
        groups = [{**group, "capturable": self.alphas.is_cuda} for group in state["param_groups"]]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def step(self, train: Any, valid: Any, eta: float | Tensor, velocity: list[Tensor] | None = None) -> Tensor:
        """One Adam step on the alphas; returns the hidden states (B, H) that the validation text ends in.

        eta is the learning rate of the weight step that follows, `velocity` what its momentum adds to the gradient.
        """
        direct, implicit, hidden = self.gradient(train, valid, eta, velocity)
        self.alphas.grad = direct if implicit is None else direct - implicit
        self.optimizer.step()
        self.alphas.grad = None
        return hidden

    def gradient(
        self, train: Any, valid: Any, eta: float | Tensor, velocity: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(direct, implicit, hidden): the gradient is direct - implicit; implicit is None in first order."""
        if self.hessian is None:
            [direct], hidden = self.gradients(self.valid_loss(valid), [self.alphas])
            return direct, None, hidden

        g, product = self.exact_hvp(train) if self.hessian == "exact" else self.finite_difference_hvp(train)
        limited = self.clip_value < math.inf
        if limited:
            free = [g_i.abs() <= self.clip_value for g_i in g]
            g = [g_i.clamp(-self.clip_value, self.clip_value) for g_i in g]
        c = clip_coefficient(g, self.clip)
        steps = [-eta * (c * g_i + self.wdecay * w.detach()) for g_i, w in zip(g, self.weights, strict=True)]
        if velocity is not None:
            steps = [step - eta * kept for step, kept in zip(steps, velocity, strict=True)]
        del g
        with perturbed(self.weights, steps):
            (direct, *v), hidden = self.gradients(self.valid_loss(valid), [self.alphas, *self.weights])
        if limited:
            v = [v_i * free_i for v_i, free_i in zip(v, free, strict=True)]
        return direct, eta * c * product(v), hidden

    def gradients(self, parts: Iterable, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Gradient of the sum of the parts with respect to the inputs alone, and the hidden states (B, H)."""
        totals, hidden = None, []
        with requires_grad_only(inputs, of=[*self.weights, self.alphas]):
            for part in parts:
                found = torch.autograd.grad(part.total, inputs)
                totals = list(found) if totals is None else [a.add_(b) for a, b in zip(totals, found, strict=True)]
                hidden.append(part.hidden)
                del part  # and what it remembers, before the next one
        self.average(totals)
        return totals, torch.cat(hidden)

    def exact_hvp(self, train: Any) -> tuple[list[Tensor], Product]:
        """d/dw L_train, and its product by differentiating that gradient in turn.

        A single part's graph is kept from one to the other; several parts are passed over once more.
        """
        parts = self.train_loss(train)

        def differentiable(part: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(part.total, self.weights, create_graph=True)

        def product(v: list[Tensor]) -> Tensor:
            total = torch.zeros_like(self.alphas)
            for graph in kept or map(differentiable, parts):
                total += torch.autograd.grad(graph, self.alphas, v)[0]
                del graph  # and what it remembers, before the next one
            self.average([total])
            return total

        kept = [differentiable(part) for part in parts] if len(parts) == 1 else []
        if not kept:
            return self.gradients(parts, self.weights)[0], product
        g = [g_i.detach().clone() for g_i in kept[0]]
        self.average(g)
        return g, product

    def finite_difference_hvp(self, train: Any) -> tuple[list[Tensor], Product]:
        """d/dw L_train, and its product by a central difference."""
        return self.gradients(self.train_loss(train), self.weights)[0], partial(self.finite_product, train)

    def finite_product(self, train: Any, v: list[Tensor]) -> Tensor:
        """d/d alpha (d/dw L_train . v) by a central difference at radius R along v / |v| (DARTS, equation 8)."""
        scale = self.radius / total_norm(v).clamp(min=1e-30)  # all of v may be 0, and the product then is
        ends = []
        for sign in (1, -1):
            with perturbed(self.weights, [sign * scale * v_i for v_i in v]), matmul_precision("fp32"):
                [end], _ = self.gradients(self.precise_loss(train), [self.alphas])
            ends.append(end)
        return (ends[0] - ends[1]) / (2 * scale)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements together, a scalar tensor (no host synchronisation)."""
    return torch.nn.utils.get_total_norm(tensors)


def clip_coefficient(gradient: list[Tensor], clip: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies a gradient by: min(1, clip / norm), a scalar tensor."""
    return (clip / (total_norm(gradient) + 1e-6)).clamp(max=1.0)


@contextmanager
def requires_grad_only(inputs: list[Tensor], of: list[Tensor]) -> Iterator[None]:
    """Of these tensors none but the inputs wants a gradient inside, so that none is formed for nothing."""
    others = [tensor for tensor in of if not any(tensor is wanted for wanted in inputs)]
    for tensor in others:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(True)


@contextmanager
def perturbed(weights: list[Tensor], deltas: list[Tensor]) -> Iterator[None]:
    """The weights plus the deltas inside; outside, the very tensors that they were before.

    They are put elsewhere and not written over: a graph that is kept of them is still right afterwards.
    """
    before = [w.data for w in weights]
    after = [w.data + delta for w, delta in zip(weights, deltas, strict=True)]
    try:
        for w, new in zip(weights, after, strict=True):
            w.data = new
        yield
    finally:
        for w, old in zip(weights, before, strict=True):
            w.data = old


class AveragedAdam(torch.optim.Adam):
    """torch's Adam, which also keeps a mean of each parameter over its steps and moves nothing of what Adam does.

    The mean is one by polynomial decay (Shamir & Zhang, ICML 2013, section 4): step t weighs as t^DECAY, up to lower
    powers, so that how the parameters began is forgotten while the last swings are still averaged out.
    """

    DECAY = 3  # measured in docs/signal.md

    @torch.no_grad()
    def step(self, closure=None):
        found = super().step(closure)
        for parameter, state in self.state.items():
            mean = state.setdefault("ax", torch.zeros_like(parameter))
            mean += (parameter - mean) * ((self.DECAY + 1) / (state["step"] + self.DECAY))
        return found
