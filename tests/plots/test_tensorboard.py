"""--tensorboard: what TensorBoard reads is what metrics.jsonl holds, after a run that was cut short and went on too."""

import json
from itertools import pairwise

import pytest
from helpers import SIZES, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import train_search
from experiment import checkpoint, validate_arguments
from experiment.run_directory import Run
from plots.tensorboard import FOLDER, OF_ROW, TensorBoardLogger

FLAGS = [*SIZES, "--tensorboard"]


def shown(folder):
    """By tag [(step, value)], and the accumulator."""
    events = EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)] for tag in tags}, events


def told(folder):
    found = {}
    for row in rows(folder):
        for name, value in row.items():
            if name not in OF_ROW and isinstance(value, int | float):
                found.setdefault(f"{row['kind']}/{name}", []).append((row["step"], value))
    return found


def test_a_search_has_its_scalars_flags_and_cells(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data", str(corpus), "--save", str(folder), "--lr", "1", "--epochs", "2", "--diagnose_every", "9"]
    assert train_search.main([*FLAGS, *flags]) == 0
    scalars, events = shown(folder)
    assert told(folder) == scalars
    assert {"interval/loss", "epoch/valid_ppl", "diagnosis/eigenvalue"} <= scalars.keys()
    cells = [row["genotype"] for row in rows(folder, "epoch")]
    changes = 1 + sum(a != b for a, b in pairwise(cells))
    assert len(events.Images("cell")) == changes
    [start] = [e for e in events.PluginTagToContent("hparams").items() if "session_start" in e[0]]
    assert b"arch_lr" in start[1] and b"diagnose_every" in start[1]


def test_a_run_that_goes_on_is_shown_once(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--data", str(corpus), "--save", str(folder), "--arch", "DARTS_V1", "--lr", "1"]
    assert train.main([*flags, "--epochs", "2"]) == 0
    state = checkpoint.load(folder / "last.pt")
    with open(folder / "metrics.jsonl", "a") as file:  # of a process that was killed after its last checkpoint
        for step in (10**6, 10**6 + 1):
            file.write(json.dumps({"kind": "interval", "epoch": 9, "step": step, "loss": 5.0, "seconds": 1}) + "\n")
    assert state["progress"]["epoch"] == 3
    assert train.main(["--resume", "--save", str(folder), "--epochs", "3"]) == 0
    scalars, _ = shown(folder)
    assert told(folder) == scalars
    assert len(scalars["epoch/valid_ppl"]) == 3
    assert len(list((folder / FOLDER).iterdir())) == 1  # the fast loader of TensorBoard reads whatever there is
    assert train.main(["--resume", "--save", str(folder), "--epochs", "4", "--no-tensorboard"]) == 0
    assert len(shown(folder)[0]["epoch/valid_ppl"]) == 3


def test_a_run_may_be_shown_from_its_middle_on(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = [*SIZES, "--data", str(corpus), "--save", str(folder), "--arch", "LSTM", "--lr", "1"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert not (folder / FOLDER).exists()
    assert train.main(["--resume", "--save", str(folder), "--epochs", "2", "--tensorboard"]) == 0
    scalars, _ = shown(folder)
    assert told(folder) == scalars
    assert [step for step, _ in scalars["epoch/valid_ppl"]] == [row["step"] for row in rows(folder, "epoch")]


def test_odd_rows_are_shown_as_far_as_they_go(tmp_path):
    run = Run(tmp_path / "run")
    run.tensorboard = TensorBoardLogger(run.folder, {"lr": 1.0, "arch": None})
    for genotype in ({"recurrent": 3}, {"recurrent": [["relu", 0]], "concat": [1]}):
        run.record(kind="epoch", epoch=1, step=3, seconds=1.0, loss=2.0, ppl=float("inf"), genotype=genotype)
    scalars, events = shown(run.folder)
    assert scalars == {"epoch/loss": [(3, 2.0), (3, 2.0)]}
    assert len(events.Images("cell")) == 1


def test_without_tensorboard_a_line_says_what_to_install(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate_arguments, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, "--data", str(corpus), "--save", str(tmp_path / "run")])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    needs = "train.py: error: --tensorboard: needs {0}; pip install {0}, or go without (--no-tensorboard)"
    assert lines == [needs.format(name) for name in ("tensorboard", "matplotlib")]
    assert not (tmp_path / "run").exists()
