"""Predicts the cost of a study from the steps of each job and the measured seconds of a step of its kind."""

import heapq
import shlex
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

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


class Timing(NamedTuple):
    """Timings are measured seconds on the machine that runs the study."""

    step: float
    evaluation: float  # This is one pass over the validation text.


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
    # Every measured step of a search also updates the alphas; a training must not average after more epochs than one.
    short += " --arch_start 0" if job.script == "train_search.py" else " --average_after 0"
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


def seconds(job: Job, corpus: data.Corpus, timings: Mapping[str, Timing]) -> float:
    """Returns the predicted seconds of a whole job: its steps, and one evaluation per epoch and one more."""
    timing = timings[kind(job)]
    return steps(job, corpus) * timing.step + (parse(job).epochs + 1) * timing.evaluation


def makespan(durations: Iterable[float], parallel: int) -> float:
    """Returns the seconds until all are done, if `parallel` run at a time and each starts as soon as one has ended."""
    ends = [0.0] * parallel
    for duration in durations:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)
