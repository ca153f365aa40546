"""Animates how a search forms its cell: every edge is an arc that fades with its probability.

The edges of the most likely cell are in full colour. The nodes are on a horizontal line and do not move. The arc from
node j to node i is i - j lanes high, so that no two labels overlap: their positions are points of a triangular grid.
"""

import os
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import patches
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.path import Path as Curve
from PIL import Image

from genotypes import PRIMITIVES, Genotype
from plots.cell_graph import add_box, add_text
from plots.run_history import History, edges, evenly
from plots.style import COLOURS, GREY, INK, PAPER, POINT, SMALL, SOFT, WIDTH, PictureError, whole

OPS = PRIMITIVES[1:]
MOST = 60  # An animation has at most this many frames.
PER_SECOND = 8
REST = 2  # The last frame remains for this many seconds.
LANE = 32  # A lane has this height in pixels.
RADIUS = 15
FAINT, FULL = 0.06, 0.45  # The least and the most likely edge outside the cell have these opacities.


def states(alphas: np.ndarray, cells: Sequence[Genotype]) -> list[dict[str, float]]:
    """Returns the opacity of each visible part by gid, for each of R records.

    An edge of the most likely cell has the opaque parts `arc-0-1-tanh` and `label-0-1-tanh`. Any other edge has the arc
    of its strongest primitive other than none, whose opacity grows with that primitive's probability.
    `alphas` has the probabilities (R, N(N+1)/2, K), and `cells` the most likely cell of each record.
    """
    strength = alphas[..., 1:].max(-1)  # (R, edges)
    low, high = strength.min(), strength.max()
    share = (strength - low) / (high - low) if high > low else np.zeros_like(strength)
    strongest = alphas[..., 1:].argmax(-1)
    opacity = FAINT + (FULL - FAINT) * share
    sequence = []
    for k, cell in enumerate(cells):
        state = {}
        for edge, (j, i) in enumerate(edges(len(cell.recurrent))):
            op, kept = cell.recurrent[i - 1]
            if j == kept:
                state[f"arc-{j}-{i}-{op}"] = state[f"label-{j}-{i}-{op}"] = 1.0
            else:
                state[f"arc-{j}-{i}-{OPS[strongest[k, edge]]}"] = float(opacity[k, edge])
        sequence.append(state)
    return sequence


def build(nodes: int, labels: Collection[str]) -> tuple[Figure, dict[str, list[Artist]]]:
    """Returns the figure with every arc, and the labels whose gids are in `labels`, and these parts by gid."""
    spacing, height = (WIDTH - 120) / nodes, LANE * nodes + 120
    figure = Figure(figsize=(WIDTH / 96, height / 96), dpi=96, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-60, WIDTH - 60), ylim=(-50, height - 50))
    axes.set_axis_off()
    parts: dict[str, list[Artist]] = {}
    for (j, i), op in product(edges(nodes), OPS):
        name, start, end, top = f"{j}-{i}-{op}", j * spacing, i * spacing, LANE * (i - j) + 14
        points = [(start, 0), (start, top * 4 / 3), (end, top * 4 / 3), (end, 0)]
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        look = {"edgecolor": COLOURS[op], "linewidth": 2.2 * POINT, "gid": f"arc-{name}"}
        parts[f"arc-{name}"] = [axes.add_patch(patches.PathPatch(curve, fill=False, **look))]
        if (gid := f"label-{name}") in labels:
            centre, wide = ((i + j) / 2 * spacing, top), len(op) * SMALL * 0.58 + 12
            look = {"facecolor": PAPER, "edgecolor": COLOURS[op], "linewidth": 1.5 * POINT, "gid": gid}
            box = add_box(axes, centre, wide, 18, 9, zorder=3, **look)
            parts[gid] = [box, add_text(axes, centre, op, SMALL, zorder=4, gid=f"{gid}-text")]
    for i in range(nodes + 1):
        outline = {"facecolor": PAPER, "edgecolor": INK, "linewidth": 1.5 * POINT}
        axes.add_patch(patches.Circle((i * spacing, 0), RADIUS, zorder=5, gid=f"node-{i}", **outline))
        add_text(axes, (i * spacing, 0), node_name(i), SMALL + 2, style="italic", zorder=6)
    note = {"ha": "center", "color": SOFT}
    axes.text(0, -34, "from xₜ and hₜ₋₁", **note)
    axes.text(nodes / 2 * spacing, -34, f"hₜ is the mean of {node_name(1)} to {node_name(nodes)}", **note)
    return figure, parts


