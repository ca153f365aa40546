"""Writes the two files that a study adds lines to: events.jsonl, and trials.jsonl with the results of finished trials.

trials.jsonl is all that must be kept of a study, beside study.json, to report it or to continue it on another machine.
A line has the name, the flags, the machine, the result and the epochs of one trial. `restore` makes run directories of
these lines, without checkpoints. The report and the remaining stages read those like the directories of real runs.
"""

import json
import os
import shlex
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from experiment import metrics
from experiment.run_directory import append
from study.jobs import Job, name_parts

ARCHIVE = "trials.jsonl"
KEPT = ("kind", "epoch", "step", "ppl", "valid_ppl", "seconds", "genotype")  # of the record of an epoch
RAN_ON = ("versions", "hardware", "threads", "git_commit")  # of config.json
SMALL_FILES = ("result", "halved")  # One of these JSON files shows that a trial is finished.


def log_event(study: Path, **record: Any) -> None:
    """Appends an event to events.jsonl with the current time, unless the record has one."""
    append(study / metrics.EVENTS, json.dumps({"at": time.time(), **record}) + "\n")


def archive(study: Path, job: Job) -> None:
    """Appends the small results of a trial that is done or halved."""
    folder = study / job.name
    epochs = [{name: record[name] for name in KEPT if name in record} for record in metrics.epochs(folder)]
    line: dict[str, Any] = {"at": time.time(), "trial": job.name, "script": job.script, "flags": shlex.join(job.flags)}
    config = metrics.read_json(folder / "config.json") or {}
    line["ran_on"] = {name: config[name] for name in RAN_ON if name in config}
    line["epochs"] = epochs
    for name in SMALL_FILES:
        if (content := metrics.read_json(folder / f"{name}.json")) is not None:
            line[name] = content
    append(study / ARCHIVE, json.dumps(line) + "\n")


def restore(study: Path) -> list[str]:
    """Makes the run directory of each trial in trials.jsonl that has none, records their ends in events.jsonl, and
    returns the names of these trials. Invalid lines are skipped; of several lines of one trial, the last counts."""
    last = {line["trial"]: line for line in metrics.lines(study / ARCHIVE) if is_line(line)}
    missing = [name for name in last if not (study / name).exists()]
    for name in missing:
        line = last[name]
        write(study / name, line)
        event, result = ("done", line["result"]) if "result" in line else ("halved", line["halved"])
        log_event(study, at=line.get("at"), trial=name, event=event, valid_ppl=result.get("valid_ppl"))
    return missing


def is_line(line: dict[str, Any]) -> bool:
    """Returns whether a line read from a file has the form that `archive` writes."""
    epochs = line.get("epochs")
    return (
        name_parts(line.get("trial")) is not None
        and isinstance(epochs, list) and all(isinstance(record, dict) for record in epochs)
        and any(isinstance(line.get(name), dict) for name in SMALL_FILES)
    )  # fmt: skip


def write(folder: Path, line: dict[str, Any]) -> None:
    """Writes the small files of a trial; the directory appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=".restore-", dir=folder.parent))
    text = "".join(json.dumps(record) + "\n" for record in line["epochs"])
    (temporary / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name in SMALL_FILES:
        if name in line:
            (temporary / f"{name}.json").write_text(json.dumps(line[name], indent=2) + "\n", encoding="utf-8")
    os.rename(temporary, folder)
