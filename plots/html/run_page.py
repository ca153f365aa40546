"""Collects the content of a run's HTML page: its progress, its results and its pictures."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from experiment import metrics
from genotypes import Genotype, GenotypeError, cell_from_json, parse
from plots import animation, search_curves, train_curves
from plots.cell_graph import cell_figure
from plots.html.page import Link, number, picture, since, unknown_words
from plots.run_history import History
from plots.style import PictureError


def run_page(folder: Path, link: Link) -> dict[str, Any]:
    """Returns the variables of the template report.html for a run. Raises `PictureError` if it has no metrics."""
    history = History(folder)
    result = history.result
    unknown = "config.json is missing or damaged, so the flags of this run are not known."
    stopped = "" if result is None else f"over, stopped by {result.get('stopped_by', '?')}"
    return {
        "title": folder.resolve().name,
        "status": stopped or f"no result yet; metrics.jsonl was last written to {since(folder / 'metrics.jsonl')}",
        "notes": [] if metrics.read_json(folder / "config.json") else [unknown],
        "facts": facts(history, link), "board": None, "tables": [], "pictures": run_pictures(history),
        "flags": [(name, str(value)) for name, value in sorted(history.flags.items())],
    }  # fmt: skip


def facts(history: History, link: Link) -> list[dict[str, str]]:
    """Returns the key figures of a run, each with a link to the file that it is from."""
    entries, result, flags = [], history.result, history.flags

    def add(name: str, text: str, file: str) -> None:
        entries.append({"name": name, "value": text, "href": link(history.folder / file)})

    rows = [row for rows in history.records.values() for row in rows]
    last = max(rows, key=lambda row: row["step"])
    _, valid = history.curve("epoch", "valid_ppl", 0)
    if valid:
        add("validation perplexity, last", number(valid[-1]), "metrics.jsonl")
        add("best", number(min(valid)), "metrics.jsonl")
    if result is not None:
        add("test perplexity", number(result.get("test_ppl")), "result.json")
        for name, share in unknown_words(result):
            add(name, share, "result.json")
        if "params" in result:
            add("weights", number(result["params"]), "result.json")
    add("epoch", f"{last['epoch']} of {flags['epochs']}" if "epochs" in flags else str(last["epoch"]), "metrics.jsonl")
    add("weight steps", number(last["step"]), "metrics.jsonl")
    add("hours", number(max(row["seconds"] for row in rows) / 3600), "metrics.jsonl")
    for name in ("data", "seed", "device"):
        if name in flags:
            add(name, str(flags[name]), "config.json")
    add("log", "log.txt", "log.txt")
    return entries


def run_pictures(history: History) -> list[dict[str, Any]]:
    """Returns the pictures of a run that can be drawn from its records."""
    pictures = []
    if cell := cell_of(history):
        searched = "The cell that was found" if history.result else "The most likely cell so far"
        title = searched if history.genotypes else "The cell"
        pictures.append(picture("cell", title, "", cell_figure(cell), code=str(cell)))
    with suppress(PictureError):  # A retraining has no alphas.
        pictures.append(formation_picture(history))
    for name, figure in search_curves.figures(history).items():
        pictures.append(picture(name, *search_curves.NOTES[name], figure))
    if not history.genotypes and history.curve("epoch", "valid_ppl", 0)[0]:
        pictures.append(picture("training", "Validation", "", train_curves.train_figure([history])))
    return pictures


def cell_of(history: History) -> Genotype | None:
    """Returns the cell of the result, else the last one of a search, else the trained one; None for an LSTM or GRU."""
    result = history.result
    if history.genotypes and not result:
        return history.genotypes[-1][1]
    try:
        cell = cell_from_json(result["genotype"]) if result else parse(str(history.flags.get("arch")))
    except GenotypeError:
        return None
    return cell if isinstance(cell, Genotype) else None


def formation_picture(history: History) -> dict[str, Any]:
    """Returns the formation with the states of its frames. Raises `PictureError` if there is nothing to animate."""
    when, states = animation.frames(history)
    figure, _ = animation.build(history.nodes, {gid for state in states for gid in state})
    note = "Every edge fades with its probability; the most likely cell has labels."
    animated = picture("formation", "The formation", note, figure)

    def seen(part: re.Match) -> str:
        """Returns an id with the opacity in the last frame, which shows unless the page's script runs."""
        opacity = states[-1].get(part[1].removesuffix("-text"), 0)
        return f'{part[0]} style="opacity: {opacity:.2f}"'

    animated["svg"] = Markup(re.sub(r'id="formation-((?:arc|label)-[^"]*)"', seen, animated["svg"]))
    rounded = [{gid: round(value, 2) for gid, value in state.items()} for state in states]
    animated["frames"] = {"when": when, "unit": history.unit, "states": rounded, "prefix": "formation-"}
    return animated
