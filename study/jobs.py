"""Runs one trial of a study, which is a run of `train_search.py` or `train.py` in a process of its own.

The state of a trial is its run directory alone: the trial is done when result.json exists, halved when halved.json
exists, and otherwise resumes from its checkpoint. Nothing here needs Ray.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiment import metrics

ROOT = Path(__file__).parent.parent
# The kernel kills the run when its parent process ends for any reason: an orphan would hold the run directory's lock.
# This works on Linux only; elsewhere an orphan continues, and the trial is retried until the orphan has ended.
LAUNCH = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
except AttributeError:
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
STAGES = ("baseline", "proxy", "search", "select", "retrain")  # Stages run in this order.
FILE_NAME = re.compile(r"[^/\0]{1,100}")
POLL = 0.25  # metrics.jsonl is checked for new epochs every so many seconds.


def name_parts(name: Any) -> tuple[str, ...] | None:
    """Returns the parts of a trial's name: stage, cell or method, and seed, with a setting between the first two for a
    proxy. Returns None for a value read from a file that is no such name."""
    parts = tuple(name.split("/")) if isinstance(name, str) else ()
    valid = parts and parts[0] in STAGES and len(parts) == (4 if parts[0] == "proxy" else 3)
    return parts if valid and all(part not in (".", "..") and FILE_NAME.fullmatch(part) for part in parts) else None


class TrialFailed(Exception):
    """Raised when a trial's process exits with an error; the message has the last line of its output."""


class Job(NamedTuple):
    """A job runs a script with these flags in the study's subdirectory `name` ("select/first-1/1001"). Only a job with
    `test` evaluates the test text."""

    name: str
    script: str
    flags: tuple[str, ...]
    test: bool = False

    def is_done(self, study: Path) -> bool:
        """Returns whether the trial is halved, or has its result (including the test perplexity if `test` is set)."""
        folder = study / self.name
        result = metrics.result(folder)
        if result is not None:
            return not self.test or result["test_ppl"] is not None
        return (folder / "halved.json").exists()

    def output(self, study: Path) -> Path:
        """Returns the path of the file that receives what the trial prints."""
        return study / f"{self.name}.out"

    def command(self, study: Path) -> list[str]:
        """Returns the script and its flags; a run that has begun gets --resume, as config.json holds its flags, and the
        path of its text, which may have moved."""
        flags = self.flags
        if (study / self.name / "config.json").exists():
            text = self.flags.index("--data") if "--data" in self.flags else len(self.flags)
            flags = ("--resume", *self.flags[text : text + 2])
        save = ("--save", str(study / self.name), "--test", "read" if self.test else "skip")
        return [str(ROOT / self.script), *flags, *save]


def run(job: Job, study: Path, directory: Path, threads: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Starts or resumes the trial and returns when it is done. Raises `TrialFailed` if its process exits with an error.
    Relative paths in the job's flags are relative to `directory`. `report` receives each epoch's record of
    metrics.jsonl, including those written before a resume."""
    folder = study / job.name
    if (folder / "result.json").exists() and not (job.is_done(study) or (folder / "config.json").exists()):
        shutil.rmtree(folder)  # study/records.py restored it, without a checkpoint: the trial starts anew.
    seen, size = 0, 0  # These are the epochs that were reported, and the bytes of metrics.jsonl that were read.
    if not job.is_done(study):
        output = job.output(study)
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", "-c", LAUNCH, str(os.getpid()), *job.command(study)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(output, "ab") as file:
            process = subprocess.Popen(
                command, cwd=directory, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )
            try:
                while process.poll() is None:
                    time.sleep(POLL)
                    if (now := size_of(folder / "metrics.jsonl")) == size:
                        continue
                    size, records = now, metrics.epochs(folder)
                    for record in records[seen:]:
                        report(record)
                    seen = max(seen, len(records))
            finally:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise TrialFailed(f"{job.name}: {last_line(output)}")
    for record in metrics.epochs(folder)[seen:]:
        report(record)


def size_of(path: Path) -> int:
    """Returns the size of a file in bytes, or 0 if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_line(output: Path) -> str:
    """Returns the last line of a trial's output that is not empty, cut to 300 characters."""
    try:
        with open(output, "rb") as file:
            file.seek(max(0, output.stat().st_size - 4096))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return "no output"
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]
