"""The pictures of runs show all that was recorded: curves end where the metrics end, colours are those of the
primitives, and an incomplete run shows what can be drawn."""

import errno
import itertools
import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, search_records, train_records, write_records
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from genotypes import PRIMITIVES, from_json
from plots import animation, search_curves
from plots.cell_graph import cell_dot
from plots.run_history import History, edges
from plots.style import COLOURS, PictureError, plain_style
from plots.train_curves import ANCHORS, train_figure
from visualize import main

EPOCHS = 12


@pytest.fixture(scope="module")
def records():
    return search_records(EPOCHS)


@pytest.fixture(scope="module")
def run(records, tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("runs") / "search", records)


@pytest.fixture(scope="module")
def pictures(run):
    with plain_style():
        return search_curves.figures(History(run))


def last(records, kind, name):
    return next(record[name] for record in reversed(records) if record["kind"] == kind and name in record)


def curves(figure):
    """Returns the curves of a figure by the title of their panel and their name."""
    lines = {}
    for axes in figure.axes:
        for line in axes.lines:
            if line.get_gid() and line.get_gid().startswith("curve-"):
                lines[axes.get_title(loc="left"), line.get_label()] = line
    return lines


def test_curves_end_with_the_last_recorded_values(records, pictures):
    lines = curves(pictures["curves"]) | curves(pictures["signal"])
    final = np.array(last(records, "epoch", "probabilities"))
    expected = {
        ("Perplexity", "training"): last(records, "interval", "ppl"),
        ("Perplexity", "validation"): last(records, "epoch", "valid_ppl"),
        ("Entropy of the alphas", "mean of edges"): -(final * np.log(final)).sum(1).mean(),
        ("Gradient of the weights", "gradient norm"): last(records, "interval", "norm"),
        ("Learning rate", "learning rate"): last(records, "interval", "rate"),
        ("Implicit to direct part", "norm ratio"): last(records, "diagnosis", "norm_ratio"),
        ("What becomes of a small change", "sensitivity"): last(records, "diagnosis", "sensitivity"),
        ("Finite to exact product", "product cosine"): last(records, "diagnosis", "product_cosine"),
        ("Largest eigenvalue", "eigenvalue"): last(records, "diagnosis", "eigenvalue"),
    }
    for name, p in zip(PRIMITIVES, final.mean(0), strict=True):
        expected["Mean probability", name] = p
    for name in ("whole", "direct", "implicit"):
        expected["Independent batches agree", name] = last(records, "diagnosis", f"cosine_{name}")
    for name in ("relaxed", "discrete"):
        expected["What discretising costs", name] = last(records, "diagnosis", f"{name}_loss")
    assert lines.keys() == expected.keys()
    for name, value in expected.items():
        assert lines[name].get_ydata()[-1] == pytest.approx(value), name
        assert lines[name].get_xdata()[-1] <= EPOCHS + 1e-9
    assert lines["Perplexity", "validation"].get_xdata().tolist() == list(range(1, EPOCHS + 1))
    rates = [record["rate"] for record in records if record["kind"] == "interval"]
    assert lines["Learning rate", "learning rate"].get_ydata().tolist() == rates


def test_axes_have_units_and_curves_have_the_colours_of_primitives(pictures):
    for name in ("curves", "signal"):
        panels = [axes for axes in pictures[name].axes if axes.axison]
        assert all(
            axes.get_xlabel() == "epochs" and axes.get_ylabel() and axes.get_title(loc="left") for axes in panels
        )
    units = {axes.get_title(loc="left"): axes.get_ylabel() for axes in pictures["curves"].axes}
    assert units["Perplexity"] == "per word" and units["Entropy of the alphas"] == "nats"
    for (title, name), line in curves(pictures["curves"]).items():
        if title == "Mean probability":
            assert to_hex(line.get_color()) == COLOURS[name].lower()
    assert pictures["genotype"].axes[0].get_xlabel() == "epochs" and pictures["genotype"].axes[0].get_ylabel() == "node"


def test_primitive_shares_end_with_the_last_genotype(records, pictures):
    axes = next(axes for axes in pictures["curves"].axes if axes.get_title(loc="left") == "Primitives in the genotype")
    ops = [op for op, _ in last(records, "epoch", "genotype")["recurrent"]]
    for area in axes.collections:
        heights = [y for x, y in area.get_paths()[0].vertices if x == pytest.approx(EPOCHS)]
        assert max(heights) - min(heights) == ops.count(area.get_label())


