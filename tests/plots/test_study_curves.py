"""Tests that the pictures of a study have a point for each cell, at its values."""

import json

import pytest

from genotypes import parse, random_genotype
from plots.study_curves import LOOKS, RANDOM_LOOK, cells_figure, proxies_figure, study_figure
from study.features import features
from visualize import main


@pytest.fixture
def study(tmp_path):
    cells = [
        {"cell": f"{method}-{seed}", "genotype": str(random_genotype(seed)),
         "early": 300.0 + seed, "select": 200.0 - seed}
        for method, seeds in (("layer", range(1, 4)), ("random", range(4, 8))) for seed in seeds
    ]  # fmt: skip
    cells.append({"cell": "first-1", "genotype": str(random_genotype(9)), "early": None, "select": None})
    rhos = {"width": (0.1, -0.3), "mean depth": (0.2, -0.8), "tanh": (None, None)}
    correlations = [
        {"feature": name, "cells": "all", "n": 7, "epochs": epochs, "rho": [rho, rho, rho]}
        for name, pair in rhos.items() for epochs, rho in zip((3, 20), pair, strict=True)
    ]  # fmt: skip
    (tmp_path / "leaderboard.json").write_text(json.dumps({"cells": cells, "features": correlations}))
    return tmp_path, cells


def test_cells_are_drawn_against_the_feature_with_the_largest_correlation(study):
    folder, cells = study
    panels = cells_figure(folder).axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == [
        "after 3 epochs: Spearman's rho 0.20", "after 20 epochs: Spearman's rho -0.80",
    ]  # fmt: skip
    for axes, time in zip(panels, ("early", "select"), strict=True):
        assert axes.get_xlabel() == "mean depth of the cell"
        points = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in axes.lines}
        assert list(points) == ["layer", "random"]
        for method, drawn in points.items():
            of_method = [cell for cell in cells if cell["cell"].startswith(method)]
            assert drawn == sorted((features(parse(cell["genotype"]))["mean depth"], cell[time]) for cell in of_method)


@pytest.mark.parametrize(
    ("rhos", "titles", "first"),
    [
        (
            {3: None, 20: 0.5},
            ["after 3 epochs: Spearman's rho unknown", "after 20 epochs: Spearman's rho 0.50"],
            "early",
        ),
        ({1: 0.5}, ["after 1 epoch: Spearman's rho 0.50"], "select"),
    ],
)
def test_each_panel_has_the_perplexities_of_its_title(rhos, titles, first, study):
    folder, cells = study
    correlations = [
        {"feature": "width", "cells": "all", "n": 7, "epochs": epochs, "rho": [rho] * 3} for epochs, rho in rhos.items()
    ]
    (folder / "leaderboard.json").write_text(json.dumps({"cells": cells, "features": correlations}))
    panels = cells_figure(folder).axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == titles
    drawn = [value for line in panels[0].lines for value in line.get_ydata()]
    assert sorted(drawn) == sorted(cell[first] for cell in cells if cell[first] is not None)


@pytest.mark.parametrize("order", [1, -1])
def test_methods_of_a_selection_have_looks_of_their_own_whichever_ended_first(order):
    methods = [*"abcdefgh", "random"]
    names = [f"{method}-1/1" for method in methods][::order]
    [axes] = study_figure([(name, 100.0 + i) for i, name in enumerate(names)]).axes
    looks = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_fillstyle())
        for line in axes.lines if line.get_marker() != "None"
    }  # fmt: skip
    assert looks == dict(zip(methods, [*LOOKS[:8], RANDOM_LOOK], strict=True))
    assert len(set(looks.values())) == 9


CELL = {"cell": "a-1", "early": 1.0, "select": 2.0, "genotype": str(random_genotype(1))}
WIDTH = {"cells": "all", "feature": "width", "epochs": 3, "rho": [0.5, 0.1, 0.9]}


@pytest.mark.parametrize("board", [
    None, {}, {"cells": [], "features": []}, {"cells": 3, "features": [{}]}, {"cells": [], "features": [WIDTH]},
    {"cells": [CELL | {"early": None}], "features": [WIDTH]}, {"cells": [CELL | {"select": {}}], "features": [WIDTH]},
    {"cells": [CELL], "features": [WIDTH | {"epochs": []}]}, {"cells": [CELL], "features": [WIDTH | {"rho": [[]]}]},
    {"cells": [CELL], "features": [WIDTH | {"rho": []}]}, {"cells": [CELL | {"genotype": 5}], "features": [WIDTH]},
    {"cells": [CELL], "features": [WIDTH | {"epochs": epochs} for epochs in range(1, 5)]},
])  # fmt: skip
def test_study_without_correlations_exits_2(board, tmp_path, capsys):
    if board is not None:
        (tmp_path / "leaderboard.json").write_text(json.dumps(board))
    with pytest.raises(SystemExit) as end:
        main(["cells", str(tmp_path), "--out", str(tmp_path / "x.svg")])
    assert end.value.code == 2
    assert "no correlations of the cells' features" in capsys.readouterr().err


def test_ranks_of_the_proxies_cells_are_drawn(tmp_path):
    """The training with flags is drawn behind those without, and a cell that lacks a training is left out."""
    given = "Genotype-recurrent-tanh-0-tanh-0-relu-1-concat-1-2-3"
    ppls = {"a": (3.0, 1.0, 9.0), "b": (2.0, 3.0, 7.0), given: (1.0, 2.0, 8.0), "d": (4.0, None, 6.0)}
    text = "Genotype(recurrent=[('tanh', 0), ('tanh', 0), ('relu', 1)], concat=[1, 2, 3])"
    rows = [
        {"cell": cell, "genotype": text, "ppl": dict(zip(("--epochs 2", "1 epoch", "9 epochs"), of_cell, strict=True))}
        for cell, of_cell in ppls.items()
    ]
    (tmp_path / "leaderboard.json").write_text(json.dumps({"proxy_cells": rows}))
    [axes] = proxies_figure(tmp_path).axes
    drawn = {line.get_gid(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {"ranks-a": [1, 3, 3], "ranks-b": [3, 2, 1], f"ranks-{given}": [2, 1, 2]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 epoch", "--epochs 2", "9 epochs"]
    assert [text.get_text() for text in axes.texts] == ["a: 9.00", "b: 7.00", "2 tanh on s_0, 1 relu on s_1: 8.00"]


def test_dollar_signs_of_names_are_drawn_as_they_are(tmp_path):
    rows = [
        {"cell": cell, "genotype": None, "ppl": {r"$\frac$ a": 2.0, "9": 1.0 + i}}
        for i, cell in enumerate(("$\\x$", "b"))
    ]
    (tmp_path / "leaderboard.json").write_text(json.dumps({"proxy_cells": rows}))
    assert main(["proxies", str(tmp_path), "--out", str(tmp_path / "x.svg")]) == 0


@pytest.mark.parametrize("rows", [None, [], [{"cell": "a", "ppl": {"1": 2.0, "9": 1.0}}], [{"cell": "a"}], 3])
def test_study_without_ranks_exits_2(rows, tmp_path, capsys):
    (tmp_path / "leaderboard.json").write_text(json.dumps({"proxy_cells": rows}))
    with pytest.raises(SystemExit) as end:
        main(["proxies", str(tmp_path), "--out", str(tmp_path / "x.svg")])
    assert end.value.code == 2
    assert "no two cells with all trainings of the proxies" in capsys.readouterr().err
