"""What a study trains: the jobs of each stage, and the cells that one stage hands to the next.

Everything follows from the study's flags and the run directories in it, so that a study which goes on finds the same
jobs again. A job's directory is STAGE/CELL/SEED.
"""

import re
import shlex
from argparse import Namespace
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiment import metrics
from genotypes import Genotype, from_json, random_genotype
from study.jobs import Job

STAGES = ("baseline", "proxy", "search", "select", "retrain")  # in their order
METHODS = {"first": (), "unrolled": ("--unrolled",)}  # that search, and their flags
RANDOM = "random"  # the method that does not


class Cell(NamedTuple):
    """A genotype, and the searches (or draws) that it came from: "first-1", "random-2"."""

    genotype: Genotype
    found_by: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.found_by[0]


class Proxy(NamedTuple):
    """A short training: epochs, size (0: the full one) and tokens of training text (0: all of train_flags)."""

    epochs: int
    emsize: int
    tokens: int

    @property
    def folder(self) -> str:
        """Of its runs; one run of the most epochs serves all that are shorter."""
        return "full" if (self.emsize, self.tokens) == (0, 0) else f"emsize{self.emsize}-tokens{self.tokens}"

    def __str__(self) -> str:
        size = f", --emsize {self.emsize}" if self.emsize else ""
        text = f", --limit_tokens {self.tokens}" if self.tokens else ""
        return f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}{size}{text}"


