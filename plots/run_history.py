"""Reads the records of a run for plots: curves over epochs, the probabilities of the alphas, and the genotypes."""

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from experiment import metrics
from genotypes import PRIMITIVES, Genotype, GenotypeError, from_json
from plots.style import PictureError

MOST_NODES = 16  # Edges are drawn for cells of at most this size.
MAX_DRAWN = 1e100  # Greater numbers cannot be drawn on an axis.
KINDS = ("interval", "epoch", "diagnosis", "rollback")


class History:
    """Holds the valid records of a run's metrics.jsonl, by kind and by step. Raises `PictureError` if there is none."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        records = sorted(filter(is_valid, metrics.records(self.folder)), key=lambda record: record["step"])
        if not records:
            what = "no metrics.jsonl with records; name a run directory of train_search.py or train.py"
            raise PictureError(f"{self.folder}: {what}")
        self.records = {kind: [record for record in records if record["kind"] == kind] for kind in KINDS}
        ends = {record["epoch"]: record["step"] for record in self.records["epoch"] if record["step"] > 0}
        self.ends = [(0, 0), *sorted((step, epoch) for epoch, step in ends.items())]
        self.unit = "epochs" if len(self.ends) > 1 else "weight steps"
        self.end = self.when(records[-1]["step"])

    def when(self, step: int) -> float:
        """Returns the time of a weight step in epochs, inter- or extrapolated, or in steps while no epoch is over."""
        if len(self.ends) == 1:
            return float(step)
        (*_, before, last) = self.ends
        if step > last[0]:
            return last[1] + (step - last[0]) * (last[1] - before[1]) / max(last[0] - before[0], 1)
        return float(np.interp(step, *zip(*self.ends, strict=True)))

    def curve(self, kind: str, name: str, least: float = -MAX_DRAWN) -> tuple[list[float], list[float]]:
        """Returns the times and values of field `name` in the records of a kind, where it is a number above `least`."""
        records = [record for record in self.records[kind] if metrics.is_number(record.get(name))]
        records = [record for record in records if least < record[name] < MAX_DRAWN]
        return [self.when(record["step"]) for record in records], [record[name] for record in records]

    def of_search(self) -> list[dict[str, Any]]:
        """Returns the records of intervals and epochs together, one for each step; an epoch replaces an interval."""
        records = {record["step"]: record for record in chain(self.records["interval"], self.records["epoch"])}
        return [records[step] for step in sorted(records)]

    @cached_property
    def probabilities(self) -> tuple[list[float], np.ndarray]:
        """Returns the times and softmaxed alphas (R, N(N+1)/2, K) of R >= 0 records, all of the last one's shape."""
        recorded = [(self.when(record["step"]), alphas) for record in self.of_search()
                 if (alphas := as_probabilities(record.get("probabilities"))) is not None]  # fmt: skip
        if not recorded:
            kept = metrics.read_json(self.folder / "genotype.json") or {}  # The records of the run have no alphas.
            alphas = as_probabilities(kept.get("probabilities"))
            if alphas is None:
                return [], np.zeros((0, 0, len(PRIMITIVES)))
            recorded = [(self.end, alphas)]
        recorded = [(x, alphas) for x, alphas in recorded if alphas.shape == recorded[-1][1].shape]
        return [x for x, _ in recorded], np.stack([alphas for _, alphas in recorded])

    @cached_property
    def nodes(self) -> int:
        """Returns N of the alphas, or 0 if there are none or N is greater than `MOST_NODES`, too many to read."""
        nodes = node_count(self.probabilities[1].shape[1])
        return nodes if nodes <= MOST_NODES else 0

    @cached_property
    def genotypes(self) -> list[tuple[float, Genotype]]:
        """Returns the times and genotypes of the records of intervals and epochs; see `cells_of`."""
        return self.cells_of(self.of_search())

    def cells_of(self, records: Iterable[dict[str, Any]]) -> list[tuple[float, Genotype]]:
        """Returns the times and genotypes of the records, of those that have as many nodes as the last one."""
        recorded = []
        for record in records:
            with suppress(GenotypeError):
                recorded.append((self.when(record["step"]), from_json(record.get("genotype"))))
        return [(x, cell) for x, cell in recorded if len(cell.recurrent) == len(recorded[-1][1].recurrent)]

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """Returns the content of result.json, or None before the run is over."""
        return metrics.result(self.folder)

    @cached_property
    def flags(self) -> dict[str, Any]:
        """Returns the flags in config.json, or none if they are missing or damaged."""
        flags = (metrics.read_json(self.folder / "config.json") or {}).get("flags")
        return flags if isinstance(flags, dict) else {}


def is_valid(record: dict[str, Any]) -> bool:
    """Returns whether a record of metrics.jsonl is of one of `KINDS` and has a step and an epoch."""
    counts = (record.get("step"), record.get("epoch"))
    return record["kind"] in KINDS and all(type(count) is int and 0 <= count < 2**53 for count in counts)


def as_probabilities(value: Any) -> np.ndarray | None:
    """Returns a value read from a file as an array (N(N+1)/2, K) of probabilities, or None if it is not one."""
    if not isinstance(value, list) or not value or not all(map(is_edge, value)):
        return None
    nodes = node_count(len(value))
    return np.array(value, dtype=float) if nodes * (nodes + 1) // 2 == len(value) else None


def is_edge(value: Any) -> bool:
    """Returns whether a value read from a file is a list of K numbers from 0 to 1."""
    shares = value if isinstance(value, list) else []
    return len(shares) == len(PRIMITIVES) and all(metrics.is_number(p) and 0 <= p <= 1 for p in shares)


def node_count(edges: int) -> int:
    """Returns N for a number of edges N(N+1)/2."""
    return int(((8 * edges + 1) ** 0.5 - 1) / 2)


def edges(nodes: int) -> Iterable[tuple[int, int]]:
    """Returns the (predecessor, node) pairs in the order of the alphas' edges."""
    return ((j, i) for i in range(1, nodes + 1) for j in range(i))


def evenly(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices of `count` records, evenly chosen and with the last one among them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))
