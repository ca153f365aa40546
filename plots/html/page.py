"""Provides the building blocks that the HTML pages of runs and of studies share."""

import re
import time
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from experiment import metrics
from plots.style import BOXES, GREY, INK, PAPER, SOFT

IN_THE_DARK = {INK: "var(--ink)", SOFT: "var(--soft)", GREY: "var(--line)", PAPER: "var(--paper)", BOXES: "var(--page)"}

Link = Callable[[Path], str]  # A link function returns the URL of a file relative to the page.


class Field(NamedTuple):
    """A field is one entry of a table in a page."""

    text: str
    href: str = ""
    value: float | str = ""  # Tables are sorted by this value.


def is_study(folder: Path) -> bool:
    return (folder / "study.json").exists() or (folder / metrics.EVENTS).exists()


def is_over(folder: Path) -> bool:
    """Returns whether a run has its result, or whether a study's leaderboard is no older than its last event."""
    if not is_study(folder):
        return metrics.result(folder) is not None
    try:
        return (folder / "leaderboard.json").stat().st_mtime >= (folder / metrics.EVENTS).stat().st_mtime
    except OSError:
        return False


def inline(figure: Figure, prefix: str) -> Markup:
    """Returns a figure as an <svg> element with unique ids, which begin with `prefix`, and the colours of the page."""
    seen: Counter[str] = Counter()

    def own(match: re.Match) -> str:
        """Returns a unique id, because curves in two panels may have the same name."""
        seen[match[1]] += 1
        return f'id="{prefix}{match[1]}' + (f'-again-{seen[match[1]]}"' if seen[match[1]] > 1 else '"')

    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r'\bid="([^"]*)"', own, text[text.index("<svg") :])
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", text)
    for colour, variable in IN_THE_DARK.items():
        text = re.sub(colour, variable, text, flags=re.IGNORECASE)
    return Markup(text)  # Matplotlib has escaped all text.


def picture(name: str, title: str, note: str, figure: Figure, **more: Any) -> dict[str, Any]:
    return {"name": name, "title": title, "note": note, "svg": inline(figure, f"{name}-"), "frames": None, "code": "",
            **more}  # fmt: skip


def number(value: Any, digits: int = 2) -> str:
    """Returns the text of a number with thousands separators, or a dash for anything else."""
    if not metrics.is_number(value):
        return "-"
    return f"{value:,}" if type(value) is int else f"{value:,.{digits}f}"


def unknown_words(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the name and the text of the share of unknown words of each split that has some, for a result.json."""
    shares = metrics.unknown_shares(result).items()
    return [(f"unknown words of {split}, counted as <unk>", f"{share:.1%}") for split, share in shares]


def since(path: Path) -> str:
    """Returns how long ago a file was last written, in words, or "never" if it cannot be read."""
    try:
        seconds = max(0, time.time() - path.stat().st_mtime)
    except OSError:
        return "never"
    size, unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if seconds >= 2 * s or s == 1)  # fmt: skip
    return f"{seconds / size:.0f} {unit} ago"