def test_each_edge_has_a_panel_and_edges_of_the_genotype_have_frames(records, pictures):
    final, cell = last(records, "epoch", "probabilities"), last(records, "epoch", "genotype")
    panels = {axes.get_gid(): axes for axes in pictures["edges"].axes}
    assert list(panels) == [f"edge-{j}-{i}" for j, i in edges(8)] and len(panels) == 36
    for edge, axes in enumerate(panels.values()):
        for name, line in zip(PRIMITIVES, (line for line in axes.lines if line.get_gid()), strict=True):
            assert (line.get_label(), to_hex(line.get_color())) == (name, COLOURS[name].lower())
            assert line.get_ydata()[-1] == final[edge][PRIMITIVES.index(name)]
    chosen = {f"edge-{j}-{i}": op for i, (op, j) in enumerate(cell["recurrent"], start=1)}
    framed = {gid: to_hex(axes.spines["top"].get_edgecolor()) for gid, axes in panels.items()
              if axes.spines["top"].get_linewidth() > 1}  # fmt: skip
    assert framed == {gid: COLOURS[op].lower() for gid, op in chosen.items()}


def test_genotype_strip_has_a_bar_per_stretch_and_a_line_per_change(records, pictures):
    cells = [record["genotype"]["recurrent"] for record in records if record["kind"] == "epoch"]
    axes = pictures["genotype"].axes[0]
    bars = {}
    for bar in axes.patches:
        bars.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar)
    changes = 0
    for node in range(1, 9):
        covered = 0.0
        for bar in sorted(bars[node], key=lambda bar: bar.get_x()):
            assert bar.get_x() == pytest.approx(covered)
            covered += bar.get_width()
            _, _, op, predecessor = bar.get_gid().split("-")
            for epoch in range(round(bar.get_x()), round(covered)):
                assert cells[epoch][node - 1] == [op, int(predecessor)]
            assert to_hex(bar.get_facecolor()) == COLOURS[op].lower()
        assert covered == pytest.approx(EPOCHS)
        changes += sum(a[node - 1] != b[node - 1] for a, b in itertools.pairwise(cells))
    assert changes > 8
    assert sum(line.get_gid() == "change" for line in axes.lines) == changes == len(axes.patches) - 8


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_stretches_tile_the_time_and_neighbours_differ(seeds):
    cells = [(float(k), from_json(search_records(1, 0, nodes=3, seed=seed)[0]["genotype"]))
            for k, seed in enumerate(seeds, start=1)]  # fmt: skip
    for node in (1, 2, 3):
        stretches = [s for s in search_curves.stretches(cells) if s.node == node]
        assert (stretches[0].start, stretches[-1].stop) == (0.0, cells[-1][0])
        for a, b in itertools.pairwise(stretches):
            assert a.stop == b.start and (a.op, a.predecessor) != (b.op, b.predecessor)
        for x, cell in cells:
            [stretch] = [s for s in stretches if s.start < x <= s.stop]
            assert (stretch.op, stretch.predecessor) == cell.recurrent[node - 1]


# --- Formation ---


def test_each_formation_frame_shows_the_most_likely_cell(records, run):
    when, states = animation.frames(History(run))
    with_probabilities = [record for record in records if "probabilities" in record]
    assert len(states) == len(when) == len(with_probabilities) and when[-1] == EPOCHS
    for record, state in zip(with_probabilities, states, strict=True):
        labels = {gid.removeprefix("label-") for gid in state if gid.startswith("label-")}
        cell = {f"{j}-{i}-{op}" for i, (op, j) in enumerate(record["genotype"]["recurrent"], start=1)}
        assert (
            labels == cell == {gid.removeprefix("arc-") for gid, seen in state.items() if gid[0] == "a" and seen == 1}
        )
        arcs = [gid.split("-")[1:] for gid in state if gid.startswith("arc-")]
        assert [(int(j), int(i)) for j, i, _ in arcs] == list(edges(8))
        for edge, (_, _, op) in enumerate(arcs):
            assert op == max(PRIMITIVES[1:], key=lambda name: record["probabilities"][edge][PRIMITIVES.index(name)])


