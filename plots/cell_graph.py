"""Draws one recurrent cell as a graph: inputs on the left, nodes in columns by depth, an activation on each edge, and
grey lines from the nodes that the output averages."""

from itertools import chain
from statistics import median
from typing import NamedTuple

from matplotlib import patches
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve

from genotypes import Genotype, validate
from plots.style import BOXES, COLOURS, GREY, INK, PAPER, POINT, SOFT

# Lengths are CSS pixels, 96 to the inch: one unit is one pixel of a page that shows the picture unscaled.
RADIUS = 16  # A node has this radius.
ROW = 46  # A leaf's row has this height.
LANE = 18  # A row that has only a grey line has this height.
PILL = 22  # An activation's label has this height.
HEAD = 9  # An arrow's head has this length.
STUB = 3  # An edge is straight for this length beside its label.
BOX = (46, 32)  # The boxes of x_t, h_{t-1} and h_t have this width and height.
INPUT, OUTPUT = 82, 90  # These are the distances from x_t to s_0, and from the mean to h_t.
MARGIN = 16
FONT = 13

ENDS = {"input": "$x_t$", "previous": "$h_{t{-}1}$", "output": "$h_t$"}

Point = tuple[float, float]
Name = int | str  # A name is 0..N for s_0..s_N, or a key of ENDS.


class Edge(NamedTuple):
    """An edge bends from `start` to the height of `end` within `bend` pixels, and then runs straight."""

    source: Name
    target: Name
    op: str | None  # This is None for an input and for a grey line.
    start: Point
    bend: float
    end: Point


class Layout(NamedTuple):
    """A layout holds the positions of all parts of the drawing in pixels, where y grows downwards."""

    nodes: dict[Name, Point]  # These are the centres of the nodes.
    edges: list[Edge]
    labels: dict[int, Point]  # These are the centres of the labels, by the node that the edge leads to.
    mean: tuple[Point, Point]  # These are the ends of the bar that gathers the grey lines.
    frame: tuple[float, float, float, float]  # This is (left, top, right, bottom).


def layout_cell(genotype: Genotype) -> Layout:
    """Returns positions for a cell such that no lines cross and none runs under a node or a label. Every node has one
    predecessor, so a cell is a tree with root s_0. Each subtree has a band of rows to itself: a row for each leaf, and
    a narrow row among its children for the grey line of an inner node. Raises `GenotypeError`."""
    validate(genotype)
    ops, parents = zip(("", 0), *genotype.recurrent, strict=True)  # s_0 at index 0 has neither, so it gets dummies.
    nodes = range(len(ops))
    children = [[child for child in nodes[1:] if parents[child] == i] for i in nodes]
    depth = [0]
    for i in nodes[1:]:
        depth.append(depth[parents[i]] + 1)

    def band(i: int) -> list[int]:
        """Returns the nodes that own the rows of i's subtree, from the top; the largest child is in the middle."""
        if not children[i]:
            return [i]
        bands = [band(child) for child in children[i]]
        middle = len(bands) // 2
        largest = max(range(len(bands)), key=lambda b: (len(bands[b]), b == middle))
        bands.insert(middle, bands.pop(largest))
        if i in genotype.concat:  # The grey line of a parent of one child is above or below it, by the parity of depth.
            bands.insert(middle or depth[i] % 2, [i])
        return list(chain.from_iterable(bands))

    row, y, bottom = {}, {}, 0.0
    for i in band(0):
        height = LANE if children[i] else ROW
        row[i] = bottom + height / 2
        bottom += height
    for i in reversed(nodes):  # Children come first, as they have higher numbers than their parents.
        y[i] = median(y[child] for child in children[i]) if children[i] else row[i]

    x, bends = [0.0], []
    for d in range(1, max(depth) + 1):
        column = [i for i in nodes if depth[i] == d]
        bends.append(min(16 + 0.25 * max(abs(y[i] - y[parents[i]]) for i in column), 50))
        widest = max(pill_width(ops[i]) for i in column)
        x.append(x[-1] + RADIUS + bends[-1] + STUB + widest + STUB + HEAD + RADIUS)
    bends.append(0)  # The last column has only leaves, whose grey lines are straight.

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
    """Returns the width of a label in pixels, estimated from its letters to need no renderer; a test measures it."""
    return len(op) * FONT * 0.58 + 16


