"""Plots the trainings of a study: the selection in the order in which its trials ended, the cells against the feature
that tells them apart, and the ranks of the proxies' cells after each of their trainings.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from statistics import median
from textwrap import fill

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment import metrics
from genotypes import parse
from plots.run_history import MAX_DRAWN
from plots.style import BLUE, GREEN, GREY, INK, RED, SERIES, PictureError, new_figure, without_math
from study.design import RANDOM
from study.features import features

# Each look is (colour, marker, fill style); those of the methods that search are hollow from the seventh on.
RANDOM_LOOK = (GREEN, "^", "full")
POINTS = ((BLUE, "o"), (RED, "s"), *zip(SERIES[3:], "DvP", strict=True), (INK, "X"))
LOOKS = tuple((*point, fill_style) for fill_style in ("full", "none") for point in POINTS)
# A leaderboard.json that is damaged, or of another version, leads to one of these.
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


def command(stage: str, folder: Path) -> str:
    """Returns the command that runs a stage of the study in `folder`."""
    return f"python trials.py {stage} --study {quote(str(folder))}"


def selected(folder: Path) -> list[tuple[str, float]]:
    """Returns (trial such as "first-1/1001", validation perplexity) of each short training, in the order of its end."""
    done = {}
    for event in metrics.events(folder):
        stage, _, cell = event["trial"].partition("/")
        if stage == "select" and event["event"] in ("done", "halved") and 0 < event["valid_ppl"] < MAX_DRAWN:
            done[cell] = event["valid_ppl"]
    return list(done.items())


def study_figure(done: Sequence[tuple[str, float]]) -> Figure:
    """Returns a figure of the short trainings of a study, of which `done` is what `selected` returns."""
    figure = new_figure(345)
    axes = figure.add_subplot()
    values, order = [value for _, value in done], range(1, len(done) + 1)
    for name, average, look in (("best so far", min, "-"), ("median so far", median, "--")):
        curve = [average(values[:i]) for i in order]
        axes.step(order, curve, look, where="post", color=INK if average is min else GREY, linewidth=1.5, label=name)
    scatter(axes, [trial.partition("/")[0] for trial, _ in done], order, values)
    axes.set(xlabel="short trainings that ended", ylabel="validation perplexity, per word")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return without_math(figure)


def selection_figure(folder: Path) -> Figure:
    """Returns a figure of the selection so far. Raises `PictureError` if no trial of it is done or halved."""
    if done := selected(folder):
        return study_figure(done)
    select = command("select", folder)
    raise PictureError(f"no short training of a study is done in {str(folder)!r}; {select} makes some")


def scatter(axes: Axes, cells: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Draws a point for each cell; `cells` has their names, such as "first-1", each of which begins with a method.
    Looks follow the alphabetical order of the methods, so that two pictures of one study have the same."""
    methods = [cell.rpartition("-")[0] for cell in cells]
    searches = sorted(set(methods) - {RANDOM})
    for i, method in enumerate([*searches, *[RANDOM] * (RANDOM in methods)]):
        colour, mark, fill_style = RANDOM_LOOK if method == RANDOM else LOOKS[i % len(LOOKS)]
        points = [(a, b) for name, a, b in zip(methods, x, y, strict=True) if name == method]
        axes.plot(
            *zip(*points, strict=True), mark, color=colour, fillstyle=fill_style, markersize=7, alpha=0.8, label=method
        )


