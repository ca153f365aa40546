"""Plots the validation curves of retrainings on one axis, beside the published perplexities."""

from collections.abc import Sequence
from math import log
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.run_history import History
from plots.style import GREY, INK, POINT, SERIES, SMALL, SOFT, PictureError, log_scale, new_figure, plot, without_math

# The published cell has these validation perplexities on Penn Treebank by epoch (Li & Talwalkar, UAI 2019).
ANCHORS = {300: 64.0, 500: 61.9, 1600: 59.5, 2600: 58.5, 3600: 58.2}
HEIGHT, LINE = 400, 17  # The picture and a line of text have these heights in pixels.
LOOKS = ("-", "--", ":", "-.")


def switch(history: History) -> float | None:
    """Returns when averaging began (NT-ASGD): the end of the last epoch before it, or None if no such epoch exists."""
    records = history.records["epoch"]
    first = next((k for k, record in enumerate(records) if record.get("phase") == "asgd"), 0)
    return history.when(records[first - 1]["step"]) if first else None


def names(folders: Sequence[Path]) -> list[str]:
    """Returns distinct names for the folders: as few last parts of each path as distinguish them, or the full paths."""
    for depth in range(1, 6):
        shortest = [printable("/".join(folder.resolve().parts[-depth:])) for folder in folders]
        if len(set(shortest)) == len(shortest):
            return shortest
    return [printable(str(folder)) for folder in folders]


def printable(name: str) -> str:
    """Returns the name of a file with "?" for each byte that is not UTF-8, which no font can draw."""
    return name.encode(errors="replace").decode()


def train_figure(histories: Sequence[History]) -> Figure:
    """Returns a figure with the validation curve of each run. Raises `PictureError` if no epoch of any run is over."""
    histories = [history for history in histories if history.curve("epoch", "valid_ppl", 0)[0]]
    if not histories:
        raise PictureError("no epoch of these runs is over yet, so there is no validation perplexity to draw")
    figure = new_figure(HEIGHT + 16 * max(0, len(histories) - 8))
    axes = figure.subplots()
    values, switched = [], False
    for k, (history, name) in enumerate(zip(histories, names([h.folder for h in histories]), strict=True)):
        x, y = history.curve("epoch", "valid_ppl", 0)
        values += y
        colour, look = SERIES[k % len(SERIES)], LOOKS[k // len(SERIES) % len(LOOKS)]
        plot(axes, x, y, f"{name}: {min(y):.2f}", colour, look)
        when = switch(history)
        if when is not None and (after := [value for time, value in zip(x, y, strict=True) if time >= when]):
            axes.plot([when], after[:1], "D", color=colour, markersize=6, markeredgecolor=INK, gid=f"switch-{name}")
            switched = True
    end = max(history.end for history in histories)
    # The anchors are of the whole of Penn Treebank.
    if all((run.flags.get("data"), run.flags.get("limit_tokens")) == ("penn", 0) for run in histories):
        values += ANCHORS.values()
        draw_anchors(axes, end, log(max(values)) - log(min(values)))
    axes.set(xlabel="epochs", ylabel="validation perplexity, per word", xlim=(0, 1.02 * end))
    if max(values) > 1.5 * min(values):
        log_scale(axes)
    if switched:
        axes.plot([], [], "D", color="none", markeredgecolor=INK, markersize=6, label="averaging from here on")
    lines = [line for i, line in enumerate(axes.lines) if line.get_label() != f"_child{i}"]
    axes.legend(lines, [line.get_label() for line in lines], title="run: best", loc="upper left",
                bbox_to_anchor=(1.01, 1), alignment="left")  # fmt: skip
    return without_math(figure)


def draw_anchors(axes: Axes, end: float, span: float) -> None:
    """Draws a line for each published perplexity, and a cross at its epoch if the runs are that long. The lines are
    labelled at their right end, where close lines share one label. `span` is the axis's height in nats."""
    for epochs, value in ANCHORS.items():
        axes.axhline(value, gid=f"anchor-{epochs}", color=GREY, linestyle=":", linewidth=POINT)
        if epochs <= end:
            axes.plot([epochs], [value], "x", color=SOFT, markersize=6, gid=f"reached-{epochs}")
    line = 1.05 * span * LINE / HEIGHT  # The height of a line of text on a log axis, more than on a linear axis.
    groups: list[list[int]] = []
    for epochs, value in ANCHORS.items():  # Perplexities are in descending order.
        last = groups[-1] if groups else []
        if last and log(ANCHORS[last[0]]) - log(value) < line * (len(last) + 1):
            last.append(epochs)
        else:
            groups.append([epochs])
    for group in groups:
        words = "\n".join(f"{ANCHORS[epochs]} after {epochs:,}" for epochs in group)
        place = (1.01, mean(ANCHORS[epochs] for epochs in group))
        axes.annotate(words, place, xycoords=("axes fraction", "data"), va="center", color=SOFT, annotation_clip=False,
                      fontsize=(SMALL - 1) * POINT)  # fmt: skip
