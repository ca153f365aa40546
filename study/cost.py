"""Predicts the cost of a study from the steps of each job and the measured seconds of a step of its kind."""

import heapq
import shlex
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tqdm import tqdm

import data
from experiment import arguments, metrics, retrain_arguments, search_arguments
from genotypes import BASELINES
from study.jobs import Job

SCRIPTS = {"train.py": retrain_arguments, "train_search.py": search_arguments}
PROBE_STEPS = 12  # The run that measures a kind of job has this many steps.
WARM = 4  # The first steps are not timed, as they compile functions and allocate memory.
NOT_OF_THE_KIND = {"epochs", "seed", "save", "resume", "limit_tokens", "test", "log_interval"}


class Resources(NamedTuple):
    """One trial occupies these processor cores and GPUs."""

    cpus: float = 1
    gpus: float = 0

    @property
    def devices(self) -> float:
        """Returns the number of devices that device time counts: the GPUs if the trial has any, else the cores."""
        return self.gpus or self.cpus

    @property
    def unit(self) -> str:
        """Returns the name of the device that device time counts, "GPU" or "core"."""
        return "GPU" if self.gpus else "core"

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))


class Timing(NamedTuple):
    """Timings are measured seconds on the machine that runs the study."""

    step: float
    evaluation: float  # This is one pass over the validation text.


class Entry(NamedTuple):
    """An entry is one line of the plan: the cost of one stage."""

    stage: str
    trials: int
    done: int
    steps: int  # These steps remain to be run.
    seconds: float  # This is the sum over the remaining trials.
    wall: float  # This is in seconds, with several trials at a time.


@cache
def parse(job: Job) -> Namespace:
    """Returns a job's flags as its script parses them. The result is cached, so do not modify it."""
    args = SCRIPTS[job.script].build_parser().parse_args([*job.flags, "--save", job.name])
    arguments.complete(args, "")
    return args


def kind(job: Job) -> str:
    """Returns the kind of a job: a step takes the same time in all jobs of one kind, whatever their genotypes."""
    flags = {name: value for name, value in vars(parse(job)).items() if name not in NOT_OF_THE_KIND}
    if "arch" in flags:
        arch = flags["arch"].upper()
        flags["arch"] = arch if arch in BASELINES else "a genotype"
    return f"{job.script} " + shlex.join(f"{name}={value}" for name, value in sorted(flags.items()))


def probe(job: Job, name: str) -> Job:
    """Returns a job of the same kind with a few steps, which measures the time of a step."""
    args = parse(job)
    held_out = search_arguments.HELD_OUT if getattr(args, "search_split", "valid") == "train" else 0.0
    tokens = args.batch_size * max(PROBE_STEPS * args.bptt, 2) / (1 - held_out)
    if held_out:  # The text held out for the alphas needs two time steps for each batch element.
        tokens = max(tokens, 2 * args.arch_batch_size / held_out)
    short = f"--epochs 1 --limit_tokens {int(tokens) + 1} --log_interval 1 --checkpoint_minutes 60 --cycle 0"
    if job.script == "train_search.py":
        short += " --arch_start 0"  # Every measured step also updates the alphas.
    return Job(name, job.script, (*job.flags, *short.split()))


def read(folder: Path) -> Timing:
    """Reads the timing from the metrics.jsonl of a finished probe; a step takes the median of the timed steps."""
    records = list(metrics.records(folder))
    times = [record["seconds"] for record in records if record["kind"] == "interval"]
    [whole] = [record["seconds"] for record in records if record["kind"] == "epoch"]
    steps = [after - before for before, after in pairwise(times)]
    return Timing(median(steps[WARM:] or steps or times), whole - times[-1])


def steps(job: Job, corpus: data.Corpus) -> int:
    """Returns the expected number of steps of a job, given the distribution of the random segment lengths."""
    args = parse(job)
    ids, batch_size = SCRIPTS[job.script].texts_to_read(corpus, args)["train"]
    length = 0.95 * args.bptt + 0.05 * max(1, args.bptt // 2)
    return round(args.epochs * (len(ids) // batch_size - 1) / length)


def seconds(job: Job, corpus: data.Corpus, paces: Mapping[str, Timing]) -> float:
    """Returns the predicted seconds of a whole job: its steps, and one evaluation per epoch and one more."""
    pace = paces[kind(job)]
    return steps(job, corpus) * pace.step + (parse(job).epochs + 1) * pace.evaluation


def makespan(durations: Iterable[float], parallel: int) -> float:
    """Returns the seconds until all are done, if `parallel` run at a time and each starts as soon as one has ended."""
    ends = [0.0] * parallel
    for duration in durations:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def entry(stage: str, todo: Sequence[Job], study: Path, corpus: data.Corpus, paces: Mapping, parallel: int) -> Entry:
    """Returns the cost of a stage, in which a job that is done costs nothing and one that has begun only its rest."""
    left, total = [], 0
    for job in todo:
        if not job.is_done(study):
            whole = seconds(job, corpus, paces)
            rest = max(0.0, whole - metrics.seconds(study / job.name))
            left.append(rest)
            total += round(steps(job, corpus) * rest / whole) if whole else 0
    return Entry(stage, len(todo), len(todo) - len(left), total, sum(left), makespan(left, parallel))


def text(entries: Sequence[Entry], parallel: int, share: Resources, full: float) -> str:
    """Returns the plan as a table for the user. `full` is the seconds of one full training, or 0 to leave it out."""
    hours = f"{share.unit}-hours"
    lines = [f"{'stage':<10}{'trials':>8}{'done':>6}{'steps':>12}{'s/step':>9}{hours:>12}{'wall clock':>13}"]
    for e in entries:
        pace = f"{e.seconds / e.steps:.3g}" if e.steps else ""
        lines.append(
            f"{e.stage:<10}{e.trials:>8}{e.done:>6}{e.steps:>12,}{pace:>9}{e.seconds * share.devices / 3600:>12.2f}"
            f"{tqdm.format_interval(e.wall):>13}"
        )
    work, wall = sum(e.seconds for e in entries), sum(e.wall for e in entries)
    multiple = f", {work / full:.1f} times one training in full" if full else ""
    return "\n".join(lines) + (
        f"\nin all {work * share.devices / 3600:.2f} {hours}{multiple}; {tqdm.format_interval(wall)} with {parallel}"
        f" trial{'s' if parallel > 1 else ''} at a time (without starting processes and compiling)"
    )
