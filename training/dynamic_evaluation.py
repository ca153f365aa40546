"""Dynamic evaluation: a model that learns from each segment of a text after it has predicted it (Krause et al. 2018).

Shapes: T time steps, B batch, n time steps of a whole text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from model import RNNModel
from utils import equal_segments

RULES = ("sgd", "rms")
EPSILON = 0.1  # of `rms`, in units of the mean root mean square of the gradients over all weights


class DynamicEvaluation:
    """Moves the weights of a model along the gradient of each segment's loss and back towards their trained values.

    With g the gradient, w_0 the trained weights and w the present ones, the rule `sgd` is

        w <- w - lr g + decay (w_0 - w),

    and the rule `rms`, with r the root mean square of each weight's gradient over the training text, is

        w <- w - lr g / (r + epsilon) + min(1, decay r / mean(r)) (w_0 - w)

    (section 5 of the paper). The gradient and the step back are those at the same w.
    """

    def __init__(self, weights: Sequence[Tensor], lr: float, decay: float, rms: Sequence[Tensor] | None = None):
        """Takes the rule `rms` if the r of each weight is given, as `gradient_rms` returns it, and `sgd` otherwise."""
        self.weights, self.lr = list(weights), lr
        self.trained = [w.detach().clone() for w in self.weights]
        if rms is None:
            self.divisors, self.decays = [None] * len(self.weights), [decay] * len(self.weights)
        else:
            mean = sum(r.sum() for r in rms) / sum(r.numel() for r in rms)
            self.divisors = [r + EPSILON * mean for r in rms]
            self.decays = [(decay * r / mean).clamp(max=1.0) for r in rms]

    def step(self, loss: Tensor) -> None:
        """Moves the weights by the gradient of `loss`, the mean over the words of a segment in nats."""
        gradients = torch.autograd.grad(loss, self.weights, materialize_grads=True)
        with torch.no_grad():
            parts = zip(self.weights, gradients, self.trained, self.decays, self.divisors, strict=True)
            for w, g, trained, decay, divisor in parts:
                w.lerp_(trained, decay)
                if divisor is None:
                    w.sub_(g, alpha=self.lr)
                else:
                    w.addcdiv_(g, divisor, value=-self.lr)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Gives the weights their trained values again at the end of the block."""
        try:
            yield
        finally:
            with torch.no_grad():
                for w, trained in zip(self.weights, self.trained, strict=True):
                    w.copy_(trained)


def gradient_rms(model: RNNModel, source: Tensor, bptt: int) -> list[Tensor]:
    """Returns the root mean square of the gradient of each of the model's weights over the segments of `bptt` time
    steps of a training text `source` (n, B). Each gradient is that of a segment's mean loss. Shows a
    progress bar."""
    weights = model.weights()
    squares = [torch.zeros_like(w) for w in weights]
    state, count = model.initial_hidden(source.size(1)), 0
    for _, x, y in equal_segments(source, bptt, "gradients of train"):  # (T, B) each
        hiddens, state = model(x, state.detach())
        gradients = torch.autograd.grad(model.nll(hiddens, y), weights, materialize_grads=True)
        for square, g in zip(squares, gradients, strict=True):
            square.addcmul_(g, g)
        count += 1
    return [square.div_(count).sqrt_() for square in squares]
