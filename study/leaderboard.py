"""Writes the results of a study: leaderboard.md for people, leaderboard.csv and leaderboard.json for programs.

Searched cells are compared with random cells by the short trainings alone, in which every cell has the same budget. The
full trainings cannot tell, because the short ones select their cells.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from experiment import metrics
from experiment.run_directory import Run
from study import stats
from study.cost import Resources
from study.design import RANDOM, STAGES, Cell, Proxy, Study
from study.jobs import Job

SHARE = "share.json"  # This file has the cores and GPUs of a trial.
AGREES = 0.7  # A recommended proxy has at least this Kendall's tau, with an interval above 0.


def write(study: Study, run: Run) -> str:
    """Writes the three leaderboard files and returns the text of leaderboard.md."""
    found = summary(study)
    text = as_markdown(found)
    run.write("leaderboard.json", found)
    run.write_text("leaderboard.csv", as_csv(found["cells"]))
    run.write_text("leaderboard.md", text)
    return text


def summary(study: Study) -> dict[str, Any]:
    """Returns the results of the study as plain JSON values, computed from its run directories. A value that is not
    known yet is None. If any trial was halved, methods are not compared: `methods` is empty and
    `searched_against_random` is None."""
    cells = [cell_row(study, cell) for cell in study.cells()]
    # A cell without a value is behind those with one.
    cells.sort(key=lambda row: (row["retrain"] or math.inf, row["select"] or math.inf, row["cell"]))
    chosen = study.chosen()
    test = metrics.result(study.folder / chosen[1].name) if chosen else None
    fair = not any(row["halved"] for row in cells)
    return {
        "cells": cells,
        "methods": methods(cells) if fair else [],
        "searched_against_random": against_random(cells) if fair else None,
        "agreement": stages(study, cells),
        "chosen": None if test is None else {
            "cell": chosen[0].label, "run": chosen[1].name,
            "valid_ppl": test["valid_ppl"], "test_ppl": test["test_ppl"],
        },
        "baselines": [baseline(study, job) for job in study.baseline()],
        "proxies": proxies(study),
        "cost": cost(study),
        "failures": [{"trial": name, "reason": reason} for name, reason in reasons(study, "failed").items()],
        "stopped": reasons(study, "stopped"),
    }  # fmt: skip


def cell_row(study: Study, cell: Cell) -> dict[str, Any]:
    """Returns the record of one cell: mean and standard deviation over seeds of its validation perplexities."""
    short, full = study.select([cell]), study.retrain([cell])
    selected, retrained = study.values(short), study.values(full)
    halved = [metrics.read_json(study.folder / job.name / "halved.json") for job in short]
    return {
        "cell": cell.label,
        "found_by": list(cell.found_by),
        "select": mean(selected) if selected else None,
        "select_sd": spread(selected),
        "select_n": len(selected),
        "halved": any(halved),
        "retrain": mean(retrained) if retrained else None,
        "retrain_sd": spread(retrained),
        "retrained": len(retrained),
        "genotype": str(cell.genotype),
    }


def methods(cells: Sequence[dict]) -> list[dict[str, Any]]:
    """Returns statistics of the short trainings by method, best mean first; a cell found twice counts twice."""
    found: dict[str, list[float]] = {}
    for row in cells:
        for name in row["found_by"] if row["select"] is not None else ():
            found.setdefault(name.rpartition("-")[0], []).append(row["select"])
    rows = [
        {"method": name, "n": len(values), "mean": mean(values), "sd": spread(values), "best": min(values)}
        for name, values in found.items()
    ]
    return sorted(rows, key=lambda row: row["mean"])


def against_random(cells: Sequence[dict]) -> dict[str, Any] | None:
    """Compares distinct searched cells with random ones: the difference of their means and its permutation p-value.
    Returns None unless there are short trainings of both kinds."""
    known = [row for row in cells if row["select"] is not None]
    drawn = [row["select"] for row in known if row["cell"].startswith(f"{RANDOM}-")]
    searched = [row["select"] for row in known if not row["cell"].startswith(f"{RANDOM}-")]
    if not drawn or not searched:
        return None
    return {
        "searched": len(searched),
        "random": len(drawn),
        "left_out": [row["cell"] for row in cells if row["select"] is None],
        "difference": mean(searched) - mean(drawn),
        "p": number(stats.permutation_test(searched, drawn)),
        "best_searched": min(searched),
        "best_random": min(drawn),
    }


def stages(study: Study, cells: Sequence[dict]) -> list[dict[str, Any]]:
    """Returns the rank correlations (Kendall's tau, Spearman's rho) of the cells between consecutive stages."""
    relaxed = {name: result["valid_ppl"] for name, result in study.searched().items()}
    short = {name: row["select"] for row in cells for name in row["found_by"] if row["select"] is not None}
    full = {row["cell"]: row["retrain"] for row in cells if row["retrain"] is not None}
    found = []
    for name, before, after in (("search, select", relaxed, short), ("select, retrain", short, full)):
        both = sorted(before.keys() & after.keys())
        x, y = [before[key] for key in both], [after[key] for key in both]
        tau, rho = number(stats.kendall(x, y)), number(stats.spearman(x, y))
        found.append({"between": name, "n": len(both), "tau": tau, "rho": rho})
    return found


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
    """Returns how well each short training reproduces the ranking of the long training, cheapest first. A short
    training of full size is the beginning of a long one, so it is read from the runs of every second seed and compared
    with the long runs of the other seeds: no run is compared with itself. `cost` is relative to one full training."""
    runs: dict[str, dict[str, list[Job]]] = {}  # The keys are folder and cell; a list has one job per seed.
    for job in study.proxy():
        _, folder, cell, _ = job.name.split("/")
        runs.setdefault(folder, {}).setdefault(cell, []).append(job)

    def curves(proxy: Proxy, seeds: slice) -> dict[str, list[tuple[float, float]]]:
        """Returns (best perplexity, seconds) by cell and seed after the proxy's epochs, or at an earlier end."""
        found: dict[str, list[tuple[float, float]]] = {}
        for cell, of_cell in runs[proxy.folder].items():
            for job in of_cell[seeds]:
                rows = metrics.epochs(study.folder / job.name)[: proxy.epochs]
                if rows and (len(rows) == proxy.epochs or job.is_done(study.folder)):
                    found.setdefault(cell, []).append((min(row["valid_ppl"] for row in rows), rows[-1]["seconds"]))
        return found

    reference, found = study.reference(), []
    for proxy in study.proxies():
        apart = proxy.folder == reference.folder
        short = curves(proxy, slice(0, None, 2) if apart else slice(None))
        long = curves(reference, slice(1, None, 2) if apart else slice(None))
        cells = [cell for cell in short if cell in long]
        if len(cells) < 2:
            continue
        x, y = ([[ppl for ppl, _ in side[cell]] for cell in cells] for side in (short, long))
        whole = mean(s for cell in cells for _, s in long[cell]) * study.args.full_epochs / reference.epochs
        tau, rho = stats.agreement(stats.kendall, x, y), stats.agreement(stats.spearman, x, y)
        every = [[ppl for ppl, _ in of_cell] for of_cell in curves(proxy, slice(None)).values()]
        found.append({
            "proxy": str(proxy), "epochs": proxy.epochs, "emsize": proxy.emsize, "tokens": proxy.tokens,
            "cost": mean(s for cell in cells for _, s in short[cell]) / whole,
            "tau": [number(v) for v in tau], "rho": [number(v) for v in rho],
            "seed_sd": number(stats.seed_spread(every)), "cell_sd": spread([mean(v) for v in every]),
            "cells": len(cells),
        })  # fmt: skip
    found.sort(key=lambda row: row["cost"])
    cheapest = next((row for row in found if (row["tau"][0] or 0) >= AGREES and (row["tau"][1] or 0) > 0), None)
    for row in found:
        row["recommended"] = row is cheapest
    return found


