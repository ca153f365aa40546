"""Each optimizer's step and the clipping before it, from their equations; what the virtual step foresees of them."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architect import WeightUpdate
from genotypes import DARTS_V1
from training.gradients import clipped_gradient, scaled_lr
from training.losses import Losses
from training.optimizers import OPTIMIZERS, new_optimizer, velocity

DECAY, MOMENTUM = 0.01, 0.8


def trajectory(name, w, gradients, rates):
    """The weight after each step, from the equations, one number at a time."""
    buffer = m = v = 0.0
    average, found = w, []
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
        average += (w - average) / max(1, t - 1)  # torch's does not count the first
        found.append(average if name == "asgd" else w)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_equations_at_the_rate_of_each(name):
    gradients, rates = [0.3, -1.0, 0.2, 0.7, -0.1], [0.1, 0.05, 0.1, 0.02, 0.1]
    w = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, found = new_optimizer(name, [w], 0.1, WeightUpdate(weight_decay=DECAY, momentum=MOMENTUM)), []
    for g, lr in zip(gradients, rates, strict=True):
        w.grad = torch.tensor([g], dtype=torch.float64)
        with scaled_lr(optimizer, lr / 0.1):
            optimizer.step()
        found.append((optimizer.state[w]["ax"] if name == "asgd" else w).item())
    assert found == pytest.approx(trajectory(name, 2.0, gradients, rates), rel=1e-7)  # torch's ASGD has rates in fp32


class Linear:
    """A loss whose gradient is given."""

    def __init__(self, gradients):
        self.gradients = gradients
        self.weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]

    def parts(self):
        total = sum((w * g).sum() for w, g in zip(self.weights, self.gradients, strict=True))
        yield Losses(total, total.detach(), torch.zeros(1, 1))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-5, 5), min_size=3, max_size=8), clip=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    limit=st.sampled_from([0.0, 0.05, 1.0, 100.0]),
)  # fmt: skip
def test_clipping_limits_each_element_and_then_the_norm(values, clip, limit):
    loss = Linear([torch.tensor(values[:2], dtype=torch.float64), torch.tensor(values[2:], dtype=torch.float64)])
    _, _, norm = clipped_gradient(loss.parts(), loss.weights, WeightUpdate(clip, limit))
    assert norm.item() == pytest.approx(math.sqrt(sum(v * v for v in values)), abs=1e-12)  # before any of it
    expected = [max(-limit, min(limit, v)) if limit else v for v in values]
    length = math.sqrt(sum(v * v for v in expected))
    if clip and length > clip:
        expected = [v * clip / (length + 1e-6) for v in expected]
    found = torch.cat([w.grad for w in loss.weights]).tolist()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_velocity_is_what_momentum_adds_to_the_next_gradient():
    weights = tiny.discrete_model(DARTS_V1).weights()
    assert velocity(new_optimizer("sgd", weights, 0.1, WeightUpdate())) is None
    optimizer = new_optimizer("momentum", weights, 0.1, WeightUpdate(momentum=MOMENTUM))
    assert velocity(optimizer) is None
    assert not optimizer.state  # asking leaves no trace
    first = [torch.randn_like(w) for w in weights]
    for w, g in zip(weights, first, strict=True):
        w.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(velocity(optimizer), [MOMENTUM * g for g in first])
