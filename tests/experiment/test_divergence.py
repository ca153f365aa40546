"""What counts as a run gone astray, and that it is noticed where the host looks."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiment.divergence import MEMORY, RECENT, SPIKE_FACTOR, DivergenceMonitor
from utils import Diverged, RunError

CPU = torch.device("cpu")
V = 100


def diverged(losses, norm=1.0):
    """The first of the losses that is noticed; None if none is."""
    watch = DivergenceMonitor(CPU, V)
    for i, loss in enumerate(losses):
        try:
            watch.add(torch.tensor(loss), torch.tensor(norm))
        except Diverged:
            return i
    return None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_noticed_at_once(odd):
    assert diverged([4.0, odd, 4.0]) == 1
    assert diverged([4.0], norm=odd) == 0


@given(st.lists(st.floats(0.01, 60.0), min_size=1, max_size=2 * MEMORY + 20))
def test_a_leap_is_a_recent_loss_above_three_running_means_and_worse_than_chance(losses):
    """Against the running mean written as a plain sum: of all steps and the starting value, then exponential."""
    expected, mean, recent, steps = None, math.log(V), math.log(V), 1
    for i, loss in enumerate(losses):
        recent = (1 - 1 / RECENT) * recent + loss / RECENT
        if abs(recent / max(SPIKE_FACTOR * mean, math.log(V)) - 1) < 1e-6:
            return  # too near to tell in float32
        if recent > SPIKE_FACTOR * mean and recent > math.log(V):
            expected = i
            break
        steps = min(steps + 1, MEMORY)
        mean = mean * (steps - 1) / steps + loss / steps
    assert diverged(losses) == expected


def test_one_odd_batch_and_noise_below_chance_are_no_leap():
    assert diverged([2.0] * 50 + [9.0] + [2.0] * 50) is None
    assert diverged([0.01] * 200 + [0.5] * 3) is None


def test_a_loss_that_stays_up_or_leaps_far_is_one():
    assert diverged([1.0] * 400 + [9.0] * 20) == 402  # 2.6, 3.9, 4.9 where chance is 4.6
    assert diverged([2.0] * 100 + [100.0]) == 100


def test_a_step_that_nobody_waited_for_is_told_by_check(monkeypatch):
    watch = DivergenceMonitor(CPU, V)
    with monkeypatch.context() as patch:  # as on a GPU, where `add` does not look
        patch.setattr(watch, "check", lambda: None)
        for loss in (4.0, math.nan, 4.0):
            watch.add(torch.tensor(loss), torch.tensor(1.0))
    with pytest.raises(Diverged):
        watch.check()
    watch.load_state_dict(DivergenceMonitor(CPU, V).state_dict())
    watch.check()


def test_the_state_is_all_that_it_knows():
    a, b = DivergenceMonitor(CPU, V), DivergenceMonitor(CPU, V)
    for loss in (4.0, 3.0, 2.0):
        a.add(torch.tensor(loss), torch.tensor(1.0))
    b.load_state_dict(a.state_dict())
    a.add(torch.tensor(1.0), torch.tensor(1.0))
    b.add(torch.tensor(1.0), torch.tensor(1.0))
    assert (a.steps, a.mean.item(), a.recent.item()) == (b.steps, b.mean.item(), b.recent.item())


def test_rollbacks_are_counted_and_end():
    watch, fault = DivergenceMonitor(CPU, V), Diverged("the training loss is nan")
    for number in (1, 2):
        watch.rollbacks = watch.count(fault, 2, 7)
        assert watch.rollbacks == number
    with pytest.raises(RunError, match=r"step 7 after 2 rollbacks .*nan.*--lr"):
        watch.count(fault, 2, 7)
    with pytest.raises(RunError, match="diverged at step 7: "):
        DivergenceMonitor(CPU, V).count(fault, 0, 7)


@pytest.mark.parametrize(("loss", "fit"), [(4.0, True), (13.0, True), (14.0, False), (math.nan, False)])
def test_weights_are_judged_by_one_loss(loss, fit):
    """Three times the loss of chance, where the running mean begins, is 13.8."""
    watch = DivergenceMonitor(CPU, V)
    with nullcontext() if fit else pytest.raises(Diverged, match="weights of the last step"):
        watch.check_weights(torch.tensor(loss))
