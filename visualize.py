"""Pictures of what a search found, and of what a study did.

    python visualize.py cell DARTS_V2 --out cell.svg
    python visualize.py study runs/study --out study.svg

The first draws one recurrent cell: inputs on the left, nodes in columns by depth, each edge with its activation, and
grey lines from the nodes that the output averages. The second draws the selection of a study (trials.py), running or
over: every cell's validation perplexity in the order in which trials ended, with the best and the median so far.
Either takes about two seconds on a CPU, and needs matplotlib.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple, NoReturn

from matplotlib import patches, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve

from genotypes import Genotype, GenotypeError, resolve, validate
from records import events

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
INK, GREY = "#222222", "#B0B0B0"
METHODS = {"first": ("#0072B2", "o"), "unrolled": ("#D55E00", "s"), "random": ("#009E73", "^")}  # colour, mark

# Lengths are CSS pixels, 96 to the inch: one unit is one pixel of a page that shows the picture unscaled.
RADIUS = 16  # of a node
ROW = 46  # height of a leaf's row
LANE = 18  # height of a row that holds nothing but a grey line
PILL = 22  # height of an activation's label
HEAD = 9  # length of an arrow's head
STUB = 3  # straight piece of an edge beside its label
BOX = (46, 32)  # of x_t, h_{t-1} and h_t
INPUT, OUTPUT = 82, 90  # from x_t to s_0, and from the mean to h_t
MARGIN = 16
FONT = 13
POINT = 0.75  # what matplotlib's font sizes and line widths are in

ENDS = {"input": "$x_t$", "previous": "$h_{t{-}1}$", "output": "$h_t$"}

Point = tuple[float, float]
Name = int | str  # 0..N for s_0..s_N, or one of ENDS


class PictureError(ValueError):
    """A picture that cannot be made; the message is one line for a person."""


class Edge(NamedTuple):
    """A line that bends from `start` to the height of `end` within `bend` pixels, then runs straight."""

    source: Name
    target: Name
    op: str | None  # None for an input and for a grey line
    start: Point
    bend: float
    end: Point


class Layout(NamedTuple):
    """Where everything is drawn; y grows downwards."""

    nodes: dict[Name, Point]  # centres
    edges: list[Edge]
    labels: dict[int, Point]  # centre of the label on the edge into a node
    mean: tuple[Point, Point]  # the bar that gathers the grey lines
    frame: tuple[float, float, float, float]  # left, top, right, bottom


def layout_cell(genotype: Genotype) -> Layout:
    """Place a cell so that no lines cross and none runs under a node or a label. Raises `GenotypeError`.

    Every node has one predecessor, so a cell is a tree with root s_0. Each subtree has a band of rows to
    itself: a row for each leaf, and a narrow one for the grey line of an inner node, among its children.
    """
    validate(genotype)
    ops, parents = zip(("", 0), *genotype.recurrent, strict=True)  # s_0 at index 0 has neither
    nodes = range(len(ops))
    children = [[child for child in nodes[1:] if parents[child] == i] for i in nodes]
    depth = [0]
    for i in nodes[1:]:
        depth.append(depth[parents[i]] + 1)

    def band(i: int) -> list[int]:
        """The nodes that own the rows of i's subtree, from the top; the largest child is in the middle."""
        if not children[i]:
            return [i]
        bands = [band(child) for child in children[i]]
        middle = len(bands) // 2
        largest = max(range(len(bands)), key=lambda b: (len(bands[b]), b == middle))
        bands.insert(middle, bands.pop(largest))
        if i in genotype.concat:  # with an only child: above it or below it, in turn
            bands.insert(middle or depth[i] % 2, [i])
        return list(chain.from_iterable(bands))

    row, y, bottom = {}, {}, 0.0
    for i in band(0):
        height = LANE if children[i] else ROW
        row[i] = bottom + height / 2
        bottom += height
    for i in reversed(nodes):  # a child's number is above its parent's
        y[i] = median(y[child] for child in children[i]) if children[i] else row[i]

    x, bends = [0.0], []
    for d in range(1, max(depth) + 1):
        column = [i for i in nodes if depth[i] == d]
        bends.append(min(16 + 0.25 * max(abs(y[i] - y[parents[i]]) for i in column), 50))
        widest = max(pill_width(ops[i]) for i in column)
        x.append(x[-1] + RADIUS + bends[-1] + STUB + widest + STUB + HEAD + RADIUS)
    bends.append(0)  # the last column holds leaves only: their grey lines are straight

    bar = x[-1] + RADIUS + 30
    low, high = (pick(row[i] for i in genotype.concat) for pick in (min, max))
    centres: dict[Name, Point] = {i: (x[depth[i]], y[i]) for i in nodes}
    centres["input"] = (-INPUT, y[0] - 30)
    centres["previous"] = (-INPUT, y[0] + 30)
    centres["output"] = (bar + OUTPUT, (low + high) / 2)

    edges, labels = [], {}
    for name in ("input", "previous"):
        start = (-INPUT + BOX[0] / 2, centres[name][1])
        edges.append(Edge(name, 0, None, start, -RADIUS - HEAD - start[0], (-RADIUS, y[0])))
    for i in nodes[1:]:
        j, start, end = parents[i], x[depth[i] - 1] + RADIUS, x[depth[i]] - RADIUS
        bend = bends[depth[i] - 1]
        edges.append(Edge(j, i, ops[i], (start, y[j]), bend, (end, y[i])))
        labels[i] = ((start + bend + end - HEAD) / 2, y[i])
    for i in genotype.concat:
        edges.append(Edge(i, "output", None, (x[depth[i]] + RADIUS, y[i]), bends[depth[i]], (bar, row[i])))

    heights = [height for _, height in centres.values()] + [low, high]
    across, down = BOX[0] / 2 + MARGIN, BOX[1] / 2 + MARGIN
    frame = (-INPUT - across, min(heights) - down, bar + OUTPUT + across, max(heights) + down)
    return Layout(centres, edges, labels, ((bar, low - 12), (bar, high + 12)), frame)


