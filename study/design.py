"""Defines the jobs of each stage of a study, and the cells that one stage passes to the next.

Everything is computed from the study's flags and its run directories (docs/study.md names them), so that a resumed
study has the same jobs.
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

METHODS = {"first": "", "unrolled": "--unrolled"}  # These methods need no flags from the user.
RANDOM = "random"  # This method does not search.
# The seeds of these stages begin so far above --seed that no two stages share one, however many searches join: a cell
# that a lucky seed selected loses its luck when it is retrained.
SEEDS_FROM = {"select": 1000, "retrain": 2000}


class Cell(NamedTuple):
    """A cell is a genotype with the names of the searches or random samples that gave it ("first-1", "random-2")."""

    genotype: Genotype
    found_by: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.found_by[0]


class Proxy(NamedTuple):
    """A proxy is the setting of a short training."""

    epochs: int
    flags: str = ""  # These flags of train.py are added to --train_flags.

    @property
    def folder(self) -> str:
        """Returns the directory name of its runs. Settings that differ only in --proxy_epochs share the longest run if
        it begins like the shorter ones."""
        name = label(self.flags) or "full"
        return f"{name}-{self.epochs}" if falls_with_epochs(self.flags) and not own_epochs(self.flags) else name

    def __str__(self) -> str:
        if own_epochs(self.flags):
            return self.flags
        return f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}{f', {self.flags}' if self.flags else ''}"


def falls_with_epochs(flags: str) -> bool:
    """Returns whether these flags of train.py select a schedule whose learning rates depend on the number of epochs."""
    return re.search(r"--schedule(?:\s+|=)(cosine|polynomial)", flags) is not None


def own_epochs(flags: str) -> list[int]:
    """Returns the number of epochs among these flags of a proxy, in a list; it is empty if there is none."""
    return [int(number) for number in re.findall(r"--epochs(?:\s+|=)(\d+)", flags)][-1:]


class Study:
    """Computes the jobs of the study in `folder` from its flags `args`."""

    def __init__(self, folder: Path, args: Namespace):
        self.folder, self.args = folder, args

    def training(
        self, stage: str, label: str, arch: str, epochs: int, seeds: int, *more: str, after: int = 0
    ) -> list[Job]:
        """Returns the trainings of one cell, one for each of `seeds` seeds after the first `after` seeds of the
        stage."""
        a = self.args
        flags = ("--data", a.data, "--arch", arch, "--epochs", str(epochs), *shlex.split(a.train_flags), *more)
        first = a.seed + SEEDS_FROM.get(stage, 0) + after
        return [
            Job(f"{stage}/{label}/{seed}", "train.py", (*flags, "--seed", str(seed)))
            for seed in range(first, first + seeds)
        ]

    def baseline(self) -> list[Job]:
        a, jobs = self.args, []
        for arch in a.baselines:
            jobs += self.training("baseline", label(arch), arch, a.full_epochs, a.full_seeds)
        return jobs

    def proxies(self) -> list[Proxy]:
        """Returns the short trainings to try; those of full size must have fewer epochs than the reference training."""
        a = self.args
        settings = [
            Proxy(epochs, flags)
            for flags in (*a.proxy_flags, "") for epochs in own_epochs(flags) or sorted(a.proxy_epochs)
        ]  # fmt: skip
        return [proxy for proxy in settings if proxy.folder != "full" or proxy.epochs < self.reference().epochs]

    def reference(self) -> Proxy:
        """Returns the long training that the proxies are compared with."""
        return Proxy(self.args.proxy_reference or self.args.full_epochs)

    def proxy(self) -> list[Job]:
        return self.short_trainings() + self.long_trainings()

    def short_trainings(self) -> list[Job]:
        """Returns the trainings by which the proxies rank their cells, with every second seed from the first."""
        # Epochs ascend within a folder, so the dict retains the longest training of each.
        return self.proxy_trainings({proxy.folder: proxy for proxy in self.proxies()}.values(), 0)

    def long_trainings(self) -> list[Job]:
        """Returns the trainings by which the reference ranks the same cells, with the other seeds."""
        return self.proxy_trainings([self.reference()], 1)

    def proxy_trainings(self, settings: Iterable[Proxy], first: int) -> list[Job]:
        a = self.args
        return [
            job
            for proxy in settings for after in range(first, a.proxy_seeds, 2) for arch in a.proxy_cells
            for job in self.training(f"proxy/{proxy.folder}", label(arch), arch, proxy.epochs, 1,
                                     *shlex.split(proxy.flags), after=after)
        ]  # fmt: skip

    def search(self) -> list[Job]:
        a = self.args
        flags = ("--epochs", str(a.search_epochs), "--search_split", a.search_split, *shlex.split(a.search_flags))
        return [
            Job(f"search/{name}/{seed}", "train_search.py",
                ("--data", a.data, *flags, *shlex.split(of_method), "--seed", str(seed)))
            for seed in range(a.seed, a.seed + a.seeds) for name, of_method in self.search_methods().items()
        ]  # fmt: skip

    def search_methods(self) -> dict[str, str]:
        """Returns the flags of train_search.py of each method that searches, by its name."""
        return {name: flags for name, flags in map(named_method, self.args.methods) if name != RANDOM}

    def searched(self) -> dict[str, dict[str, Any]]:
        """Returns the results of the searches that have ended, by name ("first-1")."""
        results = {job.name: metrics.result(self.folder / job.name) for job in self.search()}
        return {"-".join(name.split("/")[1:]): result for name, result in results.items() if result is not None}

    def random_cells(self, searched: int) -> dict[str, Genotype]:
        """Returns random cells by name: as many as --random_cells says, or `searched` cells if that is 0."""
        a = self.args
        number = (a.random_cells or searched) if RANDOM in a.methods else 0
        return {f"{RANDOM}-{seed}": random_genotype(seed) for seed in range(a.seed, a.seed + number)}

    def cells(self) -> list[Cell]:
        """Returns every distinct searched and random cell, alternating, so that an early end has trained both kinds."""
        named = [(name, from_json(result["genotype"])) for name, result in self.searched().items()]
        # A cell keeps the name under which its trainings began, and each search its training, also if a search that
        # joined later has found that cell.
        ended = self.trainings_before()
        named.sort(key=lambda pair: (ended.get(pair[0], 0), not (self.folder / "select" / pair[0]).exists()))
        searched = distinct(named)
        drawn = distinct(self.random_cells(len(searched)).items())
        return [cell for pair in zip_longest(searched, drawn) for cell in pair if cell]

    def trainings_before(self) -> dict[str, int]:
        """Returns how many short trainings had ended when each search ended, by the search's name ("first-1")."""
        ended, before = 0, {}
        for event in metrics.events(self.folder):
            stage, *name = event["trial"].split("/")
            if stage == "select" and event["event"] in ("done", "halved"):
                ended += 1
            elif stage == "search" and event["event"] == "done":
                before.setdefault("-".join(name), ended)
        return before

    def select(self, cells: Sequence[Cell] | None = None) -> list[Job]:
        """Returns the short trainings of the given cells; the default is all that the method `cells` returns.

        A cell that several searches found has --select_seeds trainings for each of them. If they shared one, its luck
        would count as often as the cell was found, and a method that always finds one cell would have no variance.
        """
        a = self.args
        more = shlex.split(a.select_flags)
        each = [
            self.training("select", cell.label, str(cell.genotype), a.select_epochs,
                          a.select_seeds * len(cell.found_by), *more)
            for cell in (self.cells() if cells is None else cells)
        ]  # fmt: skip
        # All cells are trained with one seed before any is trained with the next.
        return [job for round_ in zip_longest(*each) for job in round_ if job]

    def by_name(self, cell: Cell) -> dict[str, float]:
        """Returns the mean validation perplexity of the short trainings that belong to each name of a cell, for those
        names whose trainings have all ended."""
        jobs, n = self.select([cell]), self.args.select_seeds
        ppls = {name: self.values(jobs[k * n : (k + 1) * n]) for k, name in enumerate(cell.found_by)}
        return {name: mean(values) for name, values in ppls.items() if len(values) == n}

    def selected(self) -> list[tuple[float, Cell]]:
        """Returns (mean validation perplexity, cell), best first, of the cells whose short trainings are all done."""
        trained = [(self.by_name(cell), cell) for cell in self.cells()]
        ranked = [(mean(ppls.values()), cell) for ppls, cell in trained if len(ppls) == len(cell.found_by)]
        return sorted(ranked, key=lambda pair: (pair[0], pair[1].label))

    def retrain(self, cells: Sequence[Cell] | None = None) -> list[Job]:
        """Returns the full trainings of the given cells; the default is the --top best of the selection."""
        a, jobs = self.args, []
        if cells is None:
            cells = [cell for _, cell in self.selected()[: a.top]]
        for cell in cells:
            text = str(cell.genotype)
            jobs += self.training("retrain", cell.label, text, a.full_epochs, a.full_seeds)
        return jobs

    def chosen(self) -> tuple[Cell, Job] | None:
        """Returns the cell with the best mean validation perplexity after retraining, and the best of its runs. That
        run evaluates the test text. Once it has, it remains the choice, whatever is retrained later. Returns None if no
        cell has finished all of its retrainings."""
        for cell in self.cells():
            for job in self.retrain([cell]):
                result = metrics.result(self.folder / job.name)
                if result and result["test_ppl"] is not None:
                    return cell, job._replace(test=True)
        ranked = []
        for _, cell in self.selected()[: self.args.top]:
            results = {job: metrics.result(self.folder / job.name) for job in self.retrain([cell])}
            done = {job: result["valid_ppl"] for job, result in results.items() if result}
            if len(done) == self.args.full_seeds:
                ranked.append((mean(done.values()), cell, min(done, key=done.__getitem__)))
        if not ranked:
            return None
        _, cell, job = min(ranked, key=lambda entry: (entry[0], entry[1].label))
        return cell, job._replace(test=True)

    def values(self, of: Iterable[Job]) -> list[float]:
        """Returns the validation perplexities, per word, of those jobs in `of` that have a result."""
        results = (metrics.result(self.folder / job.name) for job in of)
        return [result["valid_ppl"] for result in results if result is not None]


def distinct(named: Iterable[tuple[str, Genotype]]) -> list[Cell]:
    """Returns one cell for each distinct genotype, with all of its names."""
    names: dict[Genotype, list[str]] = {}
    for name, genotype in named:
        names.setdefault(genotype, []).append(name)
    return [Cell(genotype, tuple(found_by)) for genotype, found_by in names.items()]


def named_method(text: str) -> tuple[str, str]:
    """Returns the name and the flags of a method that is given as NAME or NAME=FLAGS."""
    name, sign, flags = text.partition("=")
    return name, flags if sign else METHODS.get(name, "")


def label(arch: str) -> str:
    """Returns a directory name for a cell or for flags: the text with other characters replaced by "-", cut to 80."""
    return re.sub(r"[^\w.-]+", "-", arch)[:80].strip("-.")
