"""Collects the content of a study's HTML page: its leaderboard with each cell, its statistics and its curves."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiment import metrics
from genotypes import Genotype, cell_from_json
from plots import study_curves, train_curves
from plots.cell_graph import cell_figure
from plots.html.page import Field, Link, inline, is_over, number, picture, since, unknown_words
from plots.run_history import History
from plots.style import PictureError
from study.jobs import STAGES, name_parts


def study_page(folder: Path, link: Link) -> dict[str, Any]:
    """Returns the variables of the template report.html for a study. Raises `PictureError` if no trial has begun."""
    events = metrics.events(folder)
    if not events:
        report = study_curves.command("report", folder)
        raise PictureError(f"{folder}: no events of trials yet; {report} makes those of trials.jsonl, if there is one")
    summary = metrics.read_json(folder / "leaderboard.json") or {}
    pictures = []
    if done := study_curves.selected(folder):
        note = "Every cell after its short training, in the order in which they ended."
        pictures.append(picture("selection", "The selection", note, study_curves.study_figure(done)))
    with suppress(PictureError):  # The leaderboard may have too few cells.
        note = "The feature of the cells that is correlated most with their perplexity."
        pictures.append(picture("cells", "What tells cells apart", note, study_curves.cells_figure(folder)))
    with suppress(PictureError):
        note = "How each short training ranks the cells of the proxies, and the long one."
        pictures.append(picture("proxies", "Ranks of the proxies' cells", note, study_curves.proxies_figure(folder)))
    histories = []
    retrained, baselines = (sorted(folder.glob(f"{stage}/*/*/metrics.jsonl")) for stage in ("retrain", "baseline"))
    for path in retrained + baselines:
        with suppress(PictureError):  # A run may have no valid record yet.
            histories.append(History(path.parent))
    if any(history.curve("epoch", "valid_ppl", 0)[0] for history in histories):
        note = "The chosen cells and the baselines."
        pictures.append(picture("training", "Training in full", note, train_curves.train_figure(histories)))
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
    notes = [] if summary else ["No leaderboard yet: python trials.py report --study DIR makes the tests and tables."]
    for event in last:
        if event["event"] == "failed":
            notes.append(f"{event['trial']} failed: {event['reason']}")
        elif event["event"] == "stopped":
            notes.append(f"The stage {event['trial']} was stopped early: {event['reason']}.")
    return notes


def leaderboard(folder: Path, events: Sequence[dict[str, Any]], link: Link) -> dict[str, Any]:
    """Returns a table with one row for each trained cell, the best first."""
    done: dict[tuple[str, ...], dict[str, dict]] = {}  # (stage, cell) -> seed -> event
    for event in events:
        if event["event"] in ("done", "halved") and (parts := name_parts(event["trial"])):
            *stage_and_cell, seed = parts
            done.setdefault(tuple(stage_and_cell), {})[seed] = event
    rows = []
    trained = [cell for stage, cell, *_ in done if stage in ("baseline", "select", "retrain")]
    for cell in dict.fromkeys(trained):
        full = next((stage for stage in ("baseline", "retrain") if (stage, cell) in done), "")
        fields = []
        for stage in ("select", full):
            fields.append(mean_field(done.get((stage, cell), {}).values(), link(folder / stage / cell)))
        runs = [folder / stage / cell / seed for stage in (full, "select") for seed in done.get((stage, cell), ())]
        results = {run: result for run in runs if (result := metrics.result(run))}
        tested = [Field(number(test), link(run), test) for run, result in results.items()
                  if (test := result.get("test_ppl")) is not None]  # fmt: skip
        fields += tested[:1] or [Field("-")]
        cells = (cell_from_json(result["genotype"]) for result in results.values())
        genotype = next((genotype for genotype in cells if isinstance(genotype, Genotype)), None)  # not an LSTM or GRU
        drawn = inline(cell_figure(genotype), f"{re.sub(r'[^A-Za-z0-9]', '_', cell)}-") if genotype else ""
        rows.append({"cell": cell, "fields": fields, "svg": drawn})
    rows.sort(key=lambda row: [(field.value == "", field.value) for field in reversed(row["fields"][:2])])
    return {"columns": ["cell", "short training", "in full", "test"], "rows": rows}


def mean_field(events: Collection[dict[str, Any]], href: str) -> Field:
    """Returns a field with the mean over the trials of a cell and the standard deviation, or a dash without trials."""
    values = [event["valid_ppl"] for event in events]
    if not values:
        return Field("-")
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    halved = " (halved)" if any(event["event"] == "halved" for event in events) else ""
    return Field(number(mean(values)) + spread + halved, href, mean(values))


def chosen_facts(folder: Path, summary: dict[str, Any], link: Link) -> list[dict[str, str]]:
    chosen = summary.get("chosen")
    if not isinstance(chosen, dict) or not isinstance(chosen.get("run"), str) or not name_parts(chosen["run"]):
        return []
    href = link(folder / chosen["run"])
    named = [("chosen", str(chosen.get("cell"))), ("validation perplexity", number(chosen.get("valid_ppl"))),
             ("test perplexity", number(chosen.get("test_ppl")))]  # fmt: skip
    named += unknown_words({"unknown_share": chosen.get("unknown")})
    return [{"name": name, "value": value, "href": href} for name, value in named]


def tables(folder: Path, summary: dict[str, Any], link: Link) -> Iterable[dict[str, Any]]:
    """Yields the tables of the valid parts of `summary`, the content of leaderboard.json."""
    note = (
        "Short trainings. p: permutation test against the random cells; random below: the share of these that are "
        "better; rival: the best of as many random cells as take the same time."
        + (" No test is made before all searches and short trainings have ended." if summary.get("to_run") else "")
    )
    of_methods = "method n mean sd median best p p_corrected random_below rival_draws minus_rival".split()
    for key, title, words, stage, columns in (
        ("methods", "Methods", note, "select", of_methods),
        ("agreement", "Does one stage foretell the next?", "Kendall's tau and Spearman's rho.", "select",
         ("between", "n", "tau", "rho")),
        ("proxies", "Proxies for training in full", "Rank correlation with it, and the interval of a bootstrap.",
         "proxy", ("proxy", "cost", "tau", "rho", "seed_sd", "cell_sd")),
        ("cost", "Cost", "Device time by stage.", None, ("stage", "runs", "core_hours", "GPU_hours")),
    ):  # fmt: skip
        rows = summary.get(key)
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        columns = [name for name in columns if any(name in row for row in rows)]
        lines = []
        for row in rows if columns else ():
            stage_of_row = stage or row.get("stage")  # The link leads to the runs of this stage.
            href = link(folder / stage_of_row) if stage_of_row in STAGES else ""
            name, *numbers = (shown(row.get(column), 4 if column in ("p", "p_corrected") else 2) for column in columns)
            lines.append([Field(name), *(Field(text, href) for text in numbers)])
        if lines:
            headings = [column.replace("_", " ") for column in columns]
            yield {"title": title, "note": words, "columns": headings, "rows": lines}


def shown(value: Any, digits: int = 2) -> str:
    """Returns the text of a number, of an estimate with its interval, or of a string."""
    if isinstance(value, list) and len(value) == 3:
        return f"{number(value[0])} ({number(value[1])} to {number(value[2])})"
    return value if isinstance(value, str) else number(value, digits)