def test_formation_shows_the_recorded_genotype_where_probabilities_tie(tmp_path):
    [record] = search_records(1, 0, nodes=2, diagnosed=False)
    tie = [[0.2, 0.2, 0.2, 0.2, 0.2]] * 3
    cell = {"recurrent": [["sigmoid", 0], ["identity", 1]], "concat": [1, 2]}
    _, [state] = animation.frames(
        History(write_records(tmp_path, [{**record, "probabilities": tie, "genotype": cell}]))
    )
    assert {gid for gid in state if gid.startswith("label-")} == {"label-0-1-sigmoid", "label-1-2-identity"}
    assert [gid for gid, seen in state.items() if gid.startswith("arc-") and seen == 1] == [
        "arc-0-1-sigmoid", "arc-1-2-identity"]  # fmt: skip


def test_edge_opacity_increases_with_probability(records, run):
    _, states = animation.frames(History(run))
    seen = []
    for record, state in zip([record for record in records if "probabilities" in record], states, strict=True):
        arcs = [opacity for gid, opacity in state.items() if gid.startswith("arc-")]
        seen += [(max(p[1:]), opacity) for p, opacity in zip(record["probabilities"], arcs, strict=True) if opacity < 1]
    seen.sort()
    assert all(a[1] <= b[1] + 1e-9 for a, b in itertools.pairwise(seen))
    assert animation.FAINT <= seen[0][1] < seen[-1][1] <= animation.FULL


def test_formation_nodes_and_labels_do_not_overlap():
    every = [f"label-{j}-{i}-{op}" for j, i in edges(8) for op in animation.OPS]
    with plain_style():
        figure, parts = animation.build(8, every)
    figure.canvas.draw()
    boxes = {}
    for gid in every:
        j, i = gid.split("-")[1:3]
        boxes.setdefault((j, i), []).append(parts[gid][0].get_window_extent())
    places = [max(variants, key=lambda box: box.width) for variants in boxes.values()]
    places += [patch.get_window_extent() for patch in figure.axes[0].patches if patch.get_gid().startswith("node-")]
    assert len(places) == 36 + 9
    for n, a in enumerate(places):
        for b in places[:n]:
            assert not a.overlaps(b)


