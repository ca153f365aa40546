"""Defines the colours, sizes, axes and file formats that all pictures share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# The metadata of each format is unset, because a date would make every file different.
FORMATS = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}

# The palette of Okabe & Ito remains distinguishable with the common colour blindnesses.
COLOURS = {"none": "#999999", "tanh": "#0072B2", "relu": "#D55E00", "sigmoid": "#009E73", "identity": "#CC79A7"}
# Curves that do not stand for a primitive have these colours.
BLUE, RED, GREEN, *_ = SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# A page in dark mode replaces these colours (report.html).
INK, SOFT, GREY, PAPER, BOXES = "#222222", "#666666", "#B0B0B0", "#FFFFFF", "#EDF1F5"
ON_COLOUR = "#FDFDFD"  # Text on a coloured area has this colour in dark mode too.

POINT = 0.75  # One pixel of an unscaled picture is this many points, the unit of fonts and lines in matplotlib.
WIDTH = 840  # The width of a picture, in such pixels, fits a README.
SMALL = 11  # The small font has this size in pixels.


class PictureError(ValueError):
    """Raised when a picture cannot be made; the message is one line for the user."""


def plain_style() -> AbstractContextManager[None]:
    """Returns a context that applies matplotlib's default style with this module's settings. The user's own
    matplotlibrc is ignored, because it may ask for other fonts or for TeX."""
    look = {
        "svg.hashsalt": "cell", "font.size": SMALL * POINT, "axes.titlesize": (SMALL + 1) * POINT,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.titlecolor": INK, "axes.edgecolor": GREY,
        "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
        "axes.linewidth": POINT, "lines.linewidth": 1.6 * POINT, "legend.frameon": False, "axes.facecolor": "none",
    }  # fmt: skip
    return style.context(["default", look])


def without_math(figure: Figure) -> Figure:
    """Returns the figure, whose texts matplotlib then shows as they are: a name from a file may contain a $."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def new_figure(height: float) -> Figure:
    """Returns an empty figure that is `WIDTH` pixels wide and `height` pixels high."""
    return Figure(figsize=(WIDTH / 96, height / 96), dpi=96, facecolor=PAPER, layout="constrained")


def save(figure: Figure, path: str | Path, title: str) -> None:
    """Writes a figure in the format that the ending of `path` names; equal figures give identical files. Raises
    `PictureError` for an ending that is not in `FORMATS`, and `OSError`."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise PictureError(f"a picture's name ends in {', '.join(FORMATS)}, unlike {str(path)!r}")
    with whole(path) as file:
        figure.savefig(file, format=ending[1:], dpi=192, metadata={"Title": title, **FORMATS[ending]})


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames that file to `path` at the end unless an error was raised."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plot(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, colour: str, look: str = "-", **more) -> None:
    """Draws a curve with a marker on its last point, so that a curve of a single point is visible."""
    marks = {"linestyle": look, "marker": "o", "markersize": 3.5, "markevery": [-1]} | more
    axes.plot(x, y, color=colour, label=label, gid=f"curve-{label}", **marks)


def log_scale(axes: Axes) -> None:
    """Makes the y axis logarithmic, with plain decimal numbers at its ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 4 * low else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(axes: Axes) -> None:
    """Adds a legend of the labelled curves that is small enough for a panel."""
    axes.legend(fontsize=(SMALL - 1) * POINT, handlelength=1.4, borderaxespad=0.3, labelspacing=0.3)


def color_legend(figure: Figure | SubFigure, names: Sequence[str], **more) -> None:
    """Adds a legend of the primitives' colours on one line."""
    patches = [Patch(facecolor=COLOURS[name], label=name) for name in names]
    figure.legend(handles=patches, ncols=len(names), handlelength=1, handleheight=0.9, columnspacing=1.4, **more)