def node_name(i: int) -> str:
    """Returns the name of node i with Unicode subscripts, because matplotlib would parse a formula for every frame."""
    return "s" + str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def frames(history: History) -> tuple[list[float], list[dict[str, float]]]:
    """Returns the times and the states of at most `MOST` frames. Raises `PictureError` if no alphas have a genotype."""
    x, alphas = history.probabilities
    cells = dict(history.genotypes)
    both = [k for k, when in enumerate(x) if when in cells and len(cells[when].recurrent) == history.nodes]
    if not both:
        raise PictureError(f"{history.folder}: no alphas of a search to animate; train_search.py writes them down")
    few = np.array(both)[evenly(len(both), MOST)]
    when = [x[k] for k in few]
    return when, states(alphas[few], [cells[x] for x in when])


def draw_formation(folder: str | Path, path: str | Path) -> None:
    """Writes the animation of the search in `folder` to `path`. Raises `PictureError` if there is nothing to animate,
    if the ending is not in `WRITERS` or if ffmpeg is missing, and `OSError` if the file cannot be written."""
    ending = Path(path).suffix.lower()
    if ending not in WRITERS:
        raise PictureError(f"an animation's name ends in {' or '.join(WRITERS)}, unlike {str(path)!r}")
    if ending == ".mp4" and shutil.which("ffmpeg") is None:
        raise PictureError(f"{path}: needs the program ffmpeg; install it, or take a name that ends in .gif")
    history = History(folder)
    x, states = frames(history)
    figure, parts = build(history.nodes, {gid for state in states for gid in state})
    axes, canvas = figure.axes[0], FigureCanvasAgg(figure)
    left, top = axes.get_xlim()[0], axes.get_ylim()[1]
    clock = axes.text(left + 20, top - 30, "", fontsize=(SMALL + 4) * POINT, weight="bold")
    [bar] = axes.plot([], [], color=GREY, linewidth=3 * POINT, solid_capstyle="butt")

    def images() -> Iterator[Image.Image]:
        for now, state in zip(x, states, strict=True):
            for gid, artists in parts.items():
                for artist in artists:
                    artist.set(visible=gid in state, alpha=state.get(gid, 0.0))
            clock.set_text(f"{now:.1f} epochs" if history.unit == "epochs" else f"{now:.0f} steps")
            bar.set_data([left, left + WIDTH * now / (x[-1] or 1)], [top - 2, top - 2])
            canvas.draw()
            yield Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    with whole(path) as temporary:
        WRITERS[ending](images(), temporary)


def write_gif(images: Iterable[Image.Image], path: Path) -> None:
    """Writes a GIF that repeats for ever and pauses on its last frame."""
    first, *others = map(in_palette, images)
    durations = [1000 // PER_SECOND] * len(others) + [1000 * REST]
    first.save(path, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


@cache
def palette() -> np.ndarray:
    """Returns the palette (168, 3), from 0 to 255: blends of each colour with the background. A palette chosen from a
    frame would lose colours that only a few pixels have."""
    paper = np.array(to_rgb(PAPER))
    inks = [np.array(to_rgb(colour)) for colour in (INK, SOFT, GREY, *(COLOURS[op] for op in OPS))]
    return 255 * np.array([ink + (paper - ink) * share for ink in inks for share in np.linspace(0, 1, 24)])


def in_palette(image: Image.Image) -> Image.Image:
    """Returns the image with each pixel in the nearest colour of the palette."""
    flat = np.asarray(image).reshape(-1, 3)
    packed = flat.astype(np.int32) @ (65536, 256, 1)
    colours, place = np.unique(packed, return_inverse=True)
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1)
    nearest = np.square(colours[:, None] - palette()).sum(-1).argmin(-1)
    indexed = Image.fromarray(nearest[place].reshape(image.size[::-1]).astype(np.uint8), "P")
    indexed.putpalette(palette().round().astype(np.uint8).tobytes())
    return indexed


def write_mp4(images: Iterable[Image.Image], path: Path) -> None:
    """Writes a video with ffmpeg that pauses on its last frame. Raises `PictureError` with its message if it fails."""
    frames = list(images)
    wide, high = (size // 2 * 2 for size in frames[0].size)  # The codec needs even sizes.
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{wide}x{high}",
               "-r", str(PER_SECOND), "-i", "-", "-pix_fmt", "yuv420p", os.path.abspath(path)]  # fmt: skip
    raw = [frame.crop((0, 0, wide, high)).tobytes() for frame in [*frames, *[frames[-1]] * (REST * PER_SECOND)]]
    done = subprocess.run(command, input=b"".join(raw), capture_output=True)
    if done.returncode:
        raise PictureError(f"ffmpeg failed ({done.stderr.decode(errors='replace').strip()[-200:]})")


WRITERS = {".gif": write_gif, ".mp4": write_mp4}