def test_gif_has_a_frame_per_record_and_the_colours_of_primitives(run, tmp_path):
    out = tmp_path / "f.gif"
    assert main(["formation", str(run), "--out", str(out)]) == 0
    with Image.open(out) as gif:
        assert gif.n_frames == 3 * EPOCHS
        gif.seek(gif.n_frames - 1)
        assert gif.info["duration"] == 2000
        pixels = np.array(gif.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert colours[counts.argmax()].tolist() == [255, 255, 255]  # The background is white.
    shown = {op for op, _ in last(search_records(EPOCHS), "epoch", "genotype")["recurrent"]}
    for op in shown:
        ink = (255 * np.array(to_rgb(COLOURS[op]))).round()
        assert (np.abs(pixels - ink).max(1) <= 6).sum() > 50, op


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg on this machine")
def test_mp4_has_a_frame_per_record_and_a_final_pause(run, tmp_path):
    out = tmp_path / "f.mp4"
    assert main(["formation", str(run), "--out", str(out)]) == 0
    probe = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"]
    count = subprocess.run([*probe, out], capture_output=True, text=True, check=True).stdout
    assert int(count) == 3 * EPOCHS + animation.REST * animation.PER_SECOND


def test_missing_matplotlib_exits_2_with_an_install_hint():
    code = "import sys; sys.modules['matplotlib'] = None; sys.argv[1:] = ['cell', 'DARTS']; import runpy; "
    code += "runpy.run_path('visualize.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "visualize.py: needs matplotlib; pip install -r requirements-plots.txt\n"


@pytest.mark.parametrize("ending", ["svg", "dot"])
def test_failed_write_leaves_the_earlier_picture(ending, tmp_path, monkeypatch):
    out = tmp_path / f"cell.{ending}"
    out.write_text("earlier")

    def fail(path, *_, **__):
        path.open("w").write("half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **more: fail(path))
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(SystemExit) as end:
        main(["cell", "DARTS", "--out", str(out)])
    assert end.value.code == 2 and out.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [out]


def test_missing_ffmpeg_exits_2_with_the_reason(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(animation.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(["formation", str(run), "--out", str(tmp_path / "f.mp4")])
    assert end.value.code == 2 and "needs the program ffmpeg" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- Retraining ---


def test_train_figure_has_every_run_its_switch_and_the_anchors(tmp_path):
    runs = {"one": train_records(40, averaged=25), "two": train_records(30, last=90), "three": train_records(5)}
    for name, records in runs.items():
        write_records(tmp_path / name, records)
        (tmp_path / name / "config.json").write_text(json.dumps({"flags": {"data": "penn", "limit_tokens": 0}}))
    histories = [History(tmp_path / name) for name in runs]
    with plain_style():
        [axes] = train_figure(histories).axes
    lines = {line.get_label().split(":")[0]: line for line in axes.lines if "curve" in str(line.get_gid())}
    assert lines.keys() == runs.keys()
    for name, records in runs.items():
        assert lines[name].get_ydata().tolist() == [record["valid_ppl"] for record in records]
        assert lines[name].get_xdata().tolist() == [record["epoch"] for record in records]
        assert lines[name].get_label() == f"{name}: {min(record['valid_ppl'] for record in records):.2f}"
    assert axes.get_xlabel() == "epochs" and axes.get_ylabel() == "validation perplexity, per word"
    [switch] = [line for line in axes.lines if str(line.get_gid()).startswith("switch-")]
    assert switch.get_gid() == "switch-one"
    assert switch.get_xydata().tolist() == [[25, runs["one"][24]["valid_ppl"]]]
    anchors = {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("anchor-")}
    assert {gid: line.get_ydata()[0] for gid, line in anchors.items()} == {f"anchor-{e}": v for e, v in ANCHORS.items()}
    # The anchors are the values of Li & Talwalkar 2019.
    assert ANCHORS == {300: 64.0, 500: 61.9, 1600: 59.5, 2600: 58.5, 3600: 58.2}


@pytest.mark.parametrize("flags", [{"data": "builtin", "limit_tokens": 0}, {"data": "penn", "limit_tokens": 9}, None])
def test_anchors_are_drawn_only_for_the_full_penn_treebank(flags, tmp_path):
    write_records(tmp_path / "run", train_records(3))
    if flags is not None:
        (tmp_path / "run" / "config.json").write_text(json.dumps({"flags": flags}))
    with plain_style():
        [axes] = train_figure([History(tmp_path / "run")]).axes
    assert not any("anchor" in str(line.get_gid()) for line in axes.lines)


def test_switch_without_later_validation_has_no_mark(tmp_path):
    records = train_records(6, averaged=4)
    write_records(
        tmp_path, [*records[:3], *({k: v for k, v in record.items() if k != "valid_ppl"} for record in records[3:])]
    )
    with plain_style():
        [axes] = train_figure([History(tmp_path)]).axes
    assert not any(str(line.get_gid()).startswith("switch-") for line in axes.lines)


def test_directory_names_with_special_characters_are_shown_unchanged(tmp_path):
    names = ["a$b_{$", "_b", "plain"]
    histories = [History(write_records(tmp_path / name, train_records(3))) for name in names]
    with plain_style():
        figure = train_figure(histories)
        figure.canvas.draw()
    assert [text.get_text().rsplit(":", 1)[0] for text in figure.axes[0].get_legend().get_texts()] == names


def test_directory_name_that_is_not_utf8_is_drawn(tmp_path):
    history = History(write_records(tmp_path / "run\udcff", train_records(3)))
    with plain_style():
        figure = train_figure([history])
        figure.canvas.draw()
    assert figure.axes[0].get_legend().get_texts()[0].get_text().startswith("run?:")


def test_labels_of_nearby_anchors_are_merged(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"flags": {"data": "penn", "limit_tokens": 0}}))
    for first, groups in ((300.0, 1), (60.0, 4)):
        write_records(tmp_path, train_records(9, first=first, last=58.3))
        with plain_style():
            figure = train_figure([History(tmp_path)])
        figure.canvas.draw()
        texts = figure.axes[0].texts
        words = "\n".join(text.get_text() for text in texts).splitlines()
        assert words == [f"{value} after {epochs:,}" for epochs, value in ANCHORS.items()]
        assert len(texts) == groups
        boxes = [text.get_window_extent() for text in texts]
        assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))


