"""The stages of a study at work: measured, planned, run on a cluster, and ended early where the rules say so."""

import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import data
from experiment import metrics
from experiment.run_directory import Run
from study import cost, jobs, ray_backend
from study.cost import Resources
from study.jobs import Job
from study.leaderboard import SHARE
from study.monitor import HALTING, MEANING, Monitor, Rules, log_event
from utils import RunError

PACES = "paces.json"


class StudyRunner:
    """Runs jobs of a study, as many at a time as there is room for on the Ray that this process is connected to."""

    def __init__(self, run: Run, args: Namespace, corpus: data.Corpus):
        self.run, self.args, self.corpus = run, args, corpus
        self.interrupted = False
        self.paces: dict[str, cost.Timing] = {}  # by kind of job
        gpus = args.gpus_per_trial
        self.share = Resources(args.cpus_per_trial, float(ray_backend.has_gpus()) if gpus is None else gpus)
        max_concurrent_trials = ray_backend.max_concurrent_trials(self.share)
        if max_concurrent_trials < 1:
            raise RunError(
                f"--cpus_per_trial {self.share.cpus:g} --gpus_per_trial {self.share.gpus:g}: no machine has so much;"
                " ask for less"
            )
        self.parallel = min(args.parallel or sys.maxsize, max_concurrent_trials)
        for left in run.folder.glob("tune-*"):  # of a driver that was killed
            shutil.rmtree(left, ignore_errors=True)
        run.write(SHARE, self.share._asdict())

    def measure(self, todo: Sequence[Job]) -> None:
        """How long a step of each kind of job takes, with as many at a time as there are to be."""
        key = f"{self.share.cpus:g} cores, {self.share.gpus:g} GPUs, {self.parallel} at a time: "
        found = metrics.read_json(self.run.folder / PACES) or {}
        known = {kind: pace for kind, pace in found.items() if is_pace(pace)}
        kinds = {cost.kind(job): job for job in todo}
        unknown = [kind for kind in kinds if key + kind not in known]
        new = {kind: cost.probe(kinds[kind], f"probe/{i}") for i, kind in enumerate(unknown)}
        company = [job._replace(name=f"{job.name}-{i}") for i in range(self.parallel) for job in new.values()]
        if new:
            self.run.log(f"measuring how long a step takes, {len(new)} kinds of runs")
            shutil.rmtree(self.run.folder / "probe", ignore_errors=True)
            probes = [*new.values(), *company[: max(0, self.parallel - len(new))]]  # so many at a time, as later
            board = Monitor(self.run, probes, {job.name: 0.0 for job in probes}, self.parallel, quiet=True)
            with board:
                self.run_all(probes, board)
            for job in probes:
                if job.name in board.failures:
                    raise RunError(f"{job.name} failed: {jobs.last_line(board.output(job))}")
                if not job.is_done(self.run.folder):
                    raise KeyboardInterrupt  # which Ray keeps for itself
            known |= {key + kind: cost.read(self.run.folder / job.name) for kind, job in new.items()}
            self.run.write(PACES, known)
            shutil.rmtree(self.run.folder / "probe")
        self.paces = {kind: cost.Timing(*known[key + kind]) for kind in kinds}

    def plan(self, stages: Mapping[str, Sequence[Job]], whole: Job) -> str:
        """What is to be run, and what it will cost; `whole` is one training in full."""
        self.measure([whole, *(job for todo in stages.values() for job in todo)])
        entries = [
            cost.entry(stage, todo, self.run.folder, self.corpus, self.paces, self.parallel)
            for stage, todo in stages.items()
        ]
        full = cost.seconds(whole, self.corpus, self.paces)
        return cost.text(entries, self.parallel, self.share, full)

    def run_all(self, todo: Sequence[Job], board: Monitor, halving: int = 0) -> None:
        """See `cluster.run_all`."""
        ray_backend.run_all(todo, self.run.folder, self.share, self.parallel, self.args.retries, board, halving)

    def pending(self, todo: Sequence[Job]) -> list[Job]:
        """Those that are not over."""
        return [job for job in todo if not job.is_done(self.run.folder)]

    def run_stage(self, stage: str, todo: Sequence[Job], halving: int = 0) -> bool:
        """Run the jobs that are not over; returns whether the study is to go on. `halving`: see `cluster.run_all`."""
        expected = {job.name: cost.seconds(job, self.corpus, self.paces) for job in todo}
        rules = Rules(self.args.converged if stage == "select" else 0, self.args.budget_hours)
        elsewhere = {path.parent for path in self.run.folder.glob("*/**/metrics.jsonl")}
        elsewhere -= {self.run.folder / job.name for job in todo}
        hours = sum(map(metrics.seconds, elsewhere)) * self.share.devices / 3600
        with Monitor(self.run, todo, expected, self.parallel, rules, hours, self.share.devices) as board:
            left = self.pending(todo)
            if left and not board.reason():
                self.run.log(f"{stage}: {len(todo)} trials, {len(left)} to run")
                self.run_all(todo if halving else left, board, halving)  # halving looks at what the others did
            left = self.pending(todo)
            reason = board.reason() if left else ""
        self.interrupted = not reason and any(job.name not in board.failures for job in left)
        if self.interrupted:
            return False
        log_event(self.run.folder, trial=stage, event="stopped" if reason else "over", reason=reason)
        if reason:
            self.run.log(f"{stage} stopped: {MEANING[reason]}")
        return reason not in HALTING


def is_pace(value: Any) -> bool:
    """Whether a value from a file could be a `cost.Timing`."""
    return isinstance(value, list) and len(value) == 2 and all(metrics.is_number(v) and v >= 0 for v in value)
