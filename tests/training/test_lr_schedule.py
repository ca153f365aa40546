"""The learning rate of every step of a run, against closed forms and against torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from training.lr_schedule import Decay, Schedule, WarmUp

LR, EPOCHS, STEPS = 4.0, 6, 10  # steps of an epoch


def optimizer(lr=LR):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(schedule, steps=STEPS, losses=None):
    """That of each step of a run, whose epochs have `steps` steps each."""
    moved, found = optimizer(), []
    for step in range(schedule.epochs * steps):
        schedule.set_rate(moved, step, step / steps)
        found.append(moved.param_groups[0]["lr"])
        if (step + 1) % steps == 0 and losses:
            schedule.close_epoch(losses[step // steps])
    return found


def torchs(build, lr=LR, every=1, steps=STEPS * EPOCHS):
    """The rates of a scheduler of torch that moves every so many steps."""
    moved, found = optimizer(lr), []
    scheduler = build(moved)
    for step in range(steps):
        found.append(moved.param_groups[0]["lr"])
        moved.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


def plain(name, **how):
    return Schedule(LR, EPOCHS, WarmUp(), Decay(name, **how))


def test_a_constant_rate_is_the_rate_to_the_bit():
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
def test_a_whole_run_has_the_rates_of_torchs_scheduler(schedule, build, every):
    assert rates(schedule) == pytest.approx(torchs(build, every=every), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(end=st.floats(0, LR), power=st.floats(0.1, 5), cycle=st.integers(0, EPOCHS))
def test_polynomial_decay_is_its_formula(end, power, cycle):
    decay_steps = (cycle or EPOCHS) * STEPS
    found = rates(plain("polynomial", final=end, power=power, cycle=cycle))
    expected = [(LR - end) * (1 - (s % decay_steps) / decay_steps) ** power + end for s in range(EPOCHS * STEPS)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("losses", [[5, 4, 4, 4, 3, 3], [5, 5, 5, 5, 5, 5], [6, 5, 4, 3, 2, 1], [1, 2, 3, 1, 0.5, 9]])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_plateau_is_torchs(losses, patience):
    def build(o):
        return lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=patience, threshold=0, eps=0)

    moved, expected = optimizer(), []
    scheduler = build(moved)
    for loss in losses:
        expected += [moved.param_groups[0]["lr"]] * STEPS
        scheduler.step(loss)
    assert rates(plain("plateau", gamma=0.3, patience=patience), losses=losses) == pytest.approx(expected)


def test_a_linear_warm_up_is_torchs():
    found = rates(Schedule(LR, EPOCHS, WarmUp(25, "linear", 0.2), Decay()))
    expected = torchs(lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=25))
    assert found == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, EPOCHS * STEPS), start=st.floats(0.001, 1), shape=st.sampled_from(["linear", "exponential"]),
    name=st.sampled_from(["constant", "step", "exponential", "cosine", "polynomial"]),
)  # fmt: skip
def test_warm_up_and_decay_are_one_after_the_other(n, start, shape, name):
    """The decay begins where the warm-up ends, from the full rate, and has what is left of the run."""
    found = rates(Schedule(LR, EPOCHS, WarmUp(n, shape, start), Decay(name, final=0.25 if "os" in name else 0.0)))
    for step in range(n):
        share = step / n
        up = start + (1 - start) * share if shape == "linear" else start * (1 / start) ** share
        assert found[step] == pytest.approx(LR * up, rel=1e-9)
    left = EPOCHS * STEPS - n
    for k, rate in enumerate(found[n:]):
        expected = {
            "constant": LR,
            "step": LR * 0.5 ** ((k + 1e-6) // STEPS),
            "exponential": LR * 0.5 ** (k / STEPS),
            "cosine": 0.25 + (LR - 0.25) * 0.5 * (1 + math.cos(math.pi * k / left)),
            "polynomial": LR * (1 - k / left),
        }[name]
        if name == "step" and k % STEPS == 0:  # the very step of a fall: to rounding
            continue
        assert rate == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_steps_of_other_lengths_end_at_the_same_rate():
    """The rate belongs to the text that has been read, not to the number of steps."""
    for steps in (3, 10, 77):
        schedule = Schedule(LR, EPOCHS, WarmUp(2), Decay("cosine"))
        schedule.set_rate(optimizer(), 2, 1.0)
        assert schedule.rate(steps, 3.5) == pytest.approx(LR / 2)
        assert schedule.rate(steps, 6.0) == pytest.approx(0)


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "cosine", "polynomial", "plateau"])
@pytest.mark.parametrize("stop", [1, 7, 25, 44])
def test_a_schedule_that_goes_on_from_its_state_has_the_same_rates(name, stop):
    losses = [5, 5, 5, 4, 4, 4]

    def new():
        return Schedule(LR, EPOCHS, WarmUp(13), Decay(name, patience=1))

    expected, first, second, moved, found = rates(new(), losses=losses), new(), new(), optimizer(), []
    for step in range(EPOCHS * STEPS):
        if step == stop:
            second.load_state_dict(first.state_dict())
        schedule = first if step < stop else second
        schedule.set_rate(moved, step, step / STEPS)
        found.append(moved.param_groups[0]["lr"])
        if (step + 1) % STEPS == 0:
            schedule.close_epoch(losses[step // STEPS])
    assert found == expected


def test_what_a_rollback_takes_off_stays_off():
    schedule = plain("cosine", final=0.5)
    before = rates(schedule)
    schedule.scale *= 0.5
    assert rates(schedule) == pytest.approx([rate / 2 for rate in before])
