"""Tests the means, times and speeds that a run records."""

import torch
from helpers import read_records

from experiment import progress
from experiment.run_directory import Run


def test_recorded_losses_are_means_over_the_tokens_since_the_last_record(tmp_path):
    """The interval ends after the second and the third step; a loss counts by its tokens, a norm by its step."""
    tracked = progress.Progress(Run(tmp_path / "run"), torch.device("cpu"), 1, 60)
    losses_and_norms = [(1.0, 3.0), (2.0, 5.0), (4.0, 7.0)]
    segments = tracked.track([(0, 10), (10, 30), (40, 20)], columns=2)
    for (_, length), (loss, norm) in zip(segments, losses_and_norms, strict=True):
        tracked.advance(torch.tensor(loss), torch.tensor(norm), (length, 2), 1.0)
        if loss > 1:
            tracked.close_interval(tracked.interval_means(), 1.0)
    tracked.close_epoch(1.0, 1.0)
    first, second, epoch = read_records(tmp_path / "run")
    assert [(record["loss"], record["norm"]) for record in (first, second)] == [(1.75, 4.0), (4.0, 7.0)]
    assert epoch["loss"] == 2.5


def test_seconds_of_a_run_that_rolls_back_are_those_of_all_its_work(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    tracked = progress.Progress(Run(tmp_path / "run"), torch.device("cpu"), 1, 100)
    before = tracked.state_dict()
    for _ in tracked.track([(0, 10), (10, 10)], columns=3):
        clock[0] += 20
        tracked.advance(torch.tensor(1.0), torch.tensor(1.0), (10, 3), 1.0)
        tracked.close_interval(tracked.interval_means(), 1.0)
    tracked.load_state_dict(before)
    clock[0] += 5
    assert (tracked.step, tracked.elapsed()) == (0, 45)


def test_measurement_time_is_not_counted_as_step_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    tracked = progress.Progress(Run(tmp_path / "run"), torch.device("cpu"), 1, 100)
    for _ in tracked.track([(0, 10)], columns=3):
        clock[0] += 2
        tracked.advance(torch.tensor(1.0), torch.tensor(1.0), (10, 3), 1.0)
        with tracked.paused():
            clock[0] += 50
        tracked.close_interval(tracked.interval_means(), 1.0)
    [record] = read_records(tmp_path / "run")
    assert record["tokens_per_s"] == 30 / 2 and record["seconds"] == 52
