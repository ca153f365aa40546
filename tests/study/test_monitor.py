"""The monitor counts, records and displays the trials of a stage, and its rules stop the stage."""

import json
from statistics import median

import pytest

from experiment.metrics import EVENTS, events
from experiment.run_directory import Run
from study.jobs import Job
from study.monitor import Monitor, reason_to_stop, sparks

FALLING = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0]
STILL = [2.0, 9.0, 5.0, 4.0, 4.1, 4.2]


@pytest.mark.parametrize(
    ("rules", "values", "failed", "allowed", "hours", "reason"),
    [
        ({}, FALLING, 0, 6, 1e9, ""),
        ({}, [], 2, 6, 0, ""),  # Exactly a third of the allowed trials failed, which is not enough.
        ({}, [], 3, 6, 0, "failures"),
        ({}, [1.0] * 7, 2, 100, 0, ""),  # The nine trials that ended are too few to judge.
        ({}, [1.0] * 8, 2, 100, 0, ""),  # Exactly a fifth of the trials failed, which is not enough.
        ({}, [1.0] * 8, 3, 100, 0, "failures"),
        ({"budget_hours": 2}, [], 0, 6, 1.9, ""),
        ({"budget_hours": 2}, [], 0, 6, 2.0, "budget"),
        ({"converged": 3}, FALLING, 0, 6, 0, ""),  # The trials still improve.
        ({"converged": 3}, STILL, 0, 6, 0, "converged"),
        ({"converged": 3}, STILL[:5], 0, 6, 0, ""),  # There are fewer than 2 * 3 values.
        ({"converged": 3}, [2.0, 4.0, 4.1, 4.2, 5.0, 9.0], 0, 6, 0, ""),  # The standard deviation grows.
        ({"converged": 3, "budget_hours": 1}, STILL, 3, 6, 2, "failures"),
    ],
)
def test_rules_stop_a_stage_for_failures_budget_or_convergence(rules, values, failed, allowed, hours, reason):
    assert reason_to_stop(values, failed, allowed, hours, **rules) == reason


