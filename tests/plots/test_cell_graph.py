"""The picture of a cell shows the whole cell and nothing else, and its parts do not overlap."""

import json
import re
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
from helpers import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.patches import PathPatch

from genotypes import PRIMITIVES, Genotype, GenotypeError, named_cells, random_genotype, to_json
from plots.cell_graph import cell_figure, layout_cell
from plots.study_curves import study_figure
from plots.style import COLOURS, PictureError, plain_style, save
from visualize import main

# The 20 random cells have 2 to 20 nodes, and every third has only its even nodes in the output.
CELLS = {**named_cells(), "alone": Genotype((("relu", 0),), (1,))}
for seed in range(20):
    cell = random_genotype(seed, steps=seed + 1 if seed % 2 else 8)
    if seed % 3 == 2:
        cell = cell._replace(concat=cell.concat[1::2])
    CELLS[f"random {seed}"] = cell


def draw_cell(cell, path):
    with plain_style():
        save(cell_figure(cell), path, str(cell))


every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())


def expected_parts(cell: Genotype) -> tuple[set, set]:
    nodes = {"node-0", "node-input", "node-previous", "node-output"}
    edges = {"edge-input-0", "edge-previous-0", "edge-mean-output"}
    for i, (op, j) in enumerate(cell.recurrent, start=1):
        nodes.add(f"node-{i}")
        edges.add(f"edge-{j}-{i}-{op}")
    return nodes, edges | {f"edge-{i}-output" for i in cell.concat}


def render(cell: Genotype):
    """Returns the figure, its parts by gid, its texts, and a renderer that measures their extents."""
    figure = cell_figure(cell)
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = {artist.get_gid(): artist for artist in figure.axes[0].patches if artist.get_gid()}
    return figure, parts, figure.axes[0].texts, renderer


