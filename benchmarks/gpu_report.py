"""Turns what `benchmarks/gpu.sh` has written into a table for the README, and says which targets are met.

    python benchmarks/gpu_report.py benchmarks/results/gpu-...      # the folder OUT of gpu.sh

The targets are those of a step or an epoch at the published sizes. A target whose figure is missing, because its stage
failed or was not run, is listed as not measured. The exit code is 0 if all targets are met, else 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment import metrics

SEARCH_EPOCHS = 50  # of a published search


class Target(NamedTuple):
    """A figure that the code was written to reach on one H100."""

    name: str
    unit: str
    limit: float
    at_least: bool  # whether the figure must be at least the limit, or at most
    figure: Callable[["Results"], float | None]


class Results:
    """The figures in the folder of a run of gpu.sh; a missing or damaged file has none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        for path in sorted(folder.glob("step-*.json")):
            with suppress(OSError, ValueError):
                self.steps += json.loads(path.read_text())

    def step(self, name: str, engine: str, precision: str) -> dict[str, Any] | None:
        """Returns the record of a step; None if it is missing."""
        for record in self.steps:
            if (record["step"], record["engine"], record["precision"]) == (name, engine, precision):
                return record
        return None

    def fastest(self, name: str) -> dict[str, Any] | None:
        """Returns the record of the fused engine's quickest precision for a step, of those with compiled kernels and
        CUDA graphs: no other one is what a target is about."""
        records = [r for r in self.steps if r["step"] == name and r["engine"] == "fused" and not lacks(r)]
        return min(records, key=lambda record: record["ms"], default=None)

    def epoch_seconds(self, name: str) -> float | None:
        """Returns the seconds of the last epoch of a run, which neither compiles nor captures."""
        seconds = [0.0, *(record["seconds"] for record in metrics.epochs(self.folder / name))]
        return seconds[-1] - seconds[-2] if len(seconds) > 2 else None

    def ms(self, name: str) -> float | None:
        record = self.fastest(name)
        return record and record["ms"]

    def speedup(self, name: str) -> float | None:
        """Returns how many times as long the eager engine takes for a step as the fused one."""
        eager, fused = self.step(name, "eager", "fp32"), self.fastest(name)
        return eager["ms"] / fused["ms"] if eager and fused else None

    def search_minutes(self) -> float | None:
        seconds = self.epoch_seconds("search")
        return seconds and SEARCH_EPOCHS * seconds / 60


TARGETS = (
    Target("unrolled step", "ms", 50, False, lambda r: r.ms("search-unrolled")),
    Target(f"search of {SEARCH_EPOCHS} epochs", "min", 8, False, Results.search_minutes),
    Target("epoch of retraining", "s", 2, False, lambda r: r.epoch_seconds("train")),
    Target("unrolled step against the eager engine", "times", 20, True, lambda r: r.speedup("search-unrolled")),
)


def lacks(record: dict[str, Any]) -> str:
    """Returns what the step of a record ran without, of what the fused engine has on CUDA; "" if it lacked nothing."""
    missing = {"compiled": "uncompiled", "graphs": "no CUDA graphs"}
    return ", ".join(words for name, words in missing.items() if record["engine"] == "fused" and not record[name])


def step_table(results: Results) -> list[str]:
    """Returns a Markdown table of the steps."""
    lines = [
        "| step | engine | precision | ms | products alone, ms | tokens/s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['step']} | {r['engine']}{lacks(r) and f' ({lacks(r)})'} | {r['precision']} | {r['ms']:.1f} |"
        f" {r['floor_ms']:.1f} | {r['tokens_per_s']:,.0f} | {r['peak_mb']:,.0f} |"
        for r in results.steps
    ]
    return lines


def target_table(results: Results) -> tuple[list[str], bool]:
    """Returns a Markdown table of the targets, and whether all are met."""
    lines, met = ["| target | measured | met |", "|---|---|---|"], []
    for target in TARGETS:
        figure = target.figure(results)
        bound = f"at {'least' if target.at_least else 'most'} {target.limit:g} {target.unit}"
        met.append(figure is not None and (figure >= target.limit if target.at_least else figure <= target.limit))
        shown = "not measured" if figure is None else f"{figure:.1f} {target.unit}"
        lines.append(f"| {target.name}: {bound} | {shown} | {'yes' if met[-1] else 'no'} |")
    return lines, all(met)


def report(folder: Path) -> tuple[str, bool]:
    """Returns the report on a folder, and whether all targets are met."""
    results = Results(folder)
    record = results.steps[0] if results.steps else {}
    title = f"{record.get('device', 'an unknown device')}, torch {record.get('torch', '?')}"
    targets, met = target_table(results)
    failed = folder / "failed.txt"
    notes = [f"Failed: {line}" for line in failed.read_text().splitlines()] if failed.exists() else []
    return "\n".join([title, "", *step_table(results), "", *targets, *notes]), met


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder OUT of gpu.sh")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"{folder}: no such folder; run benchmarks/gpu.sh first")
    text, met = report(folder)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