def pill_width(op: str) -> float:
    """Pixels, from the number of letters: the layout needs no renderer, and a test holds the text inside."""
    return len(op) * FONT * 0.58 + 16


def cell_figure(genotype: Genotype) -> Figure:
    """The drawing. A part's gid names it: `node-2`, `edge-1-2-relu`, `label-2-relu`, `edge-2-output`.

    Raises `GenotypeError`.
    """
    layout = layout_cell(genotype)
    left, top, right, bottom = layout.frame
    figure = Figure(figsize=((right - left) / 96, (bottom - top) / 96), dpi=96, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    # The page may be dark, so the picture brings its own paper.
    paper = ((left + right) / 2, (top + bottom) / 2)
    _box(axes, paper, right - left, bottom - top, 14, facecolor="white", gid="paper")

    (bar, low), (_, high) = layout.mean
    x, y = layout.nodes["output"]
    arrow = Edge("mean", "output", None, (bar, y), 0, (x - BOX[0] / 2, y))
    for edge in sorted([*layout.edges, arrow], key=lambda edge: edge.end[0] != bar):  # grey ones lie below
        if edge.end[0] == bar:
            _line(axes, edge, GREY, 1.2, 0)
        else:
            _line(axes, edge, COLOURS.get(edge.op, INK), 1.8, HEAD)
    _box(axes, (bar, (low + high) / 2), 7, high - low, 3.5, facecolor=GREY, gid="mean")
    _text(axes, (bar + (OUTPUT - BOX[0] / 2 - HEAD) / 2 + 2, y - 11), "mean", FONT - 1, "#666666")

    for i, point in layout.labels.items():
        op, _ = genotype.recurrent[i - 1]
        pill = {"facecolor": "white", "edgecolor": COLOURS[op], "linewidth": 1.5 * POINT}
        _box(axes, point, pill_width(op), PILL, PILL / 2, gid=f"label-{i}-{op}", **pill)
        _text(axes, point, op, FONT)
    outline = {"edgecolor": INK, "linewidth": 1.5 * POINT}
    for name, point in layout.nodes.items():
        if name in ENDS:
            _box(axes, point, *BOX, 7, facecolor="#EDF1F5", gid=f"node-{name}", **outline)
            _text(axes, point, ENDS[name], FONT + 4)
        else:
            axes.add_patch(patches.Circle(point, RADIUS, facecolor="white", gid=f"node-{name}", **outline))
            _text(axes, point, f"$s_{{{name}}}$", FONT + 3)
    for order, artist in enumerate(axes.get_children()):
        artist.set_zorder(order)  # later covers earlier, whatever its kind
    return figure


def draw_cell(genotype: Genotype, path: str | Path) -> None:
    """Write the picture in the format that the ending of `path` names; the same cell gives the same file.

    Raises `GenotypeError`, `PictureError` for another ending than those of `FORMATS`, and `OSError`.
    """
    with plain_style():
        save(cell_figure(genotype), path, str(genotype))


@contextmanager
def plain_style() -> Iterator[None]:
    """Not the reader's own matplotlibrc, which may ask for other fonts, or for TeX."""
    with style.context(["default", {"svg.hashsalt": "cell"}]):
        yield


def save(figure: Figure, path: str | Path, title: str) -> None:
    """Raises `PictureError` for another ending than those of `FORMATS`, and `OSError`."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise PictureError(f"a picture's name ends in {', '.join(FORMATS)}, unlike {str(path)!r}")
    figure.savefig(path, format=ending[1:], dpi=192, metadata={"Title": title, **FORMATS[ending]})


def study_figure(done: Sequence[tuple[str, float]]) -> Figure:
    """The short trainings of a study: (cell, validation perplexity), in the order in which they ended."""
    figure = Figure(figsize=(7.2, 3.6), dpi=96, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    values, order = [value for _, value in done], range(1, len(done) + 1)
    for name, of, look in (("best so far", min, "-"), ("median so far", median, "--")):
        curve = [of(values[:i]) for i in order]
        axes.step(order, curve, look, where="post", color=INK if of is min else GREY, linewidth=1.5, label=name)
    for method, (colour, mark) in METHODS.items():
        here = [(i, value) for i, (cell, value) in zip(order, done, strict=True) if cell.startswith(f"{method}-")]
        if here:
            axes.plot(*zip(*here, strict=True), mark, color=colour, markersize=7, label=method)
    axes.set_xlabel("short trainings that ended")
    axes.set_ylabel("validation perplexity")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_study(folder: str | Path, path: str | Path) -> None:
    """The picture of a study's selection so far. Raises `PictureError` if no trial of it is done; and as `save`."""
    done = {}
    for event in events(Path(folder)):
        stage, _, cell = event["trial"].partition("/")
        if stage == "select" and event["event"] == "done":
            done[cell] = event["valid_ppl"]
    if not done:
        raise PictureError(
            f"no short training of a study is done in {str(folder)!r}; python trials.py select makes some"
        )
    with plain_style():
        save(study_figure(list(done.items())), path, "selection")


def _line(axes: Axes, edge: Edge, colour: str, width: float, head: float) -> None:
    (x0, y0), (x1, y1), middle = edge.start, edge.end, edge.start[0] + edge.bend / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x0 + edge.bend, y1), (x1 - head, y1)]
    gid = "-".join(str(part) for part in ("edge", *edge[:3]) if part is not None)
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO])
    axes.add_patch(patches.PathPatch(curve, fill=False, edgecolor=colour, linewidth=width * POINT, gid=gid))
    if head:
        triangle = [(x1, y1), (x1 - head, y1 - head / 2), (x1 - head, y1 + head / 2)]
        axes.add_patch(patches.Polygon(triangle, facecolor=colour, linewidth=0))


