"""What runs and studies have written down, as it is read again: by a study that goes on, a report, a picture.

A directory may be half written, damaged or a stranger's: what cannot be used is passed over, and nothing raises.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from genotypes import GenotypeError, cell_from_json

EVENTS = "events.jsonl"
LARGEST = 2**1023  # a float holds it; infinity and what is no number are not below


def result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run; None before its end, and for a damaged one, which the run writes again when it goes on."""
    found = read_json(folder / "result.json") or {}
    try:
        cell_from_json(found["genotype"])
    except (LookupError, GenotypeError):
        return None
    whole = is_number(found.get("valid_ppl")) and (found.get("test_ppl") is None or is_number(found["test_ppl"]))
    return found if whole else None


def is_number(value: Any) -> bool:
    """Finite, and not a truth value."""
    return type(value) in (int, float) and abs(value) < LARGEST


def read_json(path: Path) -> dict[str, Any] | None:
    """An object from a file that is written whole or not at all; None if it is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl, but for a line that is being written."""
    for row in lines(folder / "metrics.jsonl"):
        if isinstance(row.get("kind"), str) and is_number(row.get("seconds")):
            yield row


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one on a line; what is none is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(line), dict):
                yield found


def epochs(folder: Path) -> list[dict[str, Any]]:
    """The rows of the epochs that are behind."""
    of_epochs = (row for row in rows(folder) if row["kind"] == "epoch")
    return [row for row in of_epochs if is_number(row.get("valid_ppl")) and type(row.get("epoch")) is int]


def seconds(folder: Path) -> float:
    """Of work on a run so far, as far as it has said."""
    return max((row["seconds"] for row in rows(folder)), default=0.0)


# --- of a study ---


def events(study: Path) -> list[dict[str, Any]]:
    """The rows of events.jsonl, but for one that a full disk cut off."""
    rows = (
        row for row in lines(study / EVENTS) if isinstance(row.get("trial"), str) and isinstance(row.get("event"), str)
    )
    return [
        row for row in rows
        if (row.get("event") not in ("done", "halved") or is_number(row.get("valid_ppl")))
        and (row.get("event") not in ("failed", "stopped") or isinstance(row.get("reason"), str))
    ]  # fmt: skip
