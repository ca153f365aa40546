"""Collects the content of a study's HTML page: its leaderboard with each cell, its statistics and its curves."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiment import metrics
from genotypes import Genotype, cell_from_json
from plots import study_curves, train_curves
from plots.cell_graph import cell_figure
from plots.html.page import Field, Link, inline, is_over, number, picture, since
from plots.run_history import History
from plots.style import PictureError
from study.design import STAGES


def study_page(folder: Path, link: Link) -> dict[str, Any]:
    """Returns the variables of the template report.html for a study.

    They come from the events of its trials, and from leaderboard.json if that exists. Raises `PictureError` if no trial
    has begun.
    """
    events = metrics.events(folder)
    if not events:
        raise PictureError(f"{folder}: no trial of this study has begun; python trials.py run --study {folder} begins")
    summary = metrics.read_json(folder / "leaderboard.json") or {}
    pictures = []
    if done := study_curves.selected(folder):
        pictures.append(picture(
            "selection", "The selection", "Every cell after its short training, in the order in which they ended.",
            study_curves.study_figure(list(done.items())),
        ))  # fmt: skip
    histories = readable(folder.glob("retrain/*/*/metrics.jsonl"), folder.glob("baseline/*/*/metrics.jsonl"))
    if any(history.curve("epoch", "valid_ppl", 0)[0] for history in histories):
        pictures.append(picture("training", "Training in full", "The chosen cells and the baselines.",
                                train_curves.train_figure(histories)))  # fmt: skip
    last = {event["trial"]: event for event in events if event["event"] != "started"}
    counts = Counter(event["event"] for event in last.values())
    state = "over" if is_over(folder) else f"last event {since(folder / metrics.EVENTS)}"
    trials = ", ".join(f"{counts[what]} {what}" for what in ("done", "halved", "failed"))
    return {
        "title": folder.resolve().name, "status": f"study, {state}; trials: {trials}",
        "notes": study_notes(last.values(), summary), "facts": chosen_facts(folder, summary, link),
        "board": leaderboard(folder, events, link), "tables": list(tables(folder, summary, link)),
        "pictures": pictures, "flags": [],
    }  # fmt: skip


def study_notes(last: Iterable[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """Returns notes on failures, early stops and a missing leaderboard, from each trial's and stage's last event."""
    found = [] if summary else ["No leaderboard yet: python trials.py report --study makes the tests and tables."]
    for event in last:
        if event["event"] == "failed":
            found.append(f"{event['trial']} failed: {event['reason']}")
        elif event["event"] == "stopped":
            found.append(f"The stage {event['trial']} was stopped early: {event['reason']}.")
    return found


def trial(name: str) -> tuple[str, str, str] | None:
    """Returns the stage, cell and seed of a trial's name, or None for a name that has another form."""
    parts = name.split("/")
    return tuple(parts) if len(parts) == 3 and parts[0] in STAGES and not {"", ".", ".."} & set(parts) else None


def readable(*paths: Iterable[Path]) -> list[History]:
    """Returns the histories of the runs whose metrics.jsonl has valid records."""
    found = []
    for path in (path for group in paths for path in sorted(group)):
        try:
            found.append(History(path.parent))
        except PictureError:
            continue
    return found


