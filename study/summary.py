"""Computes the results of a study from its run directories.

Searched cells are compared with random cells by the short trainings alone, in which every cell has the same budget. The
full trainings cannot tell, because the short ones select their cells.
"""

import math
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from experiment import metrics
from genotypes import from_json, parse
from study import stats
from study.cost import Resources
from study.design import RANDOM, Cell, Proxy, Study
from study.features import features
from study.jobs import STAGES, Job

SHARE = "share.json"  # This file has the cores and GPUs of a trial.
FEW_CELLS = 5  # A correlation over fewer cells says nothing.
AGREES = 0.7  # A recommended proxy has at least this Kendall's tau, over `FEW_CELLS` or more.


def summary(study: Study) -> dict[str, Any]:
    """Returns the results of the study as plain JSON values, computed from its run directories. A value that is not
    known yet is None. If any trial was halved, methods are not compared: `methods` and `features` are empty."""
    cells = [cell_row(study, cell) for cell in study.cells()]
    # A cell without a value is behind those with one.
    cells.sort(key=lambda row: (row["retrain"] or math.inf, row["select"] or math.inf, row["cell"]))
    chosen = study.chosen()
    test = metrics.result(study.folder / chosen[1].name) if chosen else None
    fair = not any(row["halved"] for row in cells)
    judged = proxy_cells(study)
    to_run = trials_to_run(study)
    return {
        "cells": cells,
        "methods": methods(study, cells, tested=not to_run) if fair else [],
        "to_run": to_run,
        "features": feature_correlations(study, cells, judged) if fair else [],
        "left_out": [row["cell"] for row in cells if row["select"] is None],
        "agreement": stage_agreement(cells),
        "chosen": None if test is None else {
            "cell": chosen[0].label, "run": chosen[1].name,
            "valid_ppl": test["valid_ppl"], "test_ppl": test["test_ppl"], "unknown": metrics.unknown_shares(test),
        },
        "baselines": [baseline(study, job) for job in study.baseline()],
        "proxies": proxies(study),
        "proxy_cells": judged,
        "cost": cost(study),
        "failures": [{"trial": name, "reason": reason} for name, reason in reasons(study, "failed").items()],
        "stopped": reasons(study, "stopped"),
    }  # fmt: skip


def cell_row(study: Study, cell: Cell) -> dict[str, Any]:
    """Returns the record of one cell: mean and standard deviation over seeds of its validation perplexities, and its
    `early` perplexity, the mean over seeds of the best after the first epochs of the short training."""
    short, full = study.select([cell]), study.retrain([cell])
    begun = [metrics.epochs(study.folder / job.name)[: early_epochs(study)] for job in short]
    complete = all(len(records) == early_epochs(study) for records in begun)
    selected, retrained = study.values(short), study.values(full)
    halved = [metrics.read_json(study.folder / job.name / "halved.json") for job in short]
    return {
        "cell": cell.label,
        "found_by": list(cell.found_by),
        "early": mean(min(record["valid_ppl"] for record in records) for records in begun) if complete else None,
        "select": mean(selected) if selected else None,
        "select_sd": spread(selected),
        "select_n": len(selected),
        "by_name": study.by_name(cell),
        "halved": any(halved),
        "retrain": mean(retrained) if retrained else None,
        "retrain_sd": spread(retrained),
        "retrained": len(retrained),
        "genotype": str(cell.genotype),
    }


def trials_to_run(study: Study) -> int:
    """Returns how many searches and short trainings are still to come. Those that failed, and the rest of a stage that
    a rule stopped, are not."""
    ended = reasons(study, "failed").keys() | reasons(study, "stopped").keys()
    jobs = [job for job in study.search() + study.select() if not job.is_done(study.folder)]
    return sum(job.name not in ended and job.name.split("/")[0] not in ended for job in jobs)


def methods(study: Study, cells: Sequence[dict], tested: bool) -> list[dict[str, Any]]:
    """Returns statistics of the short trainings by method, best mean first. The searches are what is sampled: a cell
    that two of them found has a training, and a value, for each.

    A method that searches is compared with the random cells: `p` is that of a permutation test, `p_corrected` is
    corrected for the number of methods of the study, `random_below` is the share of the random cells that are better
    than its mean, and `minus_rival` is its mean minus the expected best of `rival_draws` random cells. So many can be
    trained in the time of one search and the training of its cell. Unless `tested`, there is neither a p nor a rival:
    who looks at a test after each training, and stops when it is significant, finds differences that are not there.
    """
    by_method: dict[str, list[float]] = {}
    for row in cells:
        for name, ppl in row["by_name"].items():
            by_method.setdefault(name.rpartition("-")[0], []).append(ppl)
    drawn = by_method.get(RANDOM, [])
    searched = [name for name in by_method if name != RANDOM and tested]
    tests = {name: stats.permutation_test(by_method[name], drawn) for name in searched}
    tests = {name: p for name, p in tests.items() if not math.isnan(p)}
    to_come = [1.0] * (len(study.search_methods()) - len(tests))
    corrected = dict(zip(tests, stats.holm([*tests.values(), *to_come]), strict=False))
    rows = []
    for name, values in by_method.items():
        row = {"method": name, "n": len(values), "mean": mean(values), "sd": spread(values), "median": median(values)}
        row |= {"best": min(values), "p": tests.get(name), "p_corrected": corrected.get(name), "random_below": None}
        draws = rival_draws(study, name) if name in tests else None
        row |= {"rival_draws": draws, "minus_rival": None}
        if name != RANDOM and drawn:
            row["random_below"] = stats.share_below(row["mean"], drawn)
        if draws:
            row["minus_rival"] = list(stats.minus_best(values, drawn, draws))
        rows.append(row)
    return sorted(rows, key=lambda row: row["mean"])


