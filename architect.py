"""The two updates of DARTS' algorithm 1: that of the weights, and that of the alphas, which looks one step ahead.

    first order:  grad = d/d alpha L_valid(w, alpha)
    unrolled:     grad = d/d alpha L_valid(w', alpha) - eta c d/d alpha (d/dw L_train(w, alpha) . v)

Here w' = w - eta (c g + wdecay w) are the weights after a virtual step, g = d/dw L_train(w, alpha),
c = min(1, clip / |g|) is held constant, and v = d/dw' L_valid(w', alpha) (DARTS, equations 6 and 7, for the weight step
that is really taken). The first term is the direct part, the second the implicit part. The product in the implicit part
is computed by differentiating twice ("exact"), or as a central difference of d/d alpha L_train at w +- R v / |v|
("finite"). Momentum adds a multiple of earlier gradients to the step, on which the present alphas have no influence.
Where each element of g is limited, v counts only for the elements below the limit.

The parts of a loss are computed one by one, so that only one part's graph is alive at a time. All passes over one batch
use the dropout masks that the batch carries. For the central difference, relu is also held at the active set of the
first pass in full precision, since the difference would otherwise measure masks and kinks instead of curvature.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from engine.matmul import matmul_precision

RADIUS = 1e-4  # measured at H 100 with batch normalisation (docs/search.md)
Product = Callable[[list[Tensor]], Tensor]  # v -> d/d alpha (d/dw L_train . v), shape of the alphas
Average = Callable[[list[Tensor]], None]  # replaces tensors by their mean over all ranks (experiment/distributed.py)


@dataclass(frozen=True)
class WeightUpdate:
    """How a gradient moves the weights: it is clipped, and an optimizer with this weight decay and momentum takes its
    step. The weight step and the virtual step of the search both clip with `clip_`. The former then lets the optimizer
    that `training.optimizers.new_optimizer` makes from the same object take its step, the latter, which is of SGD with
    or without momentum, adds `deltas`."""

    clip_norm: float = 0.0  # the largest norm of the whole gradient; 0 for no limit
    clip_value: float = 0.0  # the largest absolute value of an element of the gradient, applied first; 0 for no limit
    weight_decay: float = 0.0  # the factor of the weights that is added to the gradient
    momentum: float = 0.9  # that of the optimizer "momentum"

    @torch.no_grad()
    def clip_(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Clips the gradients in place; returns their norm before that, and the factor c = min(1, clip_norm / norm) by
        which they were multiplied (after each element was limited), as scalar tensors, so that nothing waits for a
        GPU."""
        before = norm = get_total_norm(gradients)
        if self.clip_value:
            torch._foreach_clamp_min_(gradients, -self.clip_value)
            torch._foreach_clamp_max_(gradients, self.clip_value)
            norm = get_total_norm(gradients)
        if not self.clip_norm:
            return before, torch.ones_like(norm)
        torch._foreach_mul_(gradients, factor := (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return before, factor

    def deltas(
        self, weights: list[Tensor], clipped: list[Tensor], lr: float | Tensor, velocity: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Returns what a step of SGD adds to each weight, given the clipped gradient and what momentum adds to it
        (`training.optimizers.velocity`)."""
        steps = [-lr * (g + self.weight_decay * w.detach()) for g, w in zip(clipped, weights, strict=True)]
        return steps if velocity is None else [step - lr * old for step, old in zip(steps, velocity, strict=True)]


class Architect:
    """Owns the optimizer of the alphas and computes their gradient; leaves the weights bit-identical.

    Args:
        weights: the parameters w, any shapes.
        alphas: the architecture parameters (N(N+1)/2, K).
        train_loss, valid_loss: batch -> parts that sum to its loss, each with `.total` (scalar to differentiate) and
            `.hidden` (the last hidden states of its batch elements). `train_loss` is the loss of the weight step.
        precise_loss: `train_loss` in full precision, for the central difference; `train_loss` itself if None.
        update: the update of the weights, which the virtual step previews.
        hessian: None for the first-order step, else "finite" or "exact".
        lr, arch_wdecay: the learning rate and weight decay of Adam on the alphas.
        mean_alphas: whether to keep a mean of the alphas over the steps, for `averaged(architect.optimizer)`.
        radius: R of the central difference.
        average: the mean over all ranks, where the batch is split among ranks.
    """

    def __init__(
        self, weights: list[Tensor], alphas: Tensor, train_loss: Callable[[Any], Collection],
        valid_loss: Callable[[Any], Iterable], precise_loss: Callable[[Any], Iterable] | None = None, *,
        update: WeightUpdate, hessian: str | None = None, lr: float = 3e-3, arch_wdecay: float = 1e-3,
        mean_alphas: bool = False, radius: float = RADIUS, average: Average | None = None,
    ):  # fmt: skip
        self.weights, self.alphas = weights, alphas
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.precise_loss = precise_loss or train_loss
        self.update, self.hessian, self.radius = update, hessian, radius
        self.average = average or (lambda tensors: None)
        adam = AveragedAdam if mean_alphas else torch.optim.Adam
        self.optimizer = adam([alphas], lr=lr, weight_decay=arch_wdecay, capturable=alphas.is_cuda)
        # The first steps run outside of a CUDA graph, of which torch would warn.
        self.optimizer._warned_capturable_if_run_uncaptured = True
        self.optimizer.register_load_state_dict_pre_hook(keep_capturable)

    def step(self, train: Any, valid: Any, eta: float | Tensor, velocity: list[Tensor] | None = None) -> Tensor:
        """Takes one Adam step on the alphas; returns the hidden states (B, H) after the validation batch. eta is the
        learning rate of the weight step that follows, `velocity` what its momentum adds to the gradient."""
        direct, implicit, hidden = self.gradient(train, valid, eta, velocity)
        self.alphas.grad = direct if implicit is None else direct - implicit
        self.optimizer.step()
        self.alphas.grad = None
        return hidden

    def gradient(
        self, train: Any, valid: Any, eta: float | Tensor, velocity: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns (direct, implicit, hidden): the gradient is direct - implicit; implicit is None in first order."""
        if self.hessian is None:
            [direct], hidden = self.gradients(self.valid_loss(valid), [self.alphas])
            return direct, None, hidden

        g, product = self.exact_hvp(train) if self.hessian == "exact" else self.finite_difference_hvp(train)
        limit = self.update.clip_value
        unlimited = [g_i.abs() <= limit for g_i in g] if limit else []
        _, c = self.update.clip_(g)
        deltas = self.update.deltas(self.weights, g, eta, velocity)
        del g
        with perturbed(self.weights, deltas):  # the virtual step
            (direct, *v), hidden = self.gradients(self.valid_loss(valid), [self.alphas, *self.weights])
        if limit:
            v = [v_i * within for v_i, within in zip(v, unlimited, strict=True)]
        return direct, eta * c * product(v), hidden

    def gradients(self, parts: Iterable, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns the gradient of the sum of the parts with respect to the inputs, and the hidden states (B, H)."""
        totals, hidden = None, []
        with requires_grad_only(inputs, of=[*self.weights, self.alphas]):
            for part in parts:
                grads = torch.autograd.grad(part.total, inputs)
                totals = list(grads) if totals is None else [a.add_(b) for a, b in zip(totals, grads, strict=True)]
                hidden.append(part.hidden)
                del part  # frees its graph before the next one is built
        self.average(totals)
        return totals, torch.cat(hidden)

    def exact_hvp(self, train: Any) -> tuple[list[Tensor], Product]:
        """Returns g = d/dw L_train and a function v -> d/d alpha (g . v) that differentiates g once more, for which it
        keeps the graph of a single part and computes several parts a second time."""
        parts = self.train_loss(train)

        def differentiable(part: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(part.total, self.weights, create_graph=True)

        def product(v: list[Tensor]) -> Tensor:
            total = torch.zeros_like(self.alphas)
            for graph in graphs or map(differentiable, parts):
                total += torch.autograd.grad(graph, self.alphas, v)[0]
                del graph  # frees it before the next one is built
            self.average([total])
            return total

        graphs = [differentiable(part) for part in parts] if len(parts) == 1 else []
        if not graphs:
            return self.gradients(parts, self.weights)[0], product
        g = [g_i.detach().clone() for g_i in graphs[0]]
        self.average(g)
        return g, product

    def finite_difference_hvp(self, train: Any) -> tuple[list[Tensor], Product]:
        """Returns g = d/dw L_train and a function v -> d/d alpha (g . v) that takes a central difference of radius R
        along v / |v| (DARTS, equation 8)."""

        def product(v: list[Tensor]) -> Tensor:
            scale = self.radius / get_total_norm(v).clamp(min=1e-30)  # v may be 0; the product is then 0 too
            ends = []
            for sign in (1, -1):
                with perturbed(self.weights, [sign * scale * v_i for v_i in v]), matmul_precision("fp32"):
                    [end], _ = self.gradients(self.precise_loss(train), [self.alphas])
                ends.append(end)
            return (ends[0] - ends[1]) / (2 * scale)

        return self.gradients(self.train_loss(train), self.weights)[0], product


@contextmanager
def requires_grad_only(inputs: list[Tensor], of: list[Tensor]) -> Iterator[None]:
    """Inside, only the inputs among the tensors of `of` require gradients, so that autograd computes no others."""
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
    """Inside, the weights have the values w + delta in new tensors; afterwards they have their old storage again, which
    is not overwritten, so that a saved graph that refers to it stays valid."""
    before = [w.data for w in weights]
    try:
        for w, delta in zip(weights, deltas, strict=True):
            w.data = w.data + delta
        yield
    finally:
        for w, old in zip(weights, before, strict=True):
            w.data = old


def keep_capturable(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state that was saved on any kind of device, with the optimizer's own `capturable`, which depends on the
    device of its parameters: a hook of `load_state_dict`."""
    [saved], [present] = state["param_groups"], optimizer.param_groups
    return {**state, "param_groups": [{**saved, "capturable": present["capturable"]}]}


class AveragedAdam(torch.optim.Adam):
    """Adam that also keeps a mean of each parameter over the steps; the steps themselves are those of torch's Adam. The
    mean has polynomial decay (Shamir & Zhang, ICML 2013, section 4): the weight of step t grows like t^DECAY, so that
    the first steps are forgotten while the last oscillations are averaged out."""

    DECAY = 3  # docs/signal.md says why

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter, state in self.state.items():
            mean = state.setdefault("ax", torch.zeros_like(parameter))
            mean += (parameter - mean) * ((self.DECAY + 1) / (state["step"] + self.DECAY))
        return loss