def leaderboard(folder: Path, events: Sequence[dict[str, Any]], link: Link) -> dict[str, Any]:
    """Returns a table with one row for each trained cell, the best first."""
    values: dict[tuple[str, str], dict[str, float]] = {}  # (stage, cell) -> seed -> perplexity
    halved = set()
    for event in events:
        if event["event"] in ("done", "halved") and (found := trial(event["trial"])):
            stage, cell, seed = found
            if stage in ("baseline", "select", "retrain"):
                values.setdefault((stage, cell), {})[seed] = event["valid_ppl"]
                (halved.add if event["event"] == "halved" else halved.discard)((stage, cell, seed))
    rows = []
    for cell in dict.fromkeys(cell for _, cell in values):
        full = next((stage for stage in ("baseline", "retrain") if (stage, cell) in values), None)
        fields = []
        for stage in ("select", full):
            of = values.get((stage, cell), {}) if stage else {}
            fields.append(mean_field(list(of.values()), link(folder / stage / cell) if of else "",
                                     any((stage, cell, seed) in halved for seed in of)))  # fmt: skip
        runs = [folder / stage / cell / seed for stage in (full, "select") if stage
                for seed in values.get((stage, cell), ())]  # fmt: skip
        results = {run: result for run in runs if (result := metrics.result(run))}
        tested = {run: value for run, result in results.items()
                  if metrics.is_number(value := result.get("test_ppl"))}  # fmt: skip
        run, test = next(iter(tested.items()), (None, None))
        fields.append(Field(number(test), link(run), test) if run else Field("-"))
        genotype = genotype_of(results.values())
        drawn = inline(cell_figure(genotype), f"{re.sub(r'[^A-Za-z0-9]', '_', cell)}-") if genotype else ""
        rows.append({"cell": cell, "fields": fields, "svg": drawn})
    rows.sort(key=lambda row: [(field.value == "", field.value) for field in reversed(row["fields"][:2])])
    return {"columns": ["cell", "short training", "in full", "test"], "rows": rows}


def mean_field(values: Sequence[float], href: str, halved: bool) -> Field:
    """Returns a field with the mean over seeds and the standard deviation."""
    if not values:
        return Field("-")
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return Field(number(mean(values)) + spread + (" (halved)" if halved else ""), href, mean(values))


def genotype_of(results: Iterable[dict[str, Any]]) -> Genotype | None:
    """Returns the cell that runs of train.py trained, or None for torch's own cells, which have no genotype."""
    cells = (cell_from_json(result["genotype"]) for result in results)
    return next((cell for cell in cells if isinstance(cell, Genotype)), None)


def chosen_facts(folder: Path, summary: dict[str, Any], link: Link) -> list[dict[str, str]]:
    chosen = summary.get("chosen")
    if not isinstance(chosen, dict) or not isinstance(chosen.get("run"), str) or not trial(chosen["run"]):
        return []
    href = link(folder / chosen["run"])
    named = (("chosen", str(chosen.get("cell"))), ("validation perplexity", number(chosen.get("valid_ppl"))),
             ("test perplexity", number(chosen.get("test_ppl"))))  # fmt: skip
    return [{"name": name, "value": value, "href": href} for name, value in named]


def tables(folder: Path, summary: dict[str, Any], link: Link) -> Iterable[dict[str, Any]]:
    """Yields the tables of the valid parts of `summary`, the content of leaderboard.json."""
    versus = summary.get("searched_against_random")
    note = "Short trainings."
    if isinstance(versus, dict):
        note += (f" Searched minus random: {number(versus.get('difference'))}, p = {number(versus.get('p'), 3)} in a "
                 "permutation test.")  # fmt: skip
    for key, title, words, columns in (
        ("methods", "Methods", note, ("method", "n", "mean", "sd", "best")),
        ("agreement", "Does one stage foretell the next?", "Kendall's tau and Spearman's rho.",
         ("between", "n", "tau", "rho")),
        ("proxies", "Proxies for training in full", "Rank correlation with it, and the interval of a bootstrap.",
         ("proxy", "cost", "tau", "rho", "seed_sd", "cell_sd")),
        ("cost", "Cost", "Device time by stage.", ("stage", "runs", "core_hours", "GPU_hours")),
    ):  # fmt: skip
        rows = summary.get(key)
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        columns = [name for name in columns if any(name in row for row in rows)]
        stage = {"methods": "select", "agreement": "select", "proxies": "proxy"}.get(key)
        found = []
        for row in rows if columns else ():
            here = stage or row.get("stage")  # The link leads to the runs of this stage.
            href = link(folder / here) if here in STAGES else ""
            name, *numbers = (shown(row.get(column)) for column in columns)
            found.append([Field(name), *(Field(text, href) for text in numbers)])
        if found:
            headings = [column.replace("_", " ") for column in columns]
            yield {"title": title, "note": words, "columns": headings, "rows": found}


def shown(value: Any) -> str:
    """Returns the text of a number, of an estimate with its interval, or of a string."""
    if isinstance(value, list) and len(value) == 3:
        return f"{number(value[0])} ({number(value[1])} to {number(value[2])})"
    return value if isinstance(value, str) else number(value)