def overlap(a, b) -> bool:
    """Returns whether two boxes overlap by more than half a pixel."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


@every_cell
def test_layout_and_drawing_match_the_genotype(cell):
    nodes, edges = expected_parts(cell)
    layout = layout_cell(cell)
    assert {f"node-{name}" for name in layout.nodes} == nodes
    triples = [(edge.source, edge.target, edge.op) for edge in layout.edges]
    assert len(triples) == len(set(triples)) == len(edges) - 1  # The arrow out of the mean is not in the layout.
    assert {(j, i, op) for i, (op, j) in enumerate(cell.recurrent, start=1)} <= set(triples)
    assert {i for i, end, _ in triples if end == "output"} == set(cell.concat)
    arrivals = sorted(edge.end[1] for edge in layout.edges if edge.target == "output")
    assert all(below - above > 12 for above, below in pairwise(arrivals))  # The lines stay apart to their ends.

    _, parts, texts, _ = render(cell)
    labels = {f"label-{i}-{op}" for i, (op, _) in enumerate(cell.recurrent, start=1)}
    assert set(parts) == nodes | edges | labels | {"paper", "mean"}
    names = [f"$s_{{{i}}}$" for i in range(len(cell.recurrent) + 1)]
    ends = ["$x_t$", "$h_{t{-}1}$", "$h_t$", "mean"]
    assert sorted(t.get_text() for t in texts) == sorted([op for op, _ in cell.recurrent] + names + ends)


@every_cell
def test_nodes_are_ordered_by_depth_between_inputs_and_output(cell):
    x = {name: point[0] for name, point in layout_cell(cell).nodes.items()}
    assert x["input"] == x["previous"] < x[0]
    depth = {0: 0}
    for i, (_, j) in enumerate(cell.recurrent, start=1):
        depth[i] = depth[j] + 1
        assert x[j] < x[i] < x["output"]
    assert len({(depth[i], x[i]) for i in depth}) == len({x[i] for i in depth}) == max(depth.values()) + 1


@every_cell
def test_nodes_labels_and_texts_do_not_overlap(cell):
    figure, parts, texts, renderer = render(cell)
    solid = {gid: part for gid, part in parts.items() if gid.startswith(("node", "label"))}
    boxes = {gid: part.get_window_extent(renderer) for gid, part in [*solid.items(), ("mean", parts["mean"])]}
    for a, b in combinations(boxes, 2):
        assert not overlap(boxes[a], boxes[b]), (a, b)

    written = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    for (_, a), (_, b) in combinations(written, 2):
        assert not overlap(a, b)
    for word, extent in written:  # Each text has its own box, except the word over the last arrow.
        homes = [box for box in boxes.values() if overlap(box, extent)]
        if word == "mean":
            assert not homes
        else:
            (home,) = homes
            assert home.x0 < extent.x0 and extent.x1 < home.x1 and home.y0 < extent.y0 and extent.y1 < home.y1
    paper = figure.bbox.padded(-5)
    for box in [*boxes.values(), *(extent for _, extent in written)]:
        assert paper.containsx(box.x0) and paper.containsx(box.x1)
        assert paper.containsy(box.y0) and paper.containsy(box.y1)


@every_cell
def test_lines_cross_no_other_lines_nodes_or_labels(cell):
    _, parts, _, renderer = render(cell)
    lines = {}
    for gid, part in parts.items():
        if isinstance(part, PathPatch):
            line = part.get_transform().transform_path(part.get_path())
            (points,) = line.to_polygons(closed_only=False)
            lines[gid] = np.unique(points, axis=0)  # Lines run from left to right, so points are sorted by x.
    assert set(lines) == expected_parts(cell)[1]

    def height(gid, x):
        return np.interp(x, *lines[gid].T)

    for a, b in combinations(lines, 2):
        left, right = max(lines[a][0, 0], lines[b][0, 0]), min(lines[a][-1, 0], lines[b][-1, 0])
        if left < right:
            x = np.arange(left, right, 0.5)
            between = height(a, x) - height(b, x)
            assert not (between.min() < -0.5 and between.max() > 0.5), (a, b)

    for gid, part in parts.items():
        if gid.startswith(("node", "label")):
            box = part.get_window_extent(renderer)
            x = np.arange(box.x0 + 1, box.x1 - 1, 0.5)
            i = gid.split("-")[1]
            for name, line in lines.items():
                _, source, target, *_ = name.split("-")
                if target == i or (gid.startswith("node") and source == i):
                    continue  # These lines start or end at this part.
                under = x[(x >= line[0, 0]) & (x <= line[-1, 0])]
                y = height(name, under)
                assert not ((y > box.y0 - 1) & (y < box.y1 + 1)).any(), (gid, name)


def test_edges_have_the_unique_colour_of_their_primitive():
    assert set(COLOURS) == set(PRIMITIVES) and len(set(COLOURS.values())) == len(PRIMITIVES)
    _, parts, _, _ = render(CELLS["DARTS_V2"])
    for gid, part in parts.items():
        if re.fullmatch(r"edge-\d+-\d+-\w+|label-\d+-\w+", gid):
            op = gid.split("-")[-1]
            assert to_hex(part.get_edgecolor()) == COLOURS[op].lower()


def test_all_picture_formats_are_written_reproducibly(tmp_path):
    cell = CELLS["DARTS_V2"]
    starts = {".svg": b"<?xml", ".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".PNG": b"\x89PNG\r\n\x1a\n"}
    for ending, start in starts.items():
        one, two = tmp_path / f"one{ending}", tmp_path / f"two{ending}"
        draw_cell(cell, one)
        draw_cell(cell, str(two))
        assert one.read_bytes().startswith(start) and one.read_bytes() == two.read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    nodes, edges = expected_parts(cell)
    assert nodes | edges <= set(re.findall(r'<g id="([^"]+)"', svg))
    assert "<dc:date>" not in svg and str(tmp_path) not in svg


def test_background_is_white_with_transparent_corners(tmp_path):
    draw_cell(CELLS["ENAS"], tmp_path / "cell.png")
    pixels = imread(tmp_path / "cell.png")
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all()
    middle = pixels.shape[0] // 2
    assert (pixels[middle, 8] == 1).all() and (pixels[:, :, 3] == 1).mean() > 0.99
    assert 1_200 < pixels.shape[1] < 2_200  # The picture has twice the pixels of a README's width.


def test_cell_command_writes_the_file_it_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["cell", "random:3"]) == 0
    assert capsys.readouterr().out == "wrote cell.svg\n"
    first = (tmp_path / "cell.svg").read_bytes()
    assert b'id="edge-' in first

    run = tmp_path / "run"
    run.mkdir()
    (run / "genotype.json").write_text(json.dumps({"genotype": to_json(random_genotype(3)), "epoch": 1}))
    assert main(["cell", str(run), "--out", "again.svg"]) == 0
    assert (tmp_path / "again.svg").read_bytes() == first
    assert main(["cell", "DARTS", "--out", "cell.svg"]) == 0  # An existing picture is overwritten.
    assert (tmp_path / "cell.svg").read_bytes() != first


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["tree"],
        ["cell"],
        ["cell", "LSTM"],
        ["cell", "no/such.json"],
        ["cell", "Genotype([('none', 0)], [1])"],
        ["cell", "DARTS", "--out"],
        ["cell", "DARTS", "--out", "cell.txt"],
        ["cell", "DARTS", "--out", "cell"],
        ["cell", "DARTS", "--out", ".svg"],
        ["cell", "DARTS", "--out", "no/such/folder/cell.svg"],
        ["cell", "DARTS", "--out", "folder.svg"],
        ["cell", "DARTS", "and\nmore"],
    ],
)
def test_invalid_arguments_exit_2_with_a_one_line_error(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def test_invalid_cells_and_file_endings_are_rejected(tmp_path):
    for ending in ("py", "json", "svg.txt", ""):
        with pytest.raises(PictureError):
            draw_cell(CELLS["ENAS"], tmp_path / f"cell.{ending}")
    with pytest.raises(GenotypeError):
        draw_cell(Genotype((("relu", 1),), (1,)), tmp_path / "cell.svg")
    assert list(tmp_path.iterdir()) == []


def test_visualize_imports_neither_pyplot_nor_torch():
    code = "import sys, visualize, plots.html.report; print(sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def write_events(folder, *done):
    folder.mkdir()
    records = [{"trial": name, "event": "done", "valid_ppl": ppl} for name, ppl in done]
    (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_study_picture_has_every_cell_the_best_and_the_median(tmp_path):
    done = [("first-1/1", 9.0), ("random-1/1", 7.0), ("unrolled-1/1", 8.0), ("first-2/1", 3.0)]
    axes = study_figure(done).axes[0]
    curves = {line.get_label(): line for line in axes.lines}
    assert list(curves["best so far"].get_ydata()) == [9, 7, 7, 3]
    assert list(curves["median so far"].get_ydata()) == [9, 8, 8, 7.5]
    points = {name: [tuple(point) for point in curves[name].get_xydata()] for name in ("first", "unrolled", "random")}
    assert points == {"first": [(1, 9), (4, 3)], "unrolled": [(3, 8)], "random": [(2, 7)]}


def test_study_command_writes_a_reproducible_picture(tmp_path):
    write_events(tmp_path / "study", ("search/first/1", 99.0), ("select/first-1/1", 9.0), ("retrain/first-1/1", 2.0))
    out = tmp_path / "study.svg"
    assert main(["study", str(tmp_path / "study"), "--out", str(out)]) == 0
    once = out.read_bytes()
    assert main(["study", str(tmp_path / "study"), "--out", str(out)]) == 0
    assert out.read_bytes() == once
    assert b"<svg" in once


@pytest.mark.parametrize(("done", "out", "message"), [
    ([], "a.svg", "no short training of a study is done"),
    ([("select/first-1/1", 9.0)], "a.gif", "a picture's name ends in"),
    ([("select/first-1/1", 9.0)], "no/a.svg", "cannot write"),
])  # fmt: skip
def test_study_that_cannot_be_drawn_exits_2_with_the_reason(done, out, message, tmp_path, capsys):
    write_events(tmp_path / "study", *done)
    with pytest.raises(SystemExit) as end:
        main(["study", str(tmp_path / "study"), "--out", str(tmp_path / out)])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
