"""The small things around a run: its directory, its device, and being asked to stop."""

import json
import os
import platform
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from tqdm import tqdm


class RunError(Exception):
    """A run that cannot go on, through no fault of the program; the message is one line for a person."""


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def new_folder(kind: str) -> Path:
    """A run directory that does not exist yet: runs/KIND-YYYYMMDD-HHMMSS, numbered if that second is taken."""
    name = Path("runs", f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    number, folder = 1, name
    while folder.exists():
        number += 1
        folder = name.with_name(f"{name.name}-{number}")
    return folder


def git_commit() -> str | None:
    """The commit that the scripts stand at, with a + if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = [subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
               for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + ("+" if run[1] else "")


class Run:
    """A run directory: log.txt for people, metrics.jsonl for programs, and whole JSON files beside them."""

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        self.metrics = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def configure(self, script: str, args: Namespace, device: torch.device, sha256: dict[str, str]) -> None:
        """Write config.json: all that is needed to start the run again, with a line for each time it went on."""
        cuda = device.type == "cuda"
        surroundings = {
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": str(device),
            "hardware": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        flags = {name: value for name, value in vars(args).items() if name != "resume"}
        if args.resume:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            config["flags"] = flags
            config.setdefault("resumed", []).append(surroundings)
            (self.folder / "result.json").unlink(missing_ok=True)  # it will be another
        else:
            config = {"script": script, "flags": flags, "sha256": sha256, **surroundings}
        self.write("config.json", config)

    def log(self, text: str) -> None:
        """Print a line (above a progress bar, if there is one) and add it to log.txt with the time."""
        tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def interrupted(self, script: str) -> int:
        """Say how to go on; gives the exit code of an interrupted run."""
        self.log(f"interrupted; continue with: python {script} --resume --save {quote(str(self.folder))}")
        return 130

    def record(self, **row: Any) -> None:
        """Add an object to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics_size(self) -> int:
        """Bytes in metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drop what is in metrics.jsonl beyond `size` bytes: rows of steps that will be taken again."""
        if self.metrics_size() > size:
            os.truncate(self.metrics, size)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / name)


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into `requested`, to be obeyed between two steps; a second one acts."""

    def __enter__(self) -> "StopSignal":
        self.requested = False
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, frame: Any) -> None:
        self.requested = True
        self.__exit__()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
