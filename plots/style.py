"""What all pictures share: colours, sizes, axes, and how they are written."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Endings, each with the metadata that would make every file different.
FORMATS = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}

# Okabe & Ito's palette, which stays apart under the common colour blindnesses.
COLOURS = {
    "none": "#999999",
    "tanh": "#0072B2",
    "relu": "#D55E00",
    "sigmoid": "#009E73",
    "identity": "#CC79A7",
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of what is no primitive
# What a page in the dark has others for (report.html).
INK, SOFT, GREY, PAPER, BOXES = "#222222", "#666666", "#B0B0B0", "#FFFFFF", "#EDF1F5"
ON_COLOUR = "#FDFDFD"  # of what is written on a colour, in the dark too

POINT = 0.75  # a pixel of a page that shows a picture unscaled, in what matplotlib measures fonts and lines in
WIDTH = 840  # of a picture, in such pixels: a README's
SMALL = 11  # pixels of a font


class PictureError(ValueError):
    """A picture that cannot be made; the message is one line for a person."""


@contextmanager
def plain_style() -> Iterator[None]:
    """Not the reader's own matplotlibrc, which may ask for other fonts, or for TeX."""
    look = {
        "svg.hashsalt": "cell", "font.size": SMALL * POINT, "axes.titlesize": (SMALL + 1) * POINT,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.titlecolor": INK, "axes.edgecolor": GREY,
        "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
        "axes.linewidth": POINT, "lines.linewidth": 1.6 * POINT, "legend.frameon": False, "axes.facecolor": "none",
    }  # fmt: skip
    with style.context(["default", look]):
        yield


def new_figure(height: float) -> Figure:
    """So many pixels high."""
    return Figure(figsize=(WIDTH / 96, height / 96), dpi=96, facecolor=PAPER, layout="constrained")


def save(figure: Figure, path: str | Path, title: str) -> None:
    """In the format that the ending of `path` names; the same figure gives the same file. Raises `PictureError` for
    another ending than those of `FORMATS`, and `OSError`."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise PictureError(f"a picture's name ends in {', '.join(FORMATS)}, unlike {str(path)!r}")
    figure.savefig(path, format=ending[1:], dpi=192, metadata={"Title": title, **FORMATS[ending]})


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Another name beside `path` inside; in the end, if all went well, its file takes the place of that at `path`."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def svg(figure: Figure) -> str:
    """The picture as an element of a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def plot(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, colour: str, look: str = "-", **more) -> None:
    """A curve; a mark on its last point, so that one which has only begun is seen as well."""
    marks = {"linestyle": look, "marker": "o", "markersize": 3.5, "markevery": [-1]} | more
    axes.plot(x, y, color=colour, label=label, gid=f"curve-{label}", **marks)


def log_scale(axes: Axes) -> None:
    """Upwards, with numbers as one says them."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 4 * low else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(axes: Axes) -> None:
    """Of the curves that have names, small enough to lie in a panel."""
    axes.legend(fontsize=(SMALL - 1) * POINT, handlelength=1.4, borderaxespad=0.3, labelspacing=0.3)


def key(figure: Figure | SubFigure, names: Sequence[str], **more) -> None:
    """A legend of primitives' colours, on one line."""
    patches = [Patch(facecolor=COLOURS[name], label=name) for name in names]
    figure.legend(handles=patches, ncols=len(names), handlelength=1, handleheight=0.9, columnspacing=1.4, **more)
