"""Writes a run's directory: log.txt for people, metrics.jsonl for programs, and JSON files that are never partial."""

import json
import logging
import os
import platform
import subprocess
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiment import lock, metrics
from utils import atomic_write, is_temporary, with_filename


def new_folder(kind: str) -> Path:
    """Returns a path that does not exist yet: runs/KIND-YYYYMMDD-HHMMSS, with a number if that name is taken."""
    name = Path("runs", f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    number, folder = 1, name
    while folder.exists():
        number += 1
        folder = name.with_name(f"{name.name}-{number}")
    return folder


def git_commit() -> str | None:
    """Returns the git commit of the scripts, with a + if tracked files differ from it; None outside a checkout."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent.parent)]  # a kill must leave no lock
    try:
        run = [subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
               for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + ("+" if run[1] else "")


def cpu_name() -> str:
    """Returns the architecture of the processor, and the widest vector instructions that torch uses on it."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


class Run:
    """A run directory, created and locked for this process alone. Raises `Locked` if another one holds the lock."""

    disable_progress_bar = None  # tqdm's `disable`: None hides the bar where there is no terminal

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        self.metrics = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock.acquire(folder)
        self.tensorboard = None  # a `plots.tensorboard.TensorBoardLogger` for --tensorboard
        self.n_records = 0  # the number of records in metrics.jsonl

    def release(self) -> None:
        """Releases the lock, so that other processes may write to the directory."""
        self.lock.close()

    def configure(
        self, script: str, args: Namespace, device: torch.device, sha256: dict[str, str], finished: bool, ranks: int
    ) -> None:
        """Writes config.json: all that is needed to start the run again, and one entry for each time it was resumed.

        Removes temporary files that earlier processes left behind, and result.json if the run is not `finished`.
        """
        cuda = device.type == "cuda"
        surroundings = {
            "versions": {"python": platform.python_version(), "torch": torch.__version__}, "device": str(device),
            "hardware": torch.cuda.get_device_name(device) if cuda else cpu_name(),
            "threads": torch.get_num_threads(), "ranks": ranks, "git_commit": git_commit(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        flags = {name: value for name, value in vars(args).items() if name != "resume"}
        if args.resume:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            config["flags"] = flags
            config["sha256"] |= sha256  # A test text may have been added.
            config.setdefault("resumed", []).append(surroundings)
        else:
            config = {"script": script, "flags": flags, "sha256": sha256, **surroundings}
        self.write("config.json", config)
        if not finished:
            (self.folder / "result.json").unlink(missing_ok=True)
        for path in self.folder.glob(".*.tmp"):
            if is_temporary(path.name):
                path.unlink(missing_ok=True)

    def log(self, text: str) -> None:
        """Prints a line (above a progress bar, if there is one) and appends it to log.txt with the time."""
        tqdm.write(text)
        append(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self, **record: Any) -> None:
        """Appends a record to metrics.jsonl, and to TensorBoard's files if there is a logger."""
        append(self.metrics, json.dumps(record) + "\n")
        self.n_records += 1
        if self.tensorboard is not None:
            self.tensorboard.add(record)

    def cut_metrics(self, count: int) -> float:
        """Truncates metrics.jsonl to its first `count` records, since the steps of the others will be taken again;
        returns the `seconds` of the last record left, 0 if there is none."""
        self.n_records, size, last = 0, 0, b""
        with suppress(FileNotFoundError), open(self.metrics, "r+b") as file:
            while self.n_records < count and (line := file.readline()).endswith(b"\n"):
                self.n_records, size, last = self.n_records + 1, size + len(line), line
            file.truncate(size)
        if self.tensorboard is not None:
            self.tensorboard.restart()
        try:
            seconds = json.loads(last)["seconds"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return 0.0
        return max(0.0, float(seconds)) if metrics.is_number(seconds) else 0.0

    def write(self, name: str, value: Any) -> None:
        """Writes a value as a JSON file atomically. Raises ValueError for NaN and infinity."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file atomically: it is complete or unchanged. Raises OSError that names the file."""
        path = self.folder / name
        try:
            with atomic_write(path) as file:
                file.write(text.encode(errors="surrogateescape"))
        except OSError as error:
            raise with_filename(error, path) from error


class LogHandler(logging.Handler):
    """Writes the messages of Python's logging to the log of a run."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        self.run.log(record.getMessage())


class NullRun(Run):
    """A run directory that ignores all writes, for every rank but the main one."""

    disable_progress_bar = True

    def __init__(self, folder: str | Path):
        self.folder, self.n_records = Path(folder), 0

    def ignore(self, *_: Any, **__: Any) -> None:
        pass

    configure = log = record = write_text = release = ignore

    def cut_metrics(self, count: int) -> float:
        return 0.0


def append(path: Path, text: str) -> None:
    """Appends text to a file and flushes it to the disk. Raises OSError that names the file."""
    try:
        with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:  # a path may be no UTF-8
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise with_filename(error, path) from error
