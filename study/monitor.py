"""What one sees of a study while it runs, and when a stage of it ends before its last trial.

Every event is a row of events.jsonl in the study; the order in which trials ended stands nowhere else.
"""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any, NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from experiment import metrics
from experiment.run_directory import Run, append
from study import jobs
from study.jobs import Job

HALTING = ("failures", "budget")  # reasons that end a study, not a stage
FEW = 10  # trials that must have ended before the share that failed counts
SPARKS = "▁▂▃▄▅▆▇█"
MEANING = {
    "failures": "too many trials failed; see their .out files, and go on with --resume",
    "budget": "--budget_hours are spent; give more to go on with --resume",
    "converged": "no better cell for long enough (--converged)",
}


class Rules(NamedTuple):
    """When to stop: after `converged` trials without a better one, and at so many hours of device time; 0 for never."""

    converged: int = 0
    budget_hours: float = 0.0

    def reason(self, values: Sequence[float], failed: int, allowed: int, hours: float) -> str:
        """Why a stage should end here, "" if it should not.

        values: validation perplexities of the trials that were done, in that order. allowed: how many trials there are
        to be. failures: more than a third of those allowed, or, of at least `FEW` that have ended, more than a fifth.
        converged: the last M trials hold no new best, and spread less than the M before them.
        """
        ended, M = len(values) + failed, self.converged
        if failed > allowed / 3 or (ended >= FEW and failed > ended / 5):
            return "failures"
        if 0 < self.budget_hours <= hours:
            return "budget"
        if M > 1 and len(values) >= 2 * M:
            before, last = values[:-M], values[-M:]
            if min(last) >= min(before) and stdev(last) < stdev(before[-M:]):
                return "converged"
        return ""


class Monitor:
    """Counts, tells and draws what becomes of the trials of a stage.

    Args:
        run: the directory and the log of the study.
        expected: seconds that each job was foreseen to take, by name.
        hours: device time that the study has taken in other stages; `devices`: what one trial takes at a time.
        quiet: leave no trace of it.
    """

    def __init__(
        self, run: Run, todo: Sequence[Job], expected: Mapping[str, float], parallel: int, rules: Rules | None = None,
        hours: float = 0.0, devices: float = 0.0, quiet: bool = False,
    ):  # fmt: skip
        self.run, self.todo, self.expected, self.parallel = run, todo, expected, parallel
        self.rules, self.hours_elsewhere, self.devices = rules or Rules(), hours, devices
        self.quiet = quiet
        self.running: dict[str, tuple[int, float]] = {}  # epoch and validation perplexity, by name
        self.work = {job.name: metrics.seconds(run.folder / job.name) for job in todo}
        self.failures: set[str] = set()
        repair_jsonl(run.folder / metrics.EVENTS)
        over = {job.name for job in todo if job.is_done(run.folder)}
        told = [event for event in metrics.events(run.folder) if event["event"] in ("done", "halved")]
        self.over = {event["trial"]: event for event in told if event["trial"] in over}
        for job in todo:  # what a driver that was killed did not come to say
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

    # --- what becomes of a trial ---

    def started(self, job: Job) -> None:
        self.running[job.name] = (0, math.nan)
        self.record(job, "started")

    def epoch(self, job: Job, epoch: int, valid_ppl: float, seconds: float) -> None:
        """The trial has got so far, in so many seconds of work."""
        self.running[job.name] = (epoch, valid_ppl)
        self.work[job.name] = seconds

    def retried(self, job: Job) -> None:
        """Its process is gone, and another goes on."""
        self.running.pop(job.name, None)
        self.record(job, "retried")
        self.log(f"{job.name}: its process ended; it is started again, to go on | {self.counts()}")

    def failed(self, job: Job) -> None:
        """And will not be tried again."""
        self.running.pop(job.name, None)
        self.failures.add(job.name)
        reason = jobs.last_line(self.output(job))
        self.record(job, "failed", reason=reason)
        self.log(f"{job.name}: failed ({reason}) | {self.counts()}")

    def ended(self, job: Job) -> None:
        """By itself, halved, or with all others because the stage is to stop."""
        epoch, valid_ppl = self.running.pop(job.name, (0, math.nan))
        if job.name in self.over:
            return  # told of before; it only showed the halving how far it had got
        if job.is_done(self.run.folder):
            self.work[job.name] = metrics.seconds(self.run.folder / job.name)
            event = self.close(job)
        elif self.reason() or not epoch:
            return
        else:
            self.run.write(f"{job.name}/halved.json", {"epoch": epoch, "valid_ppl": valid_ppl})
            event = self.close(job)
        what = f"halved at epoch {epoch}, " if event["event"] == "halved" else ""
        self.log(f"{job.name}: {what}valid ppl {event['valid_ppl']:.2f} | {self.counts()}")

    def close(self, job: Job) -> dict[str, Any]:
        """Record how a trial ended."""
        found = metrics.result(self.run.folder / job.name)
        halved = None if found else metrics.read_json(self.run.folder / job.name / "halved.json")
        event = self.record(job, "halved" if halved else "done", valid_ppl=(halved or found)["valid_ppl"])
        self.over[job.name] = event
        return event

    def output(self, job: Job) -> Path:
        return self.run.folder / f"{job.name}.out"

    def record(self, job: Job, event: str, **more: Any) -> dict[str, Any]:
        """Add a row to events.jsonl."""
        row = {"trial": job.name, "event": event, **more}
        if not self.quiet:
            log_event(self.run.folder, **row)
        return row

    def log(self, line: str) -> None:
        if not self.quiet:
            self.run.log(line)

    # --- what follows from it ---

    def values(self) -> list[float]:
        """Validation perplexities of the trials that are done, in that order."""
        return [event["valid_ppl"] for event in self.over.values() if event["event"] == "done"]

    def hours(self) -> float:
        """Device time of the whole study so far."""
        return self.hours_elsewhere + sum(self.work.values()) * self.devices / 3600

    def reason(self) -> str:
        """Why no further trial is to run; "" as long as they are."""
        return self.rules.reason(self.values(), len(self.failures), len(self.todo), self.hours())

    def seconds_left(self) -> float:
        """Going by what trials were foreseen to take, and how right that was for those that are over."""
        done = [job.name for job in self.todo if job.name in self.over and self.over[job.name]["event"] == "done"]
        foreseen = sum(self.expected[name] for name in done)
        pace = sum(self.work[name] for name in done) / foreseen if foreseen else 1.0
        left = [
            max(0.0, pace * self.expected[j.name] - self.work[j.name]) for j in self.todo if j.name not in self.over
        ]
        return max(sum(left) / self.parallel, max(left, default=0.0))

    def counts(self) -> str:
        """One line on how far it is."""
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
        """For a terminal: the trials that run, and the best and the median of those that are done, one by one."""
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
    """A curve of characters, low to high."""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def log_event(study: Path, **row: Any) -> None:
    """Add a row to events.jsonl, with the time."""
    append(study / metrics.EVENTS, json.dumps({"at": time.time(), **row}) + "\n")


def repair_jsonl(path: Path) -> None:
    """Let the next row of a file begin on a line of its own, where a full disk cut the last one off."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        append(path, "\n")