def cost(study: Study) -> list[dict[str, Any]]:
    """Returns the device time of each stage, as if every trial had the cores or GPUs that the last trials had."""
    saved = metrics.read_json(study.folder / SHARE) or {}
    share = Resources(**{name: saved[name] for name in Resources._fields if metrics.is_number(saved.get(name))})
    found = []
    for stage in STAGES:
        folders = [path.parent for path in sorted((study.folder / stage).glob("**/metrics.jsonl"))]
        total = sum(map(metrics.seconds, folders))
        found.append({"stage": stage, "runs": len(folders), f"{share.unit}_hours": total * share.devices / 3600})
    return found


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


# --- Text ---


def as_csv(cells: Sequence[dict]) -> str:
    """Returns CSV text with a header and one line for each cell."""
    file = io.StringIO()
    if cells:
        table = csv.DictWriter(file, cells[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows({**row, "found_by": " ".join(row["found_by"])} for row in cells)
    return file.getvalue()


def shown(value: Any) -> str:
    """Returns the text of a value in a table: two decimals for a float, and a dash for None."""
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def with_spread(value: float | None, sd: float | None) -> str:
    return shown(value) + ("" if sd is None else f" ± {sd:.2f}")


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table; " | " separates the columns in `head`."""
    lines = [f"| {' | '.join(map(shown, row))} |" for row in rows]
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *lines])


def as_markdown(found: dict[str, Any]) -> str:
    """Returns the text of leaderboard.md for a `summary`."""
    parts = ["# Leaderboard", "Perplexities on the validation text, ± the standard deviation between seeds."]
    if found["chosen"]:
        c = found["chosen"]
        parts.append(
            f"Chosen: **{c['cell']}** ({c['run']}), {c['valid_ppl']:.2f} valid, "
            + ("test not read yet." if c["test_ppl"] is None else f"{c['test_ppl']:.2f} test, read once.")
        )
    rows = [
        (row["cell"], ", ".join(row["found_by"]),
         "halved" if row["halved"] else with_spread(row["select"], row["select_sd"]),
         with_spread(row["retrain"], row["retrain_sd"]))
        for row in found["cells"]
    ]  # fmt: skip
    parts += [table("cell | found by | short training | in full", rows)]
    if found["methods"]:
        rows = [m.values() for m in found["methods"]]
        parts += ["## By method (short trainings)", table("method | n | mean | sd | best", rows)]
    if t := found["searched_against_random"]:
        p = "too few for a test" if t["p"] is None else f"p = {t['p']:.3f}, two-sided permutation test"
        parts.append(
            f"Searched minus random: {t['difference']:+.2f} in the mean, over {t['searched']} and {t['random']}"
            f" distinct cells ({p}); the best {t['best_searched']:.2f} and {t['best_random']:.2f}."
            + (f" Left out, as no short training of theirs ended: {', '.join(t['left_out'])}." if t["left_out"] else "")
        )
    rows = [a.values() for a in found["agreement"]]
    parts += ["## Agreement between stages", table("between | cells | Kendall's tau | Spearman's rho", rows)]
    if any(b["curve"] for b in found["baselines"]):
        rows = [(b["cell"], b["seed"], b["valid_ppl"], len(b["curve"])) for b in found["baselines"]]
        parts += ["## Baselines, in full", table("cell | seed | valid ppl | epochs", rows)]
    if found["proxies"]:
        head = "short training | cost, of one in full | cells | tau | rho | sd of seeds | of cells | recommended"
        rows = [
            (p["proxy"], f"{100 * p['cost']:.1f}%", p["cells"], interval(p["tau"]), interval(p["rho"]),
             p["seed_sd"], p["cell_sd"], "yes" if p["recommended"] else "")
            for p in found["proxies"]
        ]  # fmt: skip
        parts += ["## Proxies", "tau and rho against the long training, with 90% intervals of the bootstrap."]
        parts += [table(head, rows)]
        if not any(p["recommended"] for p in found["proxies"]):
            parts.append(f"None has a tau of {AGREES} with an interval above 0: train longer, or rank more cells.")
    rows = [
        (c["stage"], c["runs"], f"{value:.2f} {key.replace('_', '-')}")
        for c in found["cost"] for key, value in c.items() if key.endswith("hours")
    ]  # fmt: skip
    parts += ["## Cost", table("stage | runs | device time", rows)]
    parts += [f"The stage {stage} was stopped: {reason}." for stage, reason in found["stopped"].items()]
    if found["failures"]:
        parts += ["## Failures", table("trial | its last words", [f.values() for f in found["failures"]])]
    parts += ["## Genotypes", "\n".join(f"- {row['cell']}: `{row['genotype']}`" for row in found["cells"])]
    return "\n\n".join(parts) + "\n"


def interval(estimate: Sequence[float | None]) -> str:
    value, low, high = map(shown, estimate)
    return f"{value} ({low} to {high})"