def _box(axes: Axes, centre: Point, width: float, height: float, rounding: float, **look) -> None:
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    shape = patches.BoxStyle("Round", pad=0, rounding_size=rounding)
    axes.add_patch(patches.FancyBboxPatch(corner, width, height, shape, **{"linewidth": 0, **look}))


def _text(axes: Axes, centre: Point, text: str, size: float, colour: str = INK) -> None:
    look = {"color": colour, "ha": "center", "va": "center_baseline", "math_fontfamily": "stix"}
    axes.text(*centre, text, fontsize=size * POINT, **look)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    cell = commands.add_parser("cell", help="draw one recurrent cell")
    cell.add_argument(
        "arch",
        metavar="ARCH",
        help="a published cell's name, random:SEED, a search's run directory, a genotype.json, or its text",
    )
    cell.add_argument(
        "--out", metavar="FILE", default="cell.svg", help="ends in .svg, .png or .pdf; rewritten if it exists"
    )
    study = commands.add_parser("study", help="draw what the selection of a study found, trial by trial")
    study.add_argument("folder", metavar="STUDY", help="its directory")
    study.add_argument(
        "--out", metavar="FILE", default="study.svg", help="ends in .svg, .png or .pdf; rewritten if it exists"
    )
    args = parser.parse_args(argv)
    command = commands.choices[args.command]
    try:
        if args.command == "cell":
            draw_cell(resolve(args.arch), args.out)
        else:
            draw_study(args.folder, args.out)
    except (GenotypeError, PictureError) as error:
        command.error(str(error))
    except OSError as error:
        command.error(f"cannot write {args.out}: {error.strerror}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