def rival_draws(study: Study, method: str) -> float | None:
    """Returns how many random cells can be trained in the time of one search by this method and the training of its
    cell. The times are those of the fastest runs of either kind that are done, since what else a machine did can only
    make a run longer; returns None if they are not known."""
    searches = [job for job in study.search() if job.name.startswith(f"search/{method}/")]
    search, training = (
        min(
            filter(None, (metrics.seconds(study.folder / job.name) for job in jobs if job.is_done(study.folder))),
            default=0.0,
        )
        for jobs in (searches, study.select())
    )
    return 1 + search / (training * study.args.select_seeds) if search and training else None


def early_epochs(study: Study) -> int:
    """Returns after how many epochs of a short training a cell's perplexity counts as early: the shortest proxy."""
    return min((n for n in study.args.proxy_epochs if n < study.args.select_epochs), default=1)


def feature_correlations(study: Study, cells: Sequence[dict], judged: Sequence[dict]) -> list[dict[str, Any]]:
    """Returns how each feature of the cells is correlated with their perplexity early in a training and at its end:
    over the random cells and over all `cells`, in the short trainings, and over the proxies' cells `judged`, from the
    shortest proxy to the long training. A group of fewer than `FEW_CELLS` cells is left out."""
    ends = early_epochs(study), study.args.select_epochs
    first, long = Proxy(min(study.args.proxy_epochs)), study.reference()
    known = [(row["cell"], row["genotype"], (row["early"], row["select"])) for row in cells]
    groups = {
        RANDOM: (ends, [row for row in known if row[0].startswith(f"{RANDOM}-")]),
        "all": (ends, known),
        "proxy": (
            (first.epochs, long.epochs),
            [(row["cell"], row["genotype"], (row["ppl"].get(str(first)), row["ppl"][str(long)])) for row in judged],
        ),
    }
    correlations = []
    for group, (times, rows) in groups.items():
        members = [(features(parse(text)), ppls) for _, text, ppls in rows if None not in (text, *ppls)]
        if len(members) < FEW_CELLS:
            continue
        for name in members[0][0]:
            for k, epochs in enumerate(times):
                pairs = zip(*((of_cell[name], ppls[k]) for of_cell, ppls in members), strict=True)
                rho = [number(value) for value in stats.correlation(*map(list, pairs))]
                correlations.append({"feature": name, "cells": group, "n": len(members), "epochs": epochs, "rho": rho})
    return correlations


def stage_agreement(cells: Sequence[dict]) -> list[dict[str, Any]]:
    """Returns the rank correlation of the cells (Kendall's tau, Spearman's rho) between the selection and the
    retraining. A search's own perplexity is left out: it is that of a relaxed cell, and tells norms apart, not
    cells."""
    both = [row for row in cells if row["select"] is not None and row["retrain"] is not None]
    x, y = [row["select"] for row in both], [row["retrain"] for row in both]
    tau, rho = number(stats.kendall(x, y)), number(stats.spearman(x, y))
    return [{"between": "select, retrain", "n": len(both), "tau": tau, "rho": rho}]


def baseline(study: Study, job: Job) -> dict[str, Any]:
    """Returns the record of one full training of a baseline, with its validation perplexity after each epoch."""
    _, cell, seed = job.name.split("/")
    return {
        "cell": cell,
        "seed": int(seed),
        "valid_ppl": next(iter(study.values([job])), None),
        "curve": [row["valid_ppl"] for row in metrics.epochs(study.folder / job.name)],
    }