def finish(folder, name, valid_ppl, seconds=10.0):
    """Writes metrics.jsonl and result.json as a finished run does."""
    (folder / name).mkdir(parents=True)
    record = {"kind": "epoch", "epoch": 1, "valid_ppl": valid_ppl, "seconds": seconds}
    (folder / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    result = {"valid_ppl": valid_ppl, "test_ppl": None, "genotype": "LSTM"}
    (folder / name / "result.json").write_text(json.dumps(result))


@pytest.fixture
def todo():
    return [Job(f"select/cell-{i}/1", "train.py", ()) for i in range(4)]


def test_monitor_counts_and_records_the_events_of_a_stage(tmp_path, todo):
    run = Run(tmp_path / "study")
    expected = {job.name: 20.0 for job in todo}
    monitor = Monitor(run, todo, expected, 2, budget_hours=1, hours_elsewhere=0.5, devices=2)
    assert monitor.seconds_left() == 40  # The work takes 80 seconds, with two trials at a time.
    monitor.started(todo[0])
    monitor.started(todo[1])
    monitor.epoch(todo[0], 1, 70.0, 5.0)
    assert "2 running, 0 done, 0 failed, 2 to come" in monitor.counts()
    finish(run.folder, todo[0].name, 60.0)
    monitor.ended(todo[0])
    # The first trial took half of its predicted time, and so will the other three.
    assert monitor.seconds_left() == 15
    assert monitor.hours() == 0.5 + 2 * 10 / 3600
    monitor.retried(todo[1])
    monitor.started(todo[1])
    finish(run.folder, todo[1].name, 50.0)
    monitor.ended(todo[1])
    monitor.started(todo[2])
    (run.folder / todo[2].name).mkdir(parents=True)
    (run.folder / f"{todo[2].name}.out").write_text("Traceback\nerror: the disk is full\n\n")
    monitor.failed(todo[2])
    assert monitor.counts().startswith("0 running, 2 done, 1 failed, 1 to come | best 50.00, median 55.00")
    assert monitor.values() == [60.0, 50.0]
    assert monitor.reason() == ""

    recorded = [(event["trial"][-3], event["event"]) for event in events(run.folder)]
    assert recorded == [("0", "started"), ("1", "started"), ("0", "done"), ("1", "retried"), ("1", "started"),
                    ("1", "done"), ("2", "started"), ("2", "failed")]  # fmt: skip
    assert events(run.folder)[-1]["reason"] == "error: the disk is full"
    assert "cell-2/1: failed (error: the disk is full)" in (run.folder / "log.txt").read_text()


def test_new_monitor_restores_results_of_a_killed_driver(tmp_path, todo):
    """A trial that finished without an event, as when the driver was killed, is recorded once."""
    run = Run(tmp_path / "study")
    monitor = Monitor(run, todo, dict.fromkeys((job.name for job in todo), 9.0), 2)
    for job, ppl in ((todo[2], 30.0), (todo[0], 40.0)):
        finish(run.folder, job.name, ppl)
        monitor.ended(job)
    finish(run.folder, todo[3].name, 20.0)  # This trial has no event.
    with open(run.folder / EVENTS, "a") as file:
        file.write('{"cut off')
    restored = Monitor(run, todo, dict.fromkeys((job.name for job in todo), 9.0), 2)
    assert restored.values() == [30.0, 40.0, 20.0]
    assert Monitor(run, todo, dict.fromkeys((job.name for job in todo), 9.0), 2).values() == restored.values()
    assert [event["trial"] for event in events(run.folder)].count(todo[3].name) == 1


def test_halved_trial_is_done_and_has_no_value(tmp_path, todo):
    run = Run(tmp_path / "study")
    monitor = Monitor(run, todo, dict.fromkeys((job.name for job in todo), 9.0), 2)
    (run.folder / todo[0].name).mkdir(parents=True)
    monitor.started(todo[0])
    monitor.epoch(todo[0], 2, 88.0, 5.0)
    monitor.ended(todo[0])
    assert json.loads((run.folder / todo[0].name / "halved.json").read_text()) == {"epoch": 2, "valid_ppl": 88.0}
    assert todo[0].is_done(run.folder)
    assert monitor.values() == []
    assert "1 halved" in monitor.counts()


def test_trial_ended_with_its_stage_is_not_halved(tmp_path, todo):
    run = Run(tmp_path / "study")
    monitor = Monitor(run, todo, {}, 2, budget_hours=1, hours_elsewhere=2, devices=1)
    (run.folder / todo[0].name).mkdir(parents=True)
    monitor.started(todo[0])
    monitor.ended(todo[0])
    assert not todo[0].is_done(run.folder)


def test_quiet_monitor_writes_no_events_and_no_log(tmp_path, todo):
    run = Run(tmp_path / "study")
    monitor = Monitor(run, todo, {job.name: 0.0 for job in todo}, 2, quiet=True)
    finish(run.folder, todo[0].name, 60.0)
    monitor.started(todo[0])
    monitor.ended(todo[0])
    assert not (run.folder / EVENTS).exists()
    assert not (run.folder / "log.txt").exists()


def test_table_shows_running_trials_and_both_curves(tmp_path, todo):
    from rich.console import Console

    run = Run(tmp_path / "study")
    monitor = Monitor(run, todo, dict.fromkeys((job.name for job in todo), 1.0), 2)
    for job, ppl in zip(todo[:3], (50.0, 40.0, 90.0), strict=True):
        finish(run.folder, job.name, ppl)
        monitor.ended(job)
    monitor.started(todo[3])
    monitor.epoch(todo[3], 7, 66.0, 1.0)
    with (console := Console(width=100)).capture() as captured:
        console.print(monitor.table())
    text = captured.get()
    assert "cell-3/1  7      66.00" in text
    assert f"best so far  {sparks([50, 40, 40])}" in text
    assert f"median so far  {sparks([50, median([50, 40]), 50])}" in text


def test_sparks_scales_values_to_block_characters():
    assert sparks([1, 2, 3]) == "▁▅█"
    assert sparks([4, 4]) == "▁▁"
