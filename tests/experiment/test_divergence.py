"""Tests of DivergenceMonitor: which losses count as divergence, and at which step it is detected."""

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
    """Returns the index of the first loss that the monitor reports as divergence, or None."""
    monitor = DivergenceMonitor(CPU, V)
    for i, loss in enumerate(losses):
        try:
            monitor.add(torch.tensor(loss), torch.tensor(norm))
        except Diverged:
            return i
    return None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_or_norm_diverges_at_once(odd):
    assert diverged([4.0, odd, 4.0]) == 1
    assert diverged([4.0], norm=odd) == 0


@given(st.lists(st.floats(0.01, 60.0), min_size=1, max_size=2 * MEMORY + 20))
def test_spike_is_recent_loss_above_three_running_means_and_chance(losses):
    """The reference computes the running mean step by step: first over the starting value and all steps, then
    exponentially."""
    expected, mean, recent, steps = None, math.log(V), math.log(V), 1
    for i, loss in enumerate(losses):
        recent = (1 - 1 / RECENT) * recent + loss / RECENT
        if abs(recent / max(SPIKE_FACTOR * mean, math.log(V)) - 1) < 1e-6:
            return  # The recent loss is too near the threshold for float32.
        if recent > SPIKE_FACTOR * mean and recent > math.log(V):
            expected = i
            break
        steps = min(steps + 1, MEMORY)
        mean = mean * (steps - 1) / steps + loss / steps
    assert diverged(losses) == expected


def test_single_outlier_and_noise_below_chance_are_no_spike():
    assert diverged([2.0] * 50 + [9.0] + [2.0] * 50) is None
    assert diverged([0.01] * 200 + [0.5] * 3) is None


def test_lasting_or_very_large_increase_is_a_spike():
    # The recent losses are 2.6, 3.9 and 4.9; the loss of chance is 4.6.
    assert diverged([1.0] * 400 + [9.0] * 20) == 402
    assert diverged([2.0] * 100 + [100.0]) == 100


def test_check_reports_divergence_of_earlier_steps(monkeypatch):
    monitor = DivergenceMonitor(CPU, V)
    with monkeypatch.context() as patch:  # On a GPU `add` does not call `check` either.
        patch.setattr(monitor, "check", lambda verdict: None)
        for loss in (4.0, math.nan, 4.0):
            monitor.add(torch.tensor(loss), torch.tensor(1.0))
    with pytest.raises(Diverged):
        monitor.check(monitor.verdict())
    monitor.load_state_dict(DivergenceMonitor(CPU, V).state_dict())
    monitor.check(monitor.verdict())


def test_state_dict_restores_the_monitor():
    a, b = DivergenceMonitor(CPU, V), DivergenceMonitor(CPU, V)
    for loss in (4.0, 3.0, 2.0):
        a.add(torch.tensor(loss), torch.tensor(1.0))
    b.load_state_dict(a.state_dict())
    a.add(torch.tensor(1.0), torch.tensor(1.0))
    b.add(torch.tensor(1.0), torch.tensor(1.0))
    assert (a.steps, a.mean.item(), a.recent.item()) == (b.steps, b.mean.item(), b.recent.item())


def test_rollbacks_are_counted_up_to_the_limit():
    monitor, error = DivergenceMonitor(CPU, V), Diverged("the training loss is nan")
    for number in range(1, 6):
        monitor.rollbacks = monitor.next_rollback(error, 7, 0.001, "adam", 0.25)
        assert monitor.rollbacks == number
    for clip, remedy in ((0.25, "or a lower --clip"), (0, "or with --clip 0.25")):
        message = f"step 7 after 5 rollbacks .*nan.*--lr below 0.001, the last that this adam run tried, {remedy}$"
        with pytest.raises(RunError, match=message):
            monitor.next_rollback(error, 7, 0.001, "adam", clip)


@pytest.mark.parametrize(("loss", "accepted"), [(4.0, True), (13.0, True), (14.0, False), (math.nan, False)])
def test_check_weights_limits_the_loss_of_one_batch(loss, accepted):
    """The limit is three times the loss of chance, at which the running mean starts: 13.8."""
    monitor = DivergenceMonitor(CPU, V)
    with nullcontext() if accepted else pytest.raises(Diverged, match="weights of the last step"):
        monitor.check_weights(torch.tensor(loss))
