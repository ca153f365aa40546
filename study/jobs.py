"""One trial of a study: a run of `train_search.py` or `train.py` in a process of its own, and what it leaves behind.

The run directory is all that is known of a trial: it is done when result.json is there, halved when halved.json is,
and goes on from its checkpoint when neither is. Nothing here needs Ray.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiment import metrics

ROOT = Path(__file__).parent.parent
# The run ends with whoever started it, in whatever way that one ends: an orphan would hold the run directory's lock.
# (Linux; elsewhere an orphan goes on, and the trial is tried again until it is over.)
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
POLL = 0.25  # seconds between two looks at metrics.jsonl


class TrialFailed(Exception):
    """A trial's process did not end well; the message is its last line."""


class Job(NamedTuple):
    """What to run: a script with these flags, in the directory of this name in the study ("select/first-1"). The test
    text is read only by a job that is to."""

    name: str
    script: str
    flags: tuple[str, ...]
    test: bool = False

    def is_done(self, study: Path) -> bool:
        """Whether there is nothing left to do."""
        folder = study / self.name
        found = metrics.result(folder)
        if found is not None:
            return not self.test or found["test_ppl"] is not None
        return (folder / "halved.json").exists()

    def command(self, study: Path) -> list[str]:
        """The script and its flags: the run's own, where it has begun."""
        begun = (study / self.name / "config.json").exists()
        flags = ("--resume",) if begun else self.flags
        save = ("--save", str(study / self.name), "--test", "read" if self.test else "skip")
        return [str(ROOT / self.script), *flags, *save]


def run(job: Job, study: Path, directory: Path, threads: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Begin the trial, or go on with it, until it is done; `report` gets the row of metrics.jsonl of each epoch, those
    of before too. `directory` is where relative names in its flags start from. Raises `TrialFailed`."""
    folder = study / job.name
    seen = 0
    if not job.is_done(study):
        folder.parent.mkdir(parents=True, exist_ok=True)
        output = folder.with_name(f"{folder.name}.out")
        with open(output, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", LAUNCH, str(os.getpid()), *job.command(study)],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
            try:
                size = 0
                while process.poll() is None:
                    time.sleep(POLL)
                    if (now := size_of(folder / "metrics.jsonl")) == size:
                        continue
                    size, rows = now, metrics.epochs(folder)
                    for row in rows[seen:]:
                        report(row)
                    seen = max(seen, len(rows))
            finally:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise TrialFailed(f"{job.name}: {last_line(output)}")
    for row in metrics.epochs(folder)[seen:]:
        report(row)


def size_of(path: Path) -> int:
    """In bytes; 0 for what is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_line(output: Path) -> str:
    """Of what a trial said, what tells most: its last line that is not empty."""
    try:
        with open(output, "rb") as file:
            file.seek(max(0, output.stat().st_size - 4096))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return "said nothing"
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "said nothing")[:300]