def test_runs_with_equal_names_have_distinct_labels(tmp_path):
    for name in ("a/1", "b/1"):
        write_records(tmp_path / name, train_records(3))
    with plain_style():
        [axes] = train_figure([History(tmp_path / name) for name in ("a/1", "b/1")]).axes
    assert [line.get_label().split(":")[0] for line in axes.lines if line.get_gid()] == ["a/1", "b/1"]


# --- Incomplete runs, damaged runs and runs of earlier versions ---


def draw_search(records, tmp_path, **changes):
    run = write_records(tmp_path / "run", [{**record, **changes} for record in records])
    with plain_style():
        return search_curves.figures(History(run))


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


def test_time_is_in_weight_steps_before_the_first_epoch_ends(records, tmp_path):
    figures = draw_search(records[:2], tmp_path)
    assert list(figures) == ["curves", "genotype", "edges"]
    assert {axes.get_xlabel() for axes in figures["curves"].axes} == {"weight steps"}
    assert curves(figures["curves"])["Perplexity", "training"].get_xdata()[-1] == records[1]["step"]


def test_time_is_extrapolated_at_the_pace_of_the_last_epoch(records, tmp_path):
    history = History(write_records(tmp_path / "run", records[:-3]))
    steps = {record["epoch"]: record["step"] for record in records if record["kind"] == "epoch"}
    last_step, each = steps[11], steps[11] - steps[10]
    assert history.when(last_step) == 11
    assert history.when(last_step + each) == pytest.approx(12)
    assert history.when((steps[4] + steps[5]) // 2) == pytest.approx(4.5, abs=0.05)


def test_run_without_probabilities_has_the_other_pictures(records, tmp_path):
    old = [
        {k: v for k, v in record.items() if k != "probabilities"} for record in records if record["kind"] != "diagnosis"
    ]
    figures = draw_search(old, tmp_path)
    assert list(figures) == ["curves", "genotype"]
    assert "Entropy of the alphas" not in titles(figures["curves"]) and "Perplexity" in titles(figures["curves"])
    final = {"probabilities": records[-2]["probabilities"], "genotype": records[-2]["genotype"]}
    (tmp_path / "run" / "genotype.json").write_text(json.dumps(final))  # Every search saves its last probabilities.
    with plain_style():
        assert "edges" in search_curves.figures(History(tmp_path / "run"))


@pytest.mark.parametrize("changes", [
    {"probabilities": 3}, {"probabilities": [[0.2] * 5] * 35}, {"probabilities": [[0.2] * 4] * 36},
    {"probabilities": [[0.2] * 4 + [math.nan]] * 36}, {"probabilities": []}, {"genotype": {"recurrent": 7}},
    {"genotype": None}, {"ppl": math.inf, "valid_ppl": "9"}, {"lr": None, "rate": "x"}, {"norm": [1]},
    {"norm": -1.0}, {"ppl": 1e300, "valid_ppl": 10**400}, {"eigenvalue": 1e308},
])  # fmt: skip
def test_damaged_fields_are_left_out(changes, records, tmp_path):
    figures = draw_search(records, tmp_path, **changes)
    name = next(iter(changes))
    assert ("edges" in figures) == (name != "probabilities") and ("genotype" in figures) == (name != "genotype")
    missing = {"ppl": "Perplexity", "norm": "Gradient of the weights", "lr": "Learning rate"}.get(name)
    assert missing not in titles(figures["curves"])


ODD = (
    "{", "[]", '{"kind": "epoch"}', '{"kind": "interval", "step": -3, "epoch": 1, "seconds": 1}',
    '{"kind": "epoch", "step": 1e400, "epoch": 2, "seconds": 1}',
    '{"kind": "epoch", "step": 5, "epoch": [], "seconds": 1}',
    '{"kind": "epoch", "step": 0, "epoch": 0, "seconds": 0, "valid_ppl": "3", "probabilities": [[]]}',
    '{"kind": "interval", "step": 99999999999999999999, "epoch": 1, "seconds": 1, "ppl": 3}',
    '{"kind": "epoch", "step": 7, "epoch": 1, "seconds": 1' + 400 * "0" + "}",
)  # fmt: skip


@settings(max_examples=60)
@given(odd=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(ODD)), max_size=6))
def test_malformed_lines_of_metrics_are_ignored(tmp_path_factory, odd):
    records = search_records(3, nodes=2)
    lines = [json.dumps(record) for record in records]
    for place, line in odd:
        lines.insert(min(place, len(lines)), line)
    folder = tmp_path_factory.mktemp("odd")
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "epo')
    history = History(folder)
    assert history.curve("epoch", "valid_ppl")[1] == [
        record["valid_ppl"] for record in records if record["kind"] == "epoch"
    ]
    assert history.probabilities[1][-1].tolist() == records[-2]["probabilities"]
    assert len(history.genotypes) == 9


