"""The learning rate of every step of a run matches closed forms and torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from training.lr_schedule import Decay, Schedule, WarmUp

LR, EPOCHS, STEPS = 4.0, 6, 10  # STEPS is the number of steps per epoch


def optimizer(lr=LR):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(schedule, steps=STEPS, losses=None):
    """Returns the rate of each step of a run with `steps` steps per epoch."""
    sgd, actual = optimizer(), []
    for step in range(schedule.epochs * steps):
        schedule.set_rate(sgd, step, step / steps)
        actual.append(sgd.param_groups[0]["lr"])
        if (step + 1) % steps == 0 and losses:
            schedule.close_epoch(losses[step // steps])
    return actual


def torch_rates(build, lr=LR, every=1, steps=STEPS * EPOCHS):
    """Returns the rates of a torch scheduler that is advanced every `every` steps."""
    sgd, actual = optimizer(lr), []
    scheduler = build(sgd)
    for step in range(steps):
        actual.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return actual


def plain(name, **how):
    return Schedule(LR, EPOCHS, WarmUp(), Decay(name, **how))


def test_constant_rate_is_bit_identical():
    assert rates(plain("constant")) == [LR] * (EPOCHS * STEPS)


@pytest.mark.parametrize(
    ("schedule", "build", "every"),
    [
        (plain("cosine"), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=EPOCHS * STEPS), 1),
        (plain("cosine", final=0.5), lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * STEPS, eta_min=0.5), 1),
        (plain("cosine", cycle=2), lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2 * STEPS), 1),
        (plain("polynomial", power=2.5), lambda o: lr_scheduler.PolynomialLR(o, EPOCHS * STEPS, power=2.5), 1),
        (plain("step", step_size=2, gamma=0.3), lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3), STEPS),
        (plain("exponential", gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9 ** (1 / STEPS)), 1),
    ],
)
def test_rates_match_torch_scheduler(schedule, build, every):
    assert rates(schedule) == pytest.approx(torch_rates(build, every=every), rel=1e-9)


@settings(max_examples=60)
@given(end=st.floats(0, LR), power=st.floats(0.1, 5), cycle=st.integers(0, EPOCHS))
def test_polynomial_decay_matches_formula(end, power, cycle):
    decay_steps = (cycle or EPOCHS) * STEPS
    actual = rates(plain("polynomial", final=end, power=power, cycle=cycle))
    expected = [(LR - end) * (1 - (s % decay_steps) / decay_steps) ** power + end for s in range(EPOCHS * STEPS)]
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("losses", [[5, 4, 4, 4, 3, 3], [5, 5, 5, 5, 5, 5], [6, 5, 4, 3, 2, 1], [1, 2, 3, 1, 0.5, 9]])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_plateau_rates_match_torch(losses, patience):
    def build(o):
        return lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=patience, threshold=0, eps=0)

    sgd, expected = optimizer(), []
    scheduler = build(sgd)
    for loss in losses:
        expected += [sgd.param_groups[0]["lr"]] * STEPS
        scheduler.step(loss)
    assert rates(plain("plateau", gamma=0.3, patience=patience), losses=losses) == pytest.approx(expected)


def test_linear_warm_up_matches_torch():
    actual = rates(Schedule(LR, EPOCHS, WarmUp(25, "linear", 0.2), Decay()))
    expected = torch_rates(lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=25))
    assert actual == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60)
@given(
    n=st.integers(1, EPOCHS * STEPS), start=st.floats(0.001, 1), shape=st.sampled_from(["linear", "exponential"]),
    name=st.sampled_from(["constant", "step", "exponential", "cosine", "polynomial"]),
)  # fmt: skip
def test_decay_starts_after_warm_up(n, start, shape, name):
    """The decay begins at the full rate where the warm-up ends, and takes the remaining steps of the run."""
    actual = rates(Schedule(LR, EPOCHS, WarmUp(n, shape, start), Decay(name, final=0.25 if "os" in name else 0.0)))
    for step in range(n):
        share = step / n
        up = start + (1 - start) * share if shape == "linear" else start * (1 / start) ** share
        assert actual[step] == pytest.approx(LR * up, rel=1e-9)
    left = EPOCHS * STEPS - n
    for k, rate in enumerate(actual[n:]):
        expected = {
            "constant": LR,
            "step": LR * 0.5 ** ((k + 1e-6) // STEPS),
            "exponential": LR * 0.5 ** (k / STEPS),
            "cosine": 0.25 + (LR - 0.25) * 0.5 * (1 + math.cos(math.pi * k / left)),
            "polynomial": LR * (1 - k / left),
        }[name]
        if name == "step" and k % STEPS == 0:  # rounding decides whether the rate has fallen at this step
            continue
        assert rate == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_rate_is_independent_of_step_length():
    """The rate depends on the fraction of the text that has been read, not on the number of steps."""
    for steps in (3, 10, 77):
        schedule = Schedule(LR, EPOCHS, WarmUp(2), Decay("cosine"))
        schedule.set_rate(optimizer(), 2, 1.0)
        assert schedule.rate(steps, 3.5) == pytest.approx(LR / 2)
        assert schedule.rate(steps, 6.0) == pytest.approx(0)


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "cosine", "polynomial", "plateau"])
@pytest.mark.parametrize("stop", [1, 7, 25, 44])
def test_resumed_schedule_has_identical_rates(name, stop):
    losses = [5, 5, 5, 4, 4, 4]

    def new():
        return Schedule(LR, EPOCHS, WarmUp(13), Decay(name, patience=1))

    expected, first, second, sgd, actual = rates(new(), losses=losses), new(), new(), optimizer(), []
    for step in range(EPOCHS * STEPS):
        if step == stop:
            second.load_state_dict(first.state_dict())
        schedule = first if step < stop else second
        schedule.set_rate(sgd, step, step / STEPS)
        actual.append(sgd.param_groups[0]["lr"])
        if (step + 1) % STEPS == 0:
            schedule.close_epoch(losses[step // STEPS])
    assert actual == expected


def test_rollback_scale_applies_to_the_whole_schedule():
    schedule = plain("cosine", final=0.5)
    before = rates(schedule)
    schedule.scale *= 0.5
    assert rates(schedule) == pytest.approx([rate / 2 for rate in before])