def cell_figure(genotype: Genotype) -> Figure:
    """Draws a cell whose parts have gids such as `node-2`, `edge-1-2-relu`, `label-2-relu`. Raises `GenotypeError`."""
    layout = layout_cell(genotype)
    left, top, right, bottom = layout.frame
    figure = Figure(figsize=((right - left) / 96, (bottom - top) / 96), dpi=96, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    middle = ((left + right) / 2, (top + bottom) / 2)
    add_box(axes, middle, right - left, bottom - top, 14, facecolor=PAPER, gid="paper")  # The page may be dark.

    (bar, low), (_, high) = layout.mean
    x, y = layout.nodes["output"]
    arrow = Edge("mean", "output", None, (bar, y), 0, (x - BOX[0] / 2, y))
    for edge in sorted([*layout.edges, arrow], key=lambda edge: edge.end[0] != bar):  # Grey lines lie below.
        if edge.end[0] == bar:
            add_line(axes, edge, GREY, 1.2, 0)
        else:
            add_line(axes, edge, COLOURS.get(edge.op, INK), 1.8, HEAD)
    add_box(axes, (bar, (low + high) / 2), 7, high - low, 3.5, facecolor=GREY, gid="mean")
    add_text(axes, (bar + (OUTPUT - BOX[0] / 2 - HEAD) / 2 + 2, y - 11), "mean", FONT - 1, SOFT)

    for i, point in layout.labels.items():
        op, _ = genotype.recurrent[i - 1]
        pill = {"facecolor": PAPER, "edgecolor": COLOURS[op], "linewidth": 1.5 * POINT}
        add_box(axes, point, pill_width(op), PILL, PILL / 2, gid=f"label-{i}-{op}", **pill)
        add_text(axes, point, op, FONT)
    outline = {"edgecolor": INK, "linewidth": 1.5 * POINT}
    for name, point in layout.nodes.items():
        if name in ENDS:
            add_box(axes, point, *BOX, 7, facecolor=BOXES, gid=f"node-{name}", **outline)
            add_text(axes, point, ENDS[name], FONT + 4)
        else:
            axes.add_patch(patches.Circle(point, RADIUS, facecolor=PAPER, gid=f"node-{name}", **outline))
            add_text(axes, point, f"$s_{{{name}}}$", FONT + 3)
    for order, artist in enumerate(axes.get_children()):
        artist.set_zorder(order)  # Later artists cover earlier ones; by default, the kind decides.
    return figure


def cell_dot(genotype: Genotype) -> str:
    """Returns the graph of a cell in the DOT language of Graphviz. Raises `GenotypeError`."""
    validate(genotype)
    lines = [
        "digraph cell {",
        '  rankdir=LR; node [shape=circle, fontname="sans-serif"]; edge [fontname="sans-serif"];',
        '  input [label="x(t)", shape=box]; previous [label="h(t-1)", shape=box]; output [label="h(t)", shape=box];',
        "  input -> 0; previous -> 0;",
    ]
    lines += [f'  {i} [label="s{i}"];' for i in range(len(genotype.recurrent) + 1)]
    for i, (op, j) in enumerate(genotype.recurrent, start=1):
        lines.append(f'  {j} -> {i} [label="{op}", color="{COLOURS[op]}"];')
    lines += [f'  {i} -> output [color="{GREY}"];' for i in genotype.concat]
    return "\n".join([*lines, "}", ""])


def add_line(axes: Axes, edge: Edge, colour: str, width: float, head: float) -> None:
    (x0, y0), (x1, y1), middle = edge.start, edge.end, edge.start[0] + edge.bend / 2
    points = [(x0, y0), (middle, y0), (middle, y1), (x0 + edge.bend, y1), (x1 - head, y1)]
    gid = "-".join(str(part) for part in ("edge", *edge[:3]) if part is not None)
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO])
    axes.add_patch(patches.PathPatch(curve, fill=False, edgecolor=colour, linewidth=width * POINT, gid=gid))
    if head:
        triangle = [(x1, y1), (x1 - head, y1 - head / 2), (x1 - head, y1 + head / 2)]
        axes.add_patch(patches.Polygon(triangle, facecolor=colour, linewidth=0))


def add_box(axes: Axes, centre: Point, width: float, height: float, rounding: float, **look) -> Artist:
    """Adds a rectangle with round corners, without an outline unless `look` has a linewidth, and returns it."""
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    shape = patches.BoxStyle("Round", pad=0, rounding_size=rounding)
    return axes.add_patch(patches.FancyBboxPatch(corner, width, height, shape, **{"linewidth": 0, **look}))


def add_text(axes: Axes, centre: Point, text: str, size: float, color: str = INK, **look) -> Artist:
    """Adds a text of `size` pixels around a point and returns it."""
    look = {"ha": "center", "va": "center_baseline", "math_fontfamily": "stix", **look}
    return axes.text(*centre, text, fontsize=size * POINT, color=color, **look)
