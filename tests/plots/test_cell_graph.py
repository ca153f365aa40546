"""The picture of a cell shows that cell, all of it and nothing else, with nothing on top of anything else."""

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

from genotypes import PRIMITIVES, PUBLISHED, Genotype, GenotypeError, random_genotype, to_json
from plots.cell_graph import cell_figure, layout_cell
from plots.study_curves import study_figure
from plots.style import COLOURS, PictureError, plain_style, save
from visualize import main

# 20 random cells of 1 to 20 nodes, every third of them with only its even nodes in the output.
CELLS = {**PUBLISHED, "alone": Genotype((("relu", 0),), (1,))}
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


def drawn(cell: Genotype):
    """The figure's parts by gid, its texts, and the renderer's view of where they lie."""
    figure = cell_figure(cell)
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = {artist.get_gid(): artist for artist in figure.axes[0].patches if artist.get_gid()}
    return figure, parts, figure.axes[0].texts, renderer


def overlap(a, b) -> bool:
    """Whether two boxes share more than a hair's breadth, half a pixel."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


@every_cell
def test_layout_and_drawing_are_the_genotype(cell):
    nodes, edges = expected_parts(cell)
    layout = layout_cell(cell)
    assert {f"node-{name}" for name in layout.nodes} == nodes
    found = [(edge.source, edge.target, edge.op) for edge in layout.edges]
    assert len(found) == len(set(found)) == len(edges) - 1  # the arrow out of the mean is only drawn
    assert {(j, i, op) for i, (op, j) in enumerate(cell.recurrent, start=1)} <= set(found)
    assert {i for i, end, _ in found if end == "output"} == set(cell.concat)
    arrivals = sorted(edge.end[1] for edge in layout.edges if edge.target == "output")
    assert all(below - above > 12 for above, below in pairwise(arrivals))  # lines apart to the last

    _, parts, texts, _ = drawn(cell)
    labels = {f"label-{i}-{op}" for i, (op, _) in enumerate(cell.recurrent, start=1)}
    assert set(parts) == nodes | edges | labels | {"paper", "mean"}
    names = [f"$s_{{{i}}}$" for i in range(len(cell.recurrent) + 1)]
    ends = ["$x_t$", "$h_{t{-}1}$", "$h_t$", "mean"]
    assert sorted(t.get_text() for t in texts) == sorted([op for op, _ in cell.recurrent] + names + ends)


@every_cell
def test_inputs_left_nodes_by_depth_output_right(cell):
    x = {name: point[0] for name, point in layout_cell(cell).nodes.items()}
    assert x["input"] == x["previous"] < x[0]
    depth = {0: 0}
    for i, (_, j) in enumerate(cell.recurrent, start=1):
        depth[i] = depth[j] + 1
        assert x[j] < x[i] < x["output"]
    assert len({(depth[i], x[i]) for i in depth}) == len({x[i] for i in depth}) == max(depth.values()) + 1


@every_cell
def test_nothing_lies_on_anything(cell):
    figure, parts, texts, renderer = drawn(cell)
    solid = {gid: part for gid, part in parts.items() if gid.startswith(("node", "label"))}
    boxes = {gid: part.get_window_extent(renderer) for gid, part in [*solid.items(), ("mean", parts["mean"])]}
    for a, b in combinations(boxes, 2):
        assert not overlap(boxes[a], boxes[b]), (a, b)

    written = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    for (_, a), (_, b) in combinations(written, 2):
        assert not overlap(a, b)
    for word, extent in written:  # each in a box of its own, but for the word over the last arrow
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
def test_lines_neither_cross_nor_run_under_things(cell):
    _, parts, _, renderer = drawn(cell)
    lines = {}
    for gid, part in parts.items():
        if isinstance(part, PathPatch):
            line = part.get_transform().transform_path(part.get_path())
            (points,) = line.to_polygons(closed_only=False)
            lines[gid] = np.unique(points, axis=0)  # sorted by x: lines run left to right
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
                    continue  # its own lines reach it
                under = x[(x >= line[0, 0]) & (x <= line[-1, 0])]
                y = height(name, under)
                assert not ((y > box.y0 - 1) & (y < box.y1 + 1)).any(), (gid, name)


def test_each_primitive_has_a_colour_and_edges_wear_it():
    assert set(COLOURS) == set(PRIMITIVES) and len(set(COLOURS.values())) == len(PRIMITIVES)
    _, parts, _, _ = drawn(CELLS["DARTS_V2"])
    for gid, part in parts.items():
        if re.fullmatch(r"edge-\d+-\d+-\w+|label-\d+-\w+", gid):
            op = gid.split("-")[-1]
            assert to_hex(part.get_edgecolor()) == COLOURS[op].lower()


def test_all_formats_are_written_and_repeat(tmp_path):
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


def test_the_paper_is_white_and_its_corners_are_not_there(tmp_path):
    draw_cell(CELLS["ENAS"], tmp_path / "cell.png")
    pixels = imread(tmp_path / "cell.png")
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all()
    middle = pixels.shape[0] // 2
    assert (pixels[middle, 8] == 1).all() and (pixels[:, :, 3] == 1).mean() > 0.99
    assert 1_200 < pixels.shape[1] < 2_200  # twice the pixels of a README's width


def test_command_writes_what_it_says(tmp_path, monkeypatch, capsys):
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
    assert main(["cell", "DARTS", "--out", "cell.svg"]) == 0  # a picture may be rewritten
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
def test_mistakes_are_one_line_and_exit_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def test_only_pictures_of_valid_cells_are_written(tmp_path):
    for ending in ("py", "json", "svg.txt", ""):
        with pytest.raises(PictureError):
            draw_cell(CELLS["ENAS"], tmp_path / f"cell.{ending}")
    with pytest.raises(GenotypeError):
        draw_cell(Genotype((("relu", 1),), (1,)), tmp_path / "cell.svg")
    assert list(tmp_path.iterdir()) == []


def test_neither_a_window_system_nor_torch_is_loaded():
    code = "import sys, visualize, plots.html.report; print(sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def write_events(folder, *done):
    folder.mkdir()
    rows = [{"trial": name, "event": "done", "valid_ppl": ppl} for name, ppl in done]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_study_s_picture_has_every_cell_the_best_and_the_median(tmp_path):
    done = [("first-1/1", 9.0), ("random-1/1", 7.0), ("unrolled-1/1", 8.0), ("first-2/1", 3.0)]
    axes = study_figure(done).axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["best so far"].get_ydata()) == [9, 7, 7, 3]
    assert list(drawn["median so far"].get_ydata()) == [9, 8, 8, 7.5]
    points = {name: [tuple(point) for point in drawn[name].get_xydata()] for name in ("first", "unrolled", "random")}
    assert points == {"first": [(1, 9), (4, 3)], "unrolled": [(3, 8)], "random": [(2, 7)]}


def test_a_study_s_picture_tells_of_its_selection_alone(tmp_path):
    write_events(tmp_path / "study", ("search/first/1", 99.0), ("select/first-1/1", 9.0), ("retrain/first-1/1", 2.0))
    out = tmp_path / "study.svg"
    assert main(["study", str(tmp_path / "study"), "--out", str(out)]) == 0
    once = out.read_bytes()
    assert main(["study", str(tmp_path / "study"), "--out", str(out)]) == 0
    assert out.read_bytes() == once
    assert b"<svg" in once


@pytest.mark.parametrize(("done", "out", "said"), [
    ([], "a.svg", "no short training of a study is done"),
    ([("select/first-1/1", 9.0)], "a.gif", "a picture's name ends in"),
    ([("select/first-1/1", 9.0)], "no/a.svg", "cannot write"),
])  # fmt: skip
def test_a_study_that_cannot_be_drawn_is_refused_in_a_line(done, out, said, tmp_path, capsys):
    write_events(tmp_path / "study", *done)
    with pytest.raises(SystemExit) as end:
        main(["study", str(tmp_path / "study"), "--out", str(tmp_path / out)])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
