"""Plots a search: its losses, its alphas and genotypes over time, and the signal in the alphas' gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from math import ceil, log
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from genotypes import PRIMITIVES, Genotype
from plots.run_history import MAX_DRAWN, History, edges, evenly
from plots.style import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    ON_COLOUR,
    POINT,
    RED,
    SMALL,
    SOFT,
    WIDTH,
    PictureError,
    color_legend,
    legend,
    log_scale,
    new_figure,
    plot,
)

MOST = 150  # A curve of the small multiples has at most this many points.
LANE = 24  # A node's lane has this height in pixels.
PANEL = 215  # A row of panels has this height in pixels.

Panel = tuple[str, str, Callable[[Axes, History], None]]  # A panel is (title, unit of y, function that draws it).

# The pages of runs show each picture under this title, with this note on how to read it.
NOTES = {
    "curves": ("The run", "The relaxed model's perplexities say that it learns, not how good the cell is."),
    "genotype": ("The genotype",
                 "Colour is the activation, the number the node that it is applied to; a dark line is a change."),
    "edges": ("The alphas", "A node keeps the edge whose strongest primitive other than none is the most probable."),
    "signal": ("The signal",
               "From --diagnose_every: whether the alphas' gradient says the same on one batch and on another."),
}  # fmt: skip


def perplexities(axes: Axes, history: History) -> None:
    plot(axes, *history.curve("interval", "ppl", 0), "training", GREY)
    plot(axes, *history.curve("epoch", "valid_ppl", 0), "validation", BLUE, markevery=1, markersize=2.5)
    log_scale(axes)
    legend(axes)


def entropy(axes: Axes, history: History) -> None:
    x, alphas = history.probabilities
    each = -(alphas * np.log(np.maximum(alphas, 1e-12))).sum(-1)  # (R, edges), nats
    axes.fill_between(x, each.min(1), each.max(1), color=BLUE, alpha=0.18, linewidth=0, label="least to most")
    plot(axes, x, each.mean(1), "mean of edges", BLUE)
    axes.axhline(log(len(PRIMITIVES)), color=GREY, linestyle=":", linewidth=POINT, label="all alike, ln 5")
    legend(axes)


def mean_probabilities(axes: Axes, history: History) -> None:
    x, alphas = history.probabilities
    for name, y in zip(PRIMITIVES, alphas.mean(1).T, strict=True):
        plot(axes, x, y, name, COLOURS[name])


def shares(axes: Axes, history: History) -> None:
    genotypes = history.genotypes
    x = [0.0, *(x for x, _ in genotypes)]
    counts = [[sum(op == name for op, _ in cell.recurrent) for _, cell in genotypes] for name in PRIMITIVES[1:]]
    colours = [COLOURS[name] for name in PRIMITIVES[1:]]
    axes.stackplot(x, [[y[0], *y] for y in counts], colors=colours, labels=PRIMITIVES[1:], step="pre", linewidth=0)
    axes.yaxis.get_major_locator().set_params(integer=True)


def norms(axes: Axes, history: History) -> None:
    plot(axes, *history.curve("interval", "norm", 0), "gradient norm", BLUE)
    log_scale(axes)


def rate(history: History) -> tuple[list[float], list[float]]:
    """Returns the times and values of the schedule's learning rate. Runs of earlier versions lack the field `rate`;
    `lr` replaces it, of epochs if possible, because the `lr` of a step is scaled by the length of its segment."""
    return next((curve for column in (("interval", "rate"), ("epoch", "lr"), ("interval", "lr"))
                 if (curve := history.curve(*column))[0]), ([], []))  # fmt: skip


def rates(axes: Axes, history: History) -> None:
    plot(axes, *rate(history), "learning rate", BLUE)
    axes.set_ylim(bottom=0)


def run_panels(history: History) -> list[Panel]:
    """Returns the panels of a run for which something was recorded."""
    panels = [
        (history.curve("interval", "ppl", 0)[0] or history.curve("epoch", "valid_ppl", 0)[0],
         ("Perplexity", "per word", perplexities)),
        (history.probabilities[0], ("Entropy of the alphas", "nats", entropy)),
        (history.probabilities[0], ("Mean probability", "over all edges", mean_probabilities)),
        (history.genotypes, ("Primitives in the genotype", "nodes", shares)),
        (history.curve("interval", "norm", 0)[0], ("Gradient of the weights", "norm, before clipping", norms)),
        (rate(history)[0], ("Learning rate", "of a full segment", rates)),
    ]  # fmt: skip
    return [panel for recorded, panel in panels if recorded]


def draw_panels(figure: Figure | SubFigure, history: History, panels: Sequence[Panel]) -> None:
    """Draws panels three to a row with a common time axis, a line at each rollback, and a legend of any primitives."""
    columns = min(3, len(panels))
    grid = figure.subplots(ceil(len(panels) / columns), columns, squeeze=False, sharex=True)
    for axes, (title, unit, draw) in zip(grid.flat, panels, strict=False):
        draw(axes, history)
        axes.set(title=title, ylabel=unit, xlabel=history.unit, xlim=(0, 1.02 * history.end))
        axes.tick_params(labelbottom=True)
        for row in history.records["rollback"]:
            axes.axvline(history.when(row["step"]), color=RED, linestyle="--", linewidth=POINT, gid="rollback")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    if any(draw in (mean_probabilities, shares) for *_, draw in panels):
        color_legend(figure, PRIMITIVES, loc="outside lower center")


def strip_rows(history: History) -> list[tuple[float, Genotype]]:
    """Returns the genotype of each epoch or, if fewer than 8 epochs have one, of every record."""
    by_epoch = history.cells_of(history.records["epoch"])
    return by_epoch if len(by_epoch) >= 8 else history.genotypes


class Stretch(NamedTuple):
    """In a stretch of time from `start` to `stop`, a node has this primitive and predecessor."""

    node: int
    op: str
    predecessor: int
    start: float
    stop: float


def stretches(rows: Sequence[tuple[float, Genotype]]) -> list[Stretch]:
    """Returns the stretches of each node; a genotype is taken to hold since the time of the one before it."""
    times, segments = [0.0, *(x for x, _ in rows)], []
    for node, choices in enumerate(zip(*(cell.recurrent for _, cell in rows), strict=True), start=1):
        first = 0
        for (op, predecessor), same in groupby(choices):
            after = first + len(list(same))
            segments.append(Stretch(node, op, predecessor, times[first], times[after]))
            first = after
    return segments


def draw_strip(figure: Figure | SubFigure, history: History, rows: Sequence[tuple[float, Genotype]]) -> None:
    axes = figure.subplots()
    end, nodes = rows[-1][0], len(rows[-1][1].recurrent)
    pixel = end / (WIDTH - 60)
    for s in stretches(rows):
        bar = {"height": 0.8, "color": COLOURS[s.op], "linewidth": 0}
        axes.barh(s.node, s.stop - s.start, left=s.start, gid=f"stretch-{s.node}-{s.op}-{s.predecessor}", **bar)
        if s.start > 0:
            axes.plot([s.start] * 2, [s.node - 0.43, s.node + 0.43], color=INK, linewidth=1.6 * POINT, gid="change")
        if s.stop - s.start > 12 * pixel:
            look = {"fontsize": SMALL * POINT, "color": ON_COLOUR, "va": "center_baseline", "weight": "bold"}
            axes.text(s.start + 5 * pixel, s.node, str(s.predecessor), **look)
    axes.set(xlim=(0, end), ylim=(nodes + 0.6, 0.4), xlabel=history.unit, ylabel="node", title="The genotype over time")
    axes.set_yticks(range(1, nodes + 1), [f"$s_{i}$" for i in range(1, nodes + 1)])
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    color_legend(figure, PRIMITIVES[1:], loc="outside lower center")


def draw_edges(figure: Figure | SubFigure, history: History, height: float) -> None:
    """Draws a panel for each edge, in a row for its node, into a figure of `height` pixels."""
    if isinstance(figure, Figure):
        figure.set_layout_engine("none")  # Axes are placed by hand.
    x, alphas = history.probabilities
    few = evenly(len(x), MOST)
    x, alphas = np.array(x)[few], alphas[few]
    nodes = history.nodes
    cell = history.genotypes[-1][1].recurrent if history.genotypes else ()
    kept = {(j, i): op for i, (op, j) in enumerate(cell, start=1)} if len(cell) == nodes else {}
    room = 0.08 * np.ptp(alphas) + 1e-4
    limits = alphas.min() - room, alphas.max() + room
    left, bottom, head = 56 / WIDTH, 46 / height, 30 / height
    wide, high = (1 - left - 8 / WIDTH) / nodes, (1 - bottom - head) / nodes
    for edge, (j, i) in enumerate(edges(nodes)):
        place = (left + j * wide, bottom + (nodes - i) * high, wide - 6 / WIDTH, high - 6 / height)
        axes = figure.add_axes(place, xlim=(0, x[-1]), ylim=limits, gid=f"edge-{j}-{i}")
        op = kept.get((j, i))
        if op:
            axes.patch.set(facecolor=COLOURS[op], alpha=0.13)
        for spine in axes.spines.values():
            spine.set(visible=True, color=COLOURS[op] if op else GREY, linewidth=(2 if op else 0.6) * POINT)
        axes.axhline(1 / len(PRIMITIVES), color=GREY, linewidth=0.6 * POINT)
        for name, y in zip(PRIMITIVES, alphas[:, edge].T, strict=True):
            plot(axes, x, y, name, COLOURS[name], markersize=2, linewidth=(1.8 if name == op else 1.2) * POINT)
        axes.tick_params(labelsize=(SMALL - 1) * POINT, length=2, left=j == 0, labelleft=j == 0, labelbottom=i == nodes)
        axes.tick_params(bottom=i == nodes)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
        if j == 0:
            axes.set_ylabel(f"$s_{i}$", rotation=0, ha="right", va="center", color=INK, fontsize=(SMALL + 2) * POINT)
        if i == nodes:
            axes.set_xlabel(f"from $s_{j}$", color=INK)
    figure.text(left + 2.4 * wide, 1 - 34 / height, "Probability of each primitive on every edge", weight="bold",
                fontsize=(SMALL + 2) * POINT)  # fmt: skip
    note = f"over {history.unit}, all on one scale; the line is 1/{len(PRIMITIVES)}; what the genotype keeps is framed"
    figure.text(left + 2.4 * wide, 1 - 54 / height, note, color=SOFT)
    color_legend(figure, PRIMITIVES, loc="upper left", bbox_to_anchor=(left + 2.4 * wide - 6 / WIDTH, 1 - 60 / height))


def cosines(axes: Axes, history: History) -> None:
    for name, colour in (("whole", INK), ("direct", BLUE), ("implicit", RED)):
        x, y = history.curve("diagnosis", f"cosine_{name}")
        if x:
            plot(axes, x, y, name, colour)
    axes.axhline(0, color=GREY, linewidth=POINT)
    legend(axes)


def one_of(name: str, log: bool = False) -> Callable[[Axes, History], None]:
    """Returns a function that draws the diagnosis `name` as one curve."""

    def draw(axes: Axes, history: History) -> None:
        plot(axes, *history.curve("diagnosis", name, 0 if log else -MAX_DRAWN), name.replace("_", " "), BLUE)
        if log:
            log_scale(axes)
        else:
            axes.ticklabel_format(useOffset=False)

    return draw


def gap(axes: Axes, history: History) -> None:
    for name, colour in (("discrete", RED), ("relaxed", BLUE)):
        plot(axes, *history.curve("diagnosis", f"{name}_loss"), name, colour)
    legend(axes)


def signal_panels(history: History) -> list[Panel]:
    """Returns the panels of the diagnoses for which something was recorded."""
    panels: list[tuple[str, Panel]] = [
        ("cosine_whole", ("Independent batches agree", "cosine of alpha gradients", cosines)),
        ("norm_ratio", ("Implicit to direct part", "ratio of norms", one_of("norm_ratio", log=True))),
        ("sensitivity", ("What becomes of a small change", "growth over a segment", one_of("sensitivity", log=True))),
        ("product_cosine", ("Finite to exact product", "cosine", one_of("product_cosine"))),
        ("eigenvalue", ("Largest eigenvalue", "of the Hessian in alpha", one_of("eigenvalue"))),
        ("relaxed_loss", ("What discretising costs", "validation loss, nats", gap)),
    ]
    return [panel for name, panel in panels if history.curve("diagnosis", name)[0]]


def parts(history: History) -> dict[str, tuple[float, Callable[[Figure | SubFigure], None]]]:
    """Returns by name the height in pixels, and a function that draws it, of each picture with something recorded."""
    drawings = {}
    if panels := run_panels(history):
        drawings["curves"] = PANEL * ceil(len(panels) / 3) + 30, partial(draw_panels, history=history, panels=panels)
    if rows := strip_rows(history):
        height = LANE * len(rows[-1][1].recurrent) + 95
        drawings["genotype"] = height, partial(draw_strip, history=history, rows=rows)
    if history.nodes:
        height = 80 + 68 * history.nodes
        drawings["edges"] = height, partial(draw_edges, history=history, height=height)
    if panels := signal_panels(history):
        drawings["signal"] = PANEL * ceil(len(panels) / 3), partial(draw_panels, history=history, panels=panels)
    return drawings


def figures(history: History) -> dict[str, Figure]:
    """Returns by name a figure of each picture for which something was recorded."""
    by_name = {}
    for name, (height, draw) in parts(history).items():
        by_name[name] = new_figure(height)
        draw(by_name[name])
    return by_name


def whole_figure(history: History) -> Figure:
    """Returns one figure with all pictures below each other. Raises `PictureError` if nothing was recorded."""
    if not (drawings := parts(history)):
        raise PictureError(f"{history.folder}: nothing to draw yet; its metrics.jsonl has no interval and no epoch")
    heights, draws = zip(*drawings.values(), strict=True)
    figure = new_figure(sum(heights))
    places = figure.subfigures(len(drawings), 1, height_ratios=heights, squeeze=False)[:, 0]
    for place, draw in zip(places, draws, strict=True):
        place.set_facecolor("none")
        draw(place)
    return figure
