"""Plots the short trainings of a study in the order in which they ended."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from experiment import metrics
from plots.run_history import LARGEST
from plots.style import BLUE, GREEN, GREY, INK, RED, SERIES, PictureError, new_figure

RANDOM = "random"
RANDOM_LOOK = (GREEN, "^")  # (colour, marker) of the random cells, beside that of each method that searches
LOOKS = ((BLUE, "o"), (RED, "s"), *zip(SERIES[3:], "DvP", strict=True), (INK, "X"))


def selected(folder: Path) -> list[tuple[str, float]]:
    """Returns (trial such as "first-1/1", validation perplexity) of each short training, in the order of their ends."""
    done = {}
    for event in metrics.events(folder):
        stage, _, cell = event["trial"].partition("/")
        if stage == "select" and event["event"] in ("done", "halved") and 0 < event["valid_ppl"] < LARGEST:
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
    of = [trial.partition("/")[0].rpartition("-")[0] for trial, _ in done]  # the method of each
    searches = [method for method in dict.fromkeys(of) if method != RANDOM]
    for i, method in enumerate([*searches, *[RANDOM] * (RANDOM in of)]):
        colour, mark = RANDOM_LOOK if method == RANDOM else LOOKS[i % len(LOOKS)]
        here = [(n, value) for n, name, value in zip(order, of, values, strict=True) if name == method]
        axes.plot(*zip(*here, strict=True), mark, color=colour, markersize=7, label=method)
    axes.set(xlabel="short trainings that ended", ylabel="validation perplexity, per word")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def selection_figure(folder: Path) -> Figure:
    """Returns a figure of the selection so far. Raises `PictureError` if no trial of it is done or halved."""
    if done := selected(folder):
        return study_figure(done)
    raise PictureError(f"no short training of a study is done in {str(folder)!r}; python trials.py select makes some")