def test_run_rolled_back_to_its_start_has_nothing_to_draw(tmp_path, capsys):
    write_records(tmp_path, [{"kind": "rollback", "epoch": 1, "step": 0, "lr": 1.0, "reason": "x", "seconds": 1.0}])
    for command in ("search", "train"):
        with pytest.raises(SystemExit) as end:
            main([command, str(tmp_path), "--out", str(tmp_path / "a.svg")])
        assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert main(["report", str(tmp_path)]) == 0


def test_edges_of_cells_with_too_many_nodes_are_not_drawn(tmp_path):
    write_records(tmp_path, search_records(2, nodes=17))
    with plain_style():
        assert list(search_curves.figures(History(tmp_path))) == ["curves", "genotype", "signal"]
    with pytest.raises(PictureError):
        animation.frames(History(tmp_path))


@pytest.mark.parametrize("command", ["search", "formation", "train", "report"])
@pytest.mark.parametrize("text", [None, "", "{", '{"kind": "epoch"}\n'])
def test_directory_without_a_run_exits_2_with_one_line(command, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main([command, "."])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "no metrics.jsonl with records" in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("argv", "message"), [
    (["search", "RUN", "--out", "a.gif"], "a picture's name ends in"),
    (["formation", "RUN", "--out", "a.svg"], "an animation's name ends in"),
    (["formation", "TRAIN"], "no alphas of a search to animate"),
    (["train", "RUN", "--out", "no/a.svg"], "cannot write no/a.svg:"),
    (["formation", "RUN", "--out", "no/a.gif"], "cannot write no/a.gif:"),
    (["report", "RUN", "--out", "a.pdf"], "a page's name ends in .html"),
    (["report", "RUN", "--out", "no/a.html"], "cannot write no/a.html:"),
    (["train"], "arguments are required"),
    (["DARTS"], "did you mean visualize.py cell DARTS?"),
    (["random:3", "--out", "a.svg"], "did you mean visualize.py cell random:3 --out a.svg?"),
    (["RUN"], "did you mean visualize.py report "),
    (["reports", "RUN"], "did you mean visualize.py report "),
])  # fmt: skip
def test_invalid_arguments_exit_2_with_one_line(argv, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "train", train_records(3))
    with pytest.raises(SystemExit) as end:
        main([{"RUN": str(run), "TRAIN": str(tmp_path / "train")}.get(word, word) for word in argv])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_search_picture_has_all_parts_and_is_reproducible(run, tmp_path):
    for name in ("one.svg", "two.svg"):
        assert main(["search", str(run), "--out", str(tmp_path / name)]) == 0
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "two.svg").read_bytes() and str(run).encode() not in one
    for gid in (b'id="edge-0-1"', b'id="edge-7-8"', b'id="curve-validation"', b'id="change"'):
        assert gid in one


# --- Text for Graphviz ---


def test_dot_has_every_node_and_edge(tmp_path):
    assert main(["cell", "DARTS_V1", "--out", str(tmp_path / "cell.dot")]) == 0
    text = (tmp_path / "cell.dot").read_text()
    for line in (
        '0 -> 1 [label="relu"',
        '2 -> 3 [label="tanh"',
        '1 -> 6 [label="identity"',
        "8 -> output",
        "input -> 0",
    ):
        assert line in text
    assert text.count("->") == 2 + 8 + 8


@pytest.mark.skipif(not shutil.which("dot"), reason="no graphviz on this machine")
def test_graphviz_reads_the_dot_text():
    from genotypes import ENAS

    output = subprocess.run(["dot", "-Tplain"], input=cell_dot(ENAS), capture_output=True, text=True, check=True).stdout
    assert sum(line.startswith("edge") for line in output.splitlines()) == 2 + 11 + 6