def proxies(study: Study) -> list[dict[str, Any]]:
    """Returns how well each short training reproduces the ranking of the long training, cheapest first. The short
    trainings have every second seed and the long ones the others, so that no run is compared with itself; a cell counts
    once it has all of its seeds.

    `cost` is relative to one full training, by the fastest run of each. `tau_of_seeds` is the agreement of a short
    training with the same one under the other seeds, of which the long training is the continuation; None for a
    training with flags of its own. No judge can be expected to agree with another better than with itself.
    """
    reference, records = study.reference(), []
    long = best_after(study, reference, study.long_trainings())
    for proxy in study.proxies():
        short = best_after(study, proxy, study.short_trainings())
        cells = [cell for cell in short if cell in long]
        if len(cells) < 2:
            continue
        x, y = ([mean_ppl(side[cell]) for cell in cells] for side in (short, long))
        whole = min(s for cell in cells for _, s in long[cell]) * study.args.full_epochs / reference.epochs
        again = best_after(study, proxy, study.long_trainings())
        pairs = [(mean_ppl(short[cell]), mean_ppl(again[cell])) for cell in short if cell in again]
        every = [[ppl for ppl, _ in of_cell] for of_cell in best_after(study, proxy, study.proxy()).values()]
        records.append({
            "proxy": str(proxy), "epochs": proxy.epochs, "flags": proxy.flags,
            "cost": min(s for cell in cells for _, s in short[cell]) / whole,
            "tau": [number(v) for v in stats.agreement(stats.kendall, x, y)],
            "rho": [number(v) for v in stats.agreement(stats.spearman, x, y)],
            "tau_of_seeds": number(stats.kendall(*zip(*pairs, strict=True))) if len(pairs) > 1 else None,
            "seed_sd": number(stats.seed_spread(every)), "cell_sd": spread([mean(v) for v in every]),
            "cells": len(cells),
        })  # fmt: skip
    records.sort(key=lambda row: row["cost"])
    agree = (row for row in records if row["cells"] >= FEW_CELLS and (row["tau"][0] or 0) >= AGREES)
    cheapest = next((row for row in agree if (row["tau"][1] or 0) > 0), None)
    for row in records:
        row["recommended"] = row is cheapest
    return records


def best_after(study: Study, proxy: Proxy, jobs: Sequence[Job]) -> dict[str, list[tuple[float, float]]]:
    """Returns (best perplexity, seconds) by cell and seed, after the proxy's epochs of those of the jobs that have its
    flags, or at an earlier end. A cell of which one such job is not so far is left out."""
    runs_by_cell: dict[str, list[tuple[float, float]]] = {}
    behind = set()
    for job in jobs:
        _, folder, cell, _ = job.name.split("/")
        if folder != proxy.folder:
            continue
        rows = metrics.epochs(study.folder / job.name)[: proxy.epochs]
        if rows and (len(rows) == proxy.epochs or job.is_done(study.folder)):
            runs_by_cell.setdefault(cell, []).append((min(row["valid_ppl"] for row in rows), rows[-1]["seconds"]))
        else:
            behind.add(cell)
    return {cell: runs for cell, runs in runs_by_cell.items() if cell not in behind}


def mean_ppl(runs: Sequence[tuple[float, float]]) -> float:
    """Returns the mean perplexity of what `best_after` returns for one cell."""
    return mean(ppl for ppl, _ in runs)


def proxy_cells(study: Study) -> list[dict[str, Any]]:
    """Returns for each cell of the proxies its genotype (None for torch's own cells, and before a training of it has
    ended) and its perplexity `ppl` after each short training and, last, the long one: the mean over seeds, None where
    it is not known yet."""
    trainings = [(proxy, study.short_trainings()) for proxy in study.proxies()]
    trainings.append((study.reference(), study.long_trainings()))
    known = {str(proxy): best_after(study, proxy, jobs) for proxy, jobs in trainings}
    genotypes: dict[str, str] = {}
    for job in study.proxy():
        if (result := metrics.result(study.folder / job.name)) and not isinstance(result["genotype"], str):
            genotypes[job.name.split("/")[2]] = str(from_json(result["genotype"]))
    return [
        {"cell": cell, "genotype": genotypes.get(cell),
         "ppl": {name: mean_ppl(by_cell[cell]) if cell in by_cell else None for name, by_cell in known.items()}}
        for cell in dict.fromkeys(cell for by_cell in known.values() for cell in by_cell)
    ]  # fmt: skip


def cost(study: Study) -> list[dict[str, Any]]:
    """Returns the device time of each stage, as if every trial had the cores or GPUs that the last trials had."""
    saved = metrics.read_json(study.folder / SHARE) or {}
    resources = Resources(**{name: saved[name] for name in Resources._fields if metrics.is_number(saved.get(name))})
    costs = []
    for stage in STAGES:
        folders = [path.parent for path in sorted((study.folder / stage).glob("**/metrics.jsonl"))]
        total = sum(map(metrics.seconds, folders))
        costs.append(
            {"stage": stage, "runs": len(folders), f"{resources.unit}_hours": total * resources.devices / 3600}
        )
    return costs


def reasons(study: Study, outcome: str) -> dict[str, str]:
    """Returns the reasons of the trials whose last outcome is "failed", or of the stages whose last is "stopped"."""
    outcomes = ("failed", "done", "halved", "stopped", "over")
    last = {event["trial"]: event for event in metrics.events(study.folder) if event["event"] in outcomes}
    return {name: event["reason"] for name, event in last.items() if event["event"] == outcome}


def spread(values: Sequence[float]) -> float | None:
    """Returns the standard deviation, or None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def number(value: float) -> float | None:
    """Returns the value, or None for NaN, which JSON cannot represent."""
    return None if math.isnan(value) else value