def cells_figure(folder: Path) -> Figure:
    """Returns a figure of the cells' perplexities, early and at the end of their short trainings, against the feature
    that is correlated most with them at the end. Raises `PictureError` if leaderboard.json has no such correlations."""
    board = metrics.read_json(folder / "leaderboard.json") or {}
    try:
        rows = [row for row in board["features"] if row["cells"] == "all"]
        known = [row for row in rows if row["rho"][0] is not None]
        name = max(known, key=lambda row: (row["epochs"], abs(row["rho"][0])))["feature"]
        cells = [(str(row["cell"]), features(parse(row["genotype"]))[name], float(row["early"]), float(row["select"]))
                 for row in board["cells"] if None not in (row["early"], row["select"])]  # fmt: skip
        rho = {int(row["epochs"]): "unknown" if row["rho"][0] is None else f"{row['rho'][0]:.2f}"
               for row in rows if row["feature"] == name}  # fmt: skip
        if not cells or len(rho) > 2:
            raise ValueError("no cells, or more times than early and late")
    except DAMAGED as error:
        reason = f"no correlations of the cells' features; {command('report', folder)} makes them for five cells"
        raise PictureError(f"{folder}: {reason}") from error
    figure = new_figure(345)
    labels, values, *perplexities = zip(*cells, strict=True)
    panels = figure.subplots(1, len(rho), squeeze=False)[0]  # one if the short trainings have a single epoch
    for axes, (epochs, r), ppl in zip(panels, sorted(rho.items()), perplexities[-len(rho) :], strict=True):
        scatter(axes, labels, values, ppl)
        axes.set(xlabel=f"{name} of the cell", ylabel="validation perplexity, per word")
        axes.set_title(f"after {epochs} epoch{'s' if epochs > 1 else ''}: Spearman's rho {r}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return without_math(figure)


def proxies_figure(folder: Path) -> Figure:
    """Returns a figure of the rank of each cell of the proxies after every short training, those without flags of their
    own first, and after the long one, by whose ranks the lines are coloured. A cell that lacks one of these trainings
    is left out. Raises `PictureError` if leaderboard.json has fewer than two cells that lack none."""
    board = metrics.read_json(folder / "leaderboard.json") or {}
    try:
        *short, long = board["proxy_cells"][0]["ppl"]
        trainings = [*sorted(short, key=lambda name: name.startswith("--")), long]
        cells = {row["cell"]: [float(row["ppl"][name]) for name in trainings]
                 for row in board["proxy_cells"] if None not in row["ppl"].values()}  # fmt: skip
        names = {row["cell"]: short_name(row["cell"], row["genotype"]) for row in board["proxy_cells"]}
        if len(cells) < 2:
            raise ValueError("a ranking needs two cells")
    except DAMAGED as error:
        reason = f"no two cells with all trainings of the proxies; {command('report', folder)} lists what they have"
        raise PictureError(f"{folder}: {reason}") from error
    ranks = [
        [1 + sum(other < ppl for other in column) for ppl in column] for column in zip(*cells.values(), strict=True)
    ]
    figure = new_figure(110 + 22 * len(cells))
    axes = figure.subplots()
    for label, ppls, of_cell in zip(cells, cells.values(), zip(*ranks, strict=True), strict=True):
        colour = colormaps["viridis"](0.9 * (of_cell[-1] - 1) / (len(cells) - 1))
        axes.plot(of_cell, "o-", color=colour, linewidth=2, markersize=6, gid=f"ranks-{label}")
        axes.annotate(
            f"{names[label]}: {ppls[-1]:.2f}", (len(trainings) - 0.9, of_cell[-1]), va="center", annotation_clip=False
        )
    axes.invert_yaxis()
    axes.set_xticks(range(len(trainings)), [fill(name, 16) for name in trainings])
    axes.set(ylabel="rank of the cell", yticks=range(1, len(cells) + 1))
    axes.set_title("Ranks after each short training and, last, after the long one")
    return without_math(figure)


def short_name(cell: str, genotype: str | None) -> str:
    """Returns the name of a cell, or, where that is too long, how many nodes have each primitive and predecessor: a
    cell that --proxy_cells gives as the text of a genotype has this text as its name."""
    if len(cell) <= 28 or genotype is None:
        return cell
    nodes = Counter(parse(genotype).recurrent).most_common()
    name = ", ".join(f"{number} {primitive} on s_{predecessor}" for (primitive, predecessor), number in nodes)
    return fill(name, 28)
