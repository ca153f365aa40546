"""Optimizer steps and gradient clipping match their equations, and `velocity` predicts the momentum of a step."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architect import WeightUpdate
from genotypes import DARTS_V1
from training.losses import Losses, clipped_gradient
from training.optimizers import OPTIMIZERS, new_optimizer, scaled_lr, velocity

DECAY, MOMENTUM = 0.01, 0.8


def trajectory(name, w, gradients, rates):
    """Returns the weight after each step, computed from the equations with scalars."""
    buffer = m = v = 0.0
    average, actual = w, []
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        if name != "adamw":
            g = g + DECAY * w
        if name == "momentum":
            buffer = MOMENTUM * buffer + g
            g = buffer
        if name.startswith("adam"):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            g = m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w -= lr * DECAY * w if name == "adamw" else 0
        w -= lr * g
        average += (w - average) / max(1, t - 1)  # torch's average leaves out the first weight
        actual.append(average if name == "asgd" else w)
    return actual


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_match_equations_with_changing_lr(name):
    gradients, rates = [0.3, -1.0, 0.2, 0.7, -0.1], [0.1, 0.05, 0.1, 0.02, 0.1]
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, actual = new_optimizer(name, [w], 0.1, WeightUpdate(weight_decay=DECAY, momentum=MOMENTUM)), []
    for g, lr in zip(gradients, rates, strict=True):
        w.grad = torch.tensor([g], dtype=torch.float64)
        with scaled_lr(optimizer, lr / 0.1):
            optimizer.step()
        actual.append((optimizer.state[w]["ax"] if name == "asgd" else w).item())
    assert actual == pytest.approx(trajectory(name, 2.0, gradients, rates), rel=1e-12)


class Linear:
    """Represents a loss with a given gradient."""

    def __init__(self, gradients):
        self.gradients = gradients
        self.weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]

    def parts(self):
        total = sum((w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True))
        yield Losses(total, total.detach(), torch.zeros(1, 1))


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-5, 5), min_size=3, max_size=8), clip=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    limit=st.sampled_from([0.0, 0.05, 1.0, 100.0]),
)  # fmt: skip
def test_clipping_by_value_precedes_clipping_by_norm(values, clip, limit):
    loss = Linear([torch.tensor(values[:2], dtype=torch.float64), torch.tensor(values[2:], dtype=torch.float64)])
    _, _, norm = clipped_gradient(loss.parts(), loss.weights, WeightUpdate(clip, limit))
    assert norm.item() == pytest.approx(
        math.sqrt(sum(v * v for v in values)), abs=1e-12
    )  # the norm is that before clipping
    expected = [max(-limit, min(limit, v)) if limit else v for v in values]
    length = math.sqrt(sum(v * v for v in expected))
    if clip and length > clip:
        expected = [v * clip / (length + 1e-6) for v in expected]
    actual = torch.cat([w.grad for w in loss.weights]).tolist()
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_velocity_is_the_momentum_term_of_the_next_step():
    weights = tiny.discrete_model(DARTS_V1).weights()
    assert velocity(new_optimizer("sgd", weights, 0.1, WeightUpdate())) is None
    optimizer = new_optimizer("momentum", weights, 0.1, WeightUpdate(momentum=MOMENTUM))
    assert velocity(optimizer) is None
    assert not optimizer.state  # the call does not create any state
    first = [torch.randn_like(w) for w in weights]
    for w, g in zip(weights, first, strict=True):
        w.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(velocity(optimizer), [MOMENTUM * g for g in first])
