"""Displays a running study, and has the rules that end a stage before its last trial.

Every event is a record of the study's events.jsonl, the only place that has the order in which trials ended.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from experiment import metrics
from experiment.run_directory import Run, append
from study.jobs import Job, last_line
from study.records import archive, log_event

HALTING = ("failures", "budget")  # These reasons end the whole study, and others only a stage.
FEW = 10  # The share of failed trials is judged once this many have ended.
SPARKS = "▁▂▃▄▅▆▇█"
MEANING = {
    "failures": "too many trials failed; see their .out files, and continue with --resume",
    "budget": "--budget_hours are spent; give more to continue with --resume",
    "converged": "no better cell for long enough (--converged)",
}


def reason_to_stop(
    values: Sequence[float], failed: int, allowed: int, hours: float, converged: int = 0, budget_hours: float = 0.0
) -> str:
    """Returns why a stage should end now, or "" if it should not.

    The reason is "failures" if more than a third of the `allowed` trials failed, or more than a fifth of at least
    `FEW` that have ended; "budget" if `hours` reach `budget_hours`; and "converged" if the last M = `converged` trials
    have no new best and a smaller standard deviation than the M before them. 0 disables either of the last two rules.

    Args:
        values: validation perplexities of the trials that are done, in the order in which they ended.
        failed: the number of trials that failed.
        allowed: the number of trials of the stage.
        hours: device time of the study so far.
    """
    ended, M = len(values) + failed, converged
    if failed > allowed / 3 or (ended >= FEW and failed > ended / 5):
        return "failures"
    if 0 < budget_hours <= hours:
        return "budget"
    if M > 1 and len(values) >= 2 * M:
        before, last = values[:-M], values[-M:]
        if min(last) >= min(before) and stdev(last) < stdev(before[-M:]):
            return "converged"
    return ""


@dataclass(eq=False)
class Monitor:
    """Counts, logs and displays the events of the trials of a stage."""

    run: Run  # It has the directory and the log of the study.
    todo: Sequence[Job]  # These are the jobs of the stage.
    expected: Mapping[str, float]  # Values are the predicted seconds of each job, by name.
    parallel: int  # So many trials run at a time.
    converged: int = 0  # This and the next are the rules of `reason_to_stop`.
    budget_hours: float = 0.0
    hours_elsewhere: float = 0.0  # This is the device time, in hours, that the study has used in other stages.
    devices: float = 0.0  # One trial occupies so many GPUs or cores.
    quiet: bool = False  # A quiet monitor neither logs nor records events.

    def __post_init__(self) -> None:
        run, todo = self.run, self.todo
        self.running: dict[str, tuple[int, float]] = {}  # Values are (epoch, validation perplexity).
        self.work = {job.name: metrics.seconds(run.folder / job.name) for job in todo}
        self.failures: set[str] = set()
        events = run.folder / metrics.EVENTS
        if events.exists() and events.read_bytes()[-1:] not in (b"", b"\n"):
            append(events, "\n")  # A full disk left the last line incomplete; the next record needs a line of its own.
        over = {job.name for job in todo if job.is_done(run.folder)}
        ended = [event for event in metrics.events(run.folder) if event["event"] in ("done", "halved")]
        self.over = {event["trial"]: event for event in ended if event["trial"] in over}
        for job in todo:  # A driver that was killed may not have recorded these.
            if job.name in over - self.over.keys():
                self.close(job)
        self.live: Live | None = None

    def __enter__(self) -> "Monitor":
        if sys.stdout.isatty():
            self.live = Live(self.table(), refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    # --- Events of a trial ---

    def started(self, job: Job) -> None:
        self.running[job.name] = (0, math.nan)
        self.record(job, "started")

    def epoch(self, job: Job, epoch: int, valid_ppl: float, seconds: float) -> None:
        """Notes that the trial has finished `epoch` with this validation perplexity, after `seconds` of work."""
        self.running[job.name] = (epoch, valid_ppl)
        self.work[job.name] = seconds

    def retried(self, job: Job) -> None:
        """Records that the trial's process died and that another process resumes the trial."""
        self.running.pop(job.name, None)
        self.record(job, "retried")
        self.log(f"{job.name}: its process ended; it is started again and resumes | {self.counts()}")

    def failed(self, job: Job) -> None:
        """Records that the trial failed and will not be retried."""
        self.running.pop(job.name, None)
        self.failures.add(job.name)
        reason = last_line(job.output(self.run.folder))
        self.record(job, "failed", reason=reason)
        self.log(f"{job.name}: failed ({reason}) | {self.counts()}")

    def ended(self, job: Job) -> None:
        """Handles the end of a trial: it is done, it is halved, or all trials end because the stage stops. A halved
        trial gets its halved.json here; one that ends because the stage stops can be resumed."""
        epoch, valid_ppl = self.running.pop(job.name, (0, math.nan))
        if job.name in self.over:
            return  # Its end is recorded already; halving only replayed its epochs.
        if job.is_done(self.run.folder):
            self.work[job.name] = metrics.seconds(self.run.folder / job.name)
        elif self.reason() or not epoch:
            return
        else:
            self.run.write(f"{job.name}/halved.json", {"epoch": epoch, "valid_ppl": valid_ppl})
        event = self.close(job)
        what = f"halved at epoch {epoch}, " if event["event"] == "halved" else ""
        self.log(f"{job.name}: {what}valid ppl {event['valid_ppl']:.2f} | {self.counts()}")

    def close(self, job: Job) -> dict[str, Any]:
        """Records that a trial is done or halved, keeps its small results, and returns the event."""
        result = metrics.result(self.run.folder / job.name)
        halved = None if result else metrics.read_json(self.run.folder / job.name / "halved.json")
        event = self.record(job, "halved" if halved else "done", valid_ppl=(halved or result)["valid_ppl"])
        self.over[job.name] = event
        if not self.quiet:
            archive(self.run.folder, job)
        return event

    def record(self, job: Job, event: str, **more: Any) -> dict[str, Any]:
        """Appends an event to events.jsonl, unless the monitor is quiet, and returns it."""
        record = {"trial": job.name, "event": event, **more}
        if not self.quiet:
            log_event(self.run.folder, **record)
        return record

    def log(self, line: str) -> None:
        if not self.quiet:
            self.run.log(line)

    # --- Statistics of the stage ---

    def values(self) -> list[float]:
        """Returns the validation perplexities of the trials that are done, in the order in which they ended."""
        return [event["valid_ppl"] for event in self.over.values() if event["event"] == "done"]

    def hours(self) -> float:
        """Returns the device time of the whole study so far, in hours."""
        return self.hours_elsewhere + sum(self.work.values()) * self.devices / 3600

    def reason(self) -> str:
        """Returns why no further trial should run, or "" while trials should run; see `reason_to_stop`."""
        counts = (len(self.failures), len(self.todo))
        return reason_to_stop(self.values(), *counts, self.hours(), self.converged, self.budget_hours)

    def seconds_left(self) -> float:
        """Returns the predicted seconds until the stage ends. Predictions are scaled by the ratio of actual to
        predicted time of the trials that are done."""
        left = {name: seconds for name, seconds in self.expected.items() if name not in self.over}
        done = [name for name in self.expected if name not in left and self.over[name]["event"] == "done"]
        predicted = sum(self.expected[name] for name in done)
        ratio = sum(self.work[name] for name in done) / predicted if predicted else 1.0
        rest = [max(0.0, ratio * seconds - self.work[name]) for name, seconds in left.items()]
        return max(sum(rest) / self.parallel, max(rest, default=0.0))

    def counts(self) -> str:
        """Returns one line with the progress of the stage."""
        values = self.values()
        halved = len(self.over) - len(values)
        left = len(self.todo) - len(self.over) - len(self.failures) - len(self.running)
        return (
            f"{len(self.running)} running, {len(values)} done, "
            + (f"{halved} halved, " if halved else "")
            + f"{len(self.failures)} failed, {left} to come"
            + (f" | best {min(values):.2f}, median {median(values):.2f}" if values else "")
            + f" | {tqdm.format_interval(self.seconds_left())} left"
        )

    def table(self) -> Group:
        """Returns the display for a terminal: the running trials, and curves of the best and the median perplexity."""
        table = Table("trial", "epoch", "valid ppl", box=None)
        for name, (epoch, valid_ppl) in self.running.items():
            table.add_row(name, str(epoch), "" if math.isnan(valid_ppl) else f"{valid_ppl:.2f}")
        values = self.values()
        curves = [
            Text(f"{name:>6} so far  {sparks([of(values[: i + 1]) for i in range(len(values))])}")
            for name, of in (("best", min), ("median", median)) if values
        ]  # fmt: skip
        return Group(table, *curves, Text(self.counts()))

    def refresh(self) -> None:
        if self.live:
            self.live.update(self.table())


def sparks(values: Sequence[float]) -> str:
    """Returns a curve of block characters, scaled to the range of `values`."""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)
