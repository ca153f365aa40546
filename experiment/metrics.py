"""Reads the results, metrics and events that runs and studies have written, for resumed studies, reports and pictures.

A directory may be incomplete, damaged or from an unknown source: what cannot be used is skipped, and nothing raises.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from genotypes import GenotypeError, cell_from_json

EVENTS = "events.jsonl"
MAX_NUMBER = 2**1023  # A float can hold this; infinity, NaN and integers too large for a float are not below it.


def result(folder: Path) -> dict[str, Any] | None:
    """Returns result.json of a run; None before the run ends and for a damaged file, which a resumed run rewrites."""
    record = read_json(folder / "result.json") or {}
    try:
        cell_from_json(record["genotype"])
        valid_ppl, test_ppl = record["valid_ppl"], record["test_ppl"]
    except (LookupError, GenotypeError):
        return None
    return record if is_number(valid_ppl) and (test_ppl is None or is_number(test_ppl)) else None


def unknown_shares(result: dict[str, Any]) -> dict[str, float]:
    """Returns the share of words that became `<unk>` by split, as result.json has them, where it is above 0."""
    by_split = result.get("unknown_share")
    shares = {split: by_split.get(split) for split in ("valid", "test")} if isinstance(by_split, dict) else {}
    return {split: share for split, share in shares.items() if is_number(share) and share > 0}


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite int or float; a bool is not."""
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file that is written atomically; None if the file is missing or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe has no end
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of metrics.jsonl that have a kind and a time; a line that is being written is skipped."""
    for record in lines(folder / "metrics.jsonl"):
        if isinstance(record.get("kind"), str) and is_number(record.get("seconds")):
            yield record


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the JSON objects of a file with one on each line; every other line, and a missing file, is skipped."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(line), dict):
                yield record


def epochs(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of the completed epochs of a run."""
    of_epochs = (record for record in records(folder) if record["kind"] == "epoch")
    return [record for record in of_epochs if is_number(record.get("valid_ppl")) and type(record.get("epoch")) is int]


def seconds(folder: Path) -> float:
    """Returns the seconds of work on a run up to its last record; 0 if there is none."""
    return max((record["seconds"] for record in records(folder)), default=0.0)


# --- of a study ---


def events(study: Path) -> list[dict[str, Any]]:
    """Returns the complete events of a study's events.jsonl; a line that a full disk truncated is skipped."""
    return [
        event for event in lines(study / EVENTS)
        if isinstance(event.get("trial"), str) and isinstance(event.get("event"), str)
        and (event["event"] not in ("done", "halved") or is_number(event.get("valid_ppl")))
        and (event["event"] not in ("failed", "stopped") or isinstance(event.get("reason"), str))
    ]  # fmt: skip