class Study:
    """The jobs of a study in `folder` with these flags."""

    def __init__(self, folder: Path, args: Namespace):
        self.folder, self.args = folder, args

    def training(
        self, stage: str, label: str, arch: str, epochs: int, seeds: int, *more: str, after: int = 0
    ) -> list[Job]:
        """Of one cell, by each seed; of those that follow the first `after` ones."""
        a = self.args
        return [
            Job(
                f"{stage}/{label}/{seed}",
                "train.py",
                ("--data", a.data, "--arch", arch, "--epochs", str(epochs), *shlex.split(a.train_flags), *more,
                 "--seed", str(seed)),
            )
            for seed in range(a.seed + after, a.seed + after + seeds)
        ]  # fmt: skip

    def baseline(self) -> list[Job]:
        a = self.args
        return [
            job for arch in a.baselines
            for job in self.training("baseline", label(arch), arch, a.full_epochs, a.full_seeds)
        ]  # fmt: skip

    def proxies(self) -> list[Proxy]:
        """To try, the long training itself left out."""
        a = self.args
        found = [
            Proxy(epochs, emsize, tokens)
            for emsize in (*a.proxy_emsize, 0) for tokens in (*a.proxy_tokens, 0) for epochs in sorted(a.proxy_epochs)
        ]  # fmt: skip
        return [proxy for proxy in found if proxy.folder != "full" or proxy.epochs < self.reference().epochs]

    def reference(self) -> Proxy:
        """The long training that proxies are held against."""
        return Proxy(self.args.proxy_reference or self.args.full_epochs, 0, 0)

    def proxy(self) -> list[Job]:
        a, found = self.args, []
        for proxy in {p.folder: p for p in (*self.proxies(), self.reference())}.values():  # the longest of each folder
            more = ("--emsize", str(proxy.emsize)) if proxy.emsize else ()
            more += ("--limit_tokens", str(proxy.tokens)) if proxy.tokens else ()
            for arch in a.proxy_cells:
                stage = f"proxy/{proxy.folder}"
                found += self.training(stage, label(arch), arch, proxy.epochs, a.proxy_seeds, *more)
        return found

    def search(self) -> list[Job]:
        a = self.args
        return [
            Job(
                f"search/{method}/{seed}",
                "train_search.py",
                ("--data", a.data, *METHODS[method], "--epochs", str(a.search_epochs), "--search_split",
                 a.search_split, *shlex.split(a.search_flags), "--seed", str(seed)),
            )
            for seed in range(a.seed, a.seed + a.seeds) for method in a.methods if method in METHODS
        ]  # fmt: skip

    def searched(self) -> dict[str, dict[str, Any]]:
        """The results of the searches that have ended, by name ("first-1")."""
        results = {job.name: metrics.result(self.folder / job.name) for job in self.search()}
        return {
            name.removeprefix("search/").replace("/", "-"): result
            for name, result in results.items() if result is not None
        }  # fmt: skip

    def random_cells(self, searched: int) -> dict[str, Genotype]:
        """As many as were asked for, or as were found."""
        a = self.args
        if RANDOM not in a.methods:
            return {}
        seeds = range(a.seed, a.seed + (a.random_cells or searched))
        return {f"{RANDOM}-{seed}": random_genotype(seed) for seed in seeds}

    def cells(self) -> list[Cell]:
        """Every distinct genotype of the searches, and the random ones: taken in turn, so that a selection which is
        stopped has seen of both."""
        searched = distinct((name, from_json(result["genotype"])) for name, result in self.searched().items())
        drawn = distinct(self.random_cells(len(searched)).items())
        return [cell for pair in zip_longest(searched, drawn) for cell in pair if cell]

    def select(self, cells: Sequence[Cell] | None = None) -> list[Job]:
        """Short trainings of these cells, those of `cells` by default."""
        a = self.args
        more = shlex.split(a.select_flags)
        each = [
            self.training("select", cell.label, str(cell.genotype), a.select_epochs, a.select_seeds, *more)
            for cell in (self.cells() if cells is None else cells)
        ]
        return [job for round_ in zip(*each, strict=True) for job in round_]  # one seed of all, then the next

    def selected(self) -> list[tuple[float, Cell]]:
        """Mean validation perplexity and cell, best first; those whose trainings are all done."""
        ranked = []
        for cell in self.cells():
            values = self.values(self.select([cell]))
            if len(values) == self.args.select_seeds:
                ranked.append((mean(values), cell))
        return sorted(ranked, key=lambda pair: (pair[0], pair[1].label))

    def retrain(self, cells: Sequence[Cell] | None = None) -> list[Job]:
        """Trainings in full of these cells, the best of the selection by default. Their seeds are others than those of
        the selection: what a cell owed to luck there, it does not keep."""
        a = self.args
        if cells is None:
            cells = [cell for _, cell in self.selected()[: a.top]]
        return [
            job for cell in cells
            for job in self.training(
                "retrain", cell.label, str(cell.genotype), a.full_epochs, a.full_seeds, after=a.select_seeds
            )
        ]  # fmt: skip

    def chosen(self) -> tuple[Cell, Job] | None:
        """The cell with the best mean after retraining, and the best of its runs, which is to read the test text. Once
        it has, it stays the choice, whatever is retrained later."""
        ranked = []
        for _, cell in self.selected()[: self.args.top]:
            results = {job: metrics.result(self.folder / job.name) for job in self.retrain([cell])}
            for job, result in results.items():
                if result and result["test_ppl"] is not None:
                    return cell, job._replace(test=True)
            done = {job: result["valid_ppl"] for job, result in results.items() if result}
            if len(done) == self.args.full_seeds:
                ranked.append((mean(done.values()), cell, min(done, key=done.__getitem__)))
        if not ranked:
            return None
        _, cell, job = min(ranked, key=lambda entry: (entry[0], entry[1].label))
        return cell, job._replace(test=True)

    def values(self, of: Iterable[Job]) -> list[float]:
        """Validation perplexities of the jobs that are done."""
        results = (metrics.result(self.folder / job.name) for job in of)
        return [result["valid_ppl"] for result in results if result is not None]


def distinct(named: Iterable[tuple[str, Genotype]]) -> list[Cell]:
    """One cell for each genotype, with all of its names."""
    names: dict[Genotype, list[str]] = {}
    for name, genotype in named:
        names.setdefault(genotype, []).append(name)
    return [Cell(genotype, tuple(found_by)) for genotype, found_by in names.items()]


def label(arch: str) -> str:
    """A cell's directory."""
    return re.sub(r"[^\w.-]+", "-", arch)[:80].strip("-.")
