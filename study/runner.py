"""Runs the stages of a study: measures and plans their cost, runs their jobs on Ray, and applies the stopping rules."""

import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

import data
from experiment import metrics
from experiment.run_directory import Run
from study import cost, ray_backend
from study.cost import Resources
from study.jobs import Job, last_line
from study.monitor import HALTING, MEANING, Monitor
from study.records import log_event
from study.summary import SHARE
from utils import RunError

TIMINGS = "paces.json"


class StudyRunner:
    """Runs jobs of a study, as many at a time as fit on the Ray cluster that this process is connected to. The
    constructor raises `RunError` if no machine has the resources of one trial."""

    def __init__(self, run: Run, args: Namespace, corpus: data.Corpus):
        self.run, self.args, self.corpus = run, args, corpus
        self.interrupted = False
        self.timings: dict[str, cost.Timing] = {}  # The keys are kinds of jobs.
        gpus = args.gpus_per_trial
        self.resources = Resources(args.cpus_per_trial, float(ray_backend.has_gpus()) if gpus is None else gpus)
        max_concurrent_trials = ray_backend.max_concurrent_trials(self.resources)
        if max_concurrent_trials < 1:
            asked = f"--cpus_per_trial {self.resources.cpus:g} --gpus_per_trial {self.resources.gpus:g}"
            raise RunError(f"{asked}: no machine has so much; ask for less")
        self.parallel = min(args.parallel or sys.maxsize, max_concurrent_trials)
        for left in run.folder.glob("tune-*"):  # A driver that was killed leaves these.
            shutil.rmtree(left, ignore_errors=True)
        run.write(SHARE, self.resources._asdict())

    def measure(self, todo: Sequence[Job]) -> None:
        """Measures the seconds of a step for each kind of job, with as many trials at a time as the study will run.
        Measured timings are saved and reused. Raises `RunError` if a probe fails."""
        key = f"{self.resources.cpus:g} cores, {self.resources.gpus:g} GPUs, {self.parallel} at a time: "
        saved = metrics.read_json(self.run.folder / TIMINGS) or {}
        known = {kind: timing for kind, timing in saved.items() if is_timing(timing)}
        kinds = {cost.kind(job): job for job in todo}
        unknown = [kind for kind in kinds if key + kind not in known]
        new = {kind: cost.probe(kinds[kind], f"probe/{i}") for i, kind in enumerate(unknown)}
        if new:
            self.run.log(f"measuring how long a step takes, {len(new)} kinds of runs")
            shutil.rmtree(self.run.folder / "probe", ignore_errors=True)
            # Extra probes load the machine as the study will.
            extra = [job._replace(name=f"{job.name}-{i}") for i in range(self.parallel) for job in new.values()]
            probes = [*new.values(), *extra[: max(0, self.parallel - len(new))]]
            with Monitor(self.run, probes, {job.name: 0.0 for job in probes}, self.parallel, quiet=True) as monitor:
                ray_backend.run_all(probes, monitor, self.resources, self.args.retries)
            for job in probes:
                if job.name in monitor.failures:
                    raise RunError(f"{job.name} failed: {last_line(job.output(self.run.folder))}")
                if not job.is_done(self.run.folder):
                    raise KeyboardInterrupt  # Ray swallowed it, and left the probe unfinished.
            known |= {key + kind: cost.read(self.run.folder / job.name) for kind, job in new.items()}
            self.run.write(TIMINGS, known)
            shutil.rmtree(self.run.folder / "probe")
        self.timings = {kind: cost.Timing(*known[key + kind]) for kind in kinds}

    def plan(self, stages: Mapping[str, Sequence[Job]], whole: Job) -> str:
        """Returns the cost of the stages as a table for the user, and compares it with `whole`, one full training."""
        self.measure([whole, *(job for todo in stages.values() for job in todo)])
        hours = f"{self.resources.unit}-hours"
        lines = [f"{'stage':<10}{'trials':>8}{'done':>6}{'steps':>12}{'s/step':>9}{hours:>12}{'wall clock':>13}"]
        work, wall = [], []  # Both are seconds of each stage; the second is with several trials at a time.
        for stage, todo in stages.items():
            left = [self.rest(job) for job in self.pending(todo)]
            work.append(sum(seconds for seconds, _ in left))
            wall.append(cost.makespan((seconds for seconds, _ in left), self.parallel))
            steps = sum(n for _, n in left)
            per_step = f"{work[-1] / steps:.3g}" if steps else ""
            lines.append(
                f"{stage:<10}{len(todo):>8}{len(todo) - len(left):>6}{steps:>12,}{per_step:>9}"
                f"{work[-1] * self.resources.devices / 3600:>12.2f}{tqdm.format_interval(wall[-1]):>13}"
            )
        full = cost.seconds(whole, self.corpus, self.timings)
        multiple = f", {sum(work) / full:.1f} times one training in full" if full else ""
        lines.append(
            f"in all {sum(work) * self.resources.devices / 3600:.2f} {hours}{multiple};"
            f" {tqdm.format_interval(sum(wall))} with {self.parallel} trial{'s' if self.parallel > 1 else ''} at a time"
            " (without starting processes and compiling)"
        )
        return "\n".join(lines)

    def rest(self, job: Job) -> tuple[float, int]:
        """Returns the seconds and the steps that a job still takes, which may have begun but is not done."""
        whole = cost.seconds(job, self.corpus, self.timings)
        rest = max(0.0, whole - metrics.seconds(self.run.folder / job.name))
        return rest, round(cost.steps(job, self.corpus) * rest / whole) if whole else 0

    def pending(self, todo: Sequence[Job]) -> list[Job]:
        """Returns the jobs that are neither done nor halved."""
        return [job for job in todo if not job.is_done(self.run.folder)]

    def run_stage(self, stage: str, todo: Sequence[Job]) -> bool:
        """Runs the jobs that are not done and returns whether the study continues with its next stage. Sets
        `interrupted` if jobs remain for no recorded reason."""
        halving = self.args.select_epochs if stage == "select" and self.args.halving else 0
        expected = {job.name: cost.seconds(job, self.corpus, self.timings) for job in todo}
        rules = (self.args.converged if stage == "select" else 0, self.args.budget_hours)
        elsewhere = {path.parent for path in self.run.folder.glob("*/**/metrics.jsonl")}
        elsewhere -= {self.run.folder / job.name for job in todo}
        hours = sum(map(metrics.seconds, elsewhere)) * self.resources.devices / 3600
        with Monitor(self.run, todo, expected, self.parallel, *rules, hours, self.resources.devices) as monitor:
            left = self.pending(todo)
            if left and not monitor.reason():
                self.run.log(f"{stage}: {len(todo)} trials, {len(left)} to run")
                # Halving compares with the trials that have ended, so they are replayed.
                ray_backend.run_all(todo if halving else left, monitor, self.resources, self.args.retries, halving)
            left = self.pending(todo)
            reason = monitor.reason() if left else ""
        self.interrupted = not reason and any(job.name not in monitor.failures for job in left)
        if self.interrupted:
            return False
        log_event(self.run.folder, trial=stage, event="stopped" if reason else "over", reason=reason)
        if reason:
            self.run.log(f"{stage} stopped: {MEANING[reason]}")
        return reason not in HALTING


def is_timing(value: Any) -> bool:
    """Returns whether a value read from a file is a valid `cost.Timing`."""
    return isinstance(value, list) and len(value) == 2 and all(metrics.is_number(v) and v >= 0 for v in value)
