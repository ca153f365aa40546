"""With --tensorboard, TensorBoard reads what metrics.jsonl holds, also after a run was killed and resumed."""

import json
from itertools import pairwise

import pytest
from helpers import SIZES, read_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import train_search
from experiment import checkpoint, validate_arguments
from experiment.run_directory import Run
from plots.tensorboard import FOLDER, POSITION_FIELDS, TensorBoardLogger

FLAGS = [*SIZES, "--tensorboard"]


def read_tensorboard(folder):
    """Returns the scalars, by tag as [(step, value)], and the accumulator."""
    events = EventAccumulator(str(folder / FOLDER), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)] for tag in tags}, events


def recorded_scalars(folder):
    scalars = {}
    for record in read_records(folder):
        for name, value in record.items():
            if name not in POSITION_FIELDS and isinstance(value, int | float):
                scalars.setdefault(f"{record['kind']}/{name}", []).append((record["step"], value))
    return scalars


def test_tensorboard_has_the_scalars_flags_and_cells_of_a_search(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = ["--data", str(corpus), "--save", str(folder), "--lr", "1", "--epochs", "2", "--diagnose_every", "9"]
    assert train_search.main([*FLAGS, *flags]) == 0
    scalars, events = read_tensorboard(folder)
    assert recorded_scalars(folder) == scalars
    assert {"interval/loss", "epoch/valid_ppl", "diagnosis/eigenvalue"} <= scalars.keys()
    cells = [record["genotype"] for record in read_records(folder, "epoch")]
    changes = 1 + sum(a != b for a, b in pairwise(cells))
    assert len(events.Images("cell")) == changes
    [start] = [e for e in events.PluginTagToContent("hparams").items() if "session_start" in e[0]]
    assert b"arch_lr" in start[1] and b"diagnose_every" in start[1]


def test_resumed_run_has_each_record_once_in_tensorboard(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--data", str(corpus), "--save", str(folder), "--arch", "DARTS_V1", "--lr", "1"]
    assert train.main([*flags, "--epochs", "2"]) == 0
    state = checkpoint.load(folder / "last.pt")
    with open(folder / "metrics.jsonl", "a") as file:  # These are of a process killed after its last save.
        for step in (10**6, 10**6 + 1):
            file.write(json.dumps({"kind": "interval", "epoch": 9, "step": step, "loss": 5.0, "seconds": 1}) + "\n")
    assert state["progress"]["epoch"] == 3
    assert train.main(["--resume", "--save", str(folder), "--epochs", "3"]) == 0
    scalars, _ = read_tensorboard(folder)
    assert recorded_scalars(folder) == scalars
    assert len(scalars["epoch/valid_ppl"]) == 3
    assert len(list((folder / FOLDER).iterdir())) == 1  # TensorBoard's fast loader reads every file.
    assert train.main(["--resume", "--save", str(folder), "--epochs", "4", "--no-tensorboard"]) == 0
    assert len(read_tensorboard(folder)[0]["epoch/valid_ppl"]) == 3


def test_tensorboard_enabled_on_resume_has_the_whole_run(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = [*SIZES, "--data", str(corpus), "--save", str(folder), "--arch", "LSTM", "--lr", "1"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert not (folder / FOLDER).exists()
    assert train.main(["--resume", "--save", str(folder), "--epochs", "2", "--tensorboard"]) == 0
    scalars, _ = read_tensorboard(folder)
    assert recorded_scalars(folder) == scalars
    assert [step for step, _ in scalars["epoch/valid_ppl"]] == [
        record["step"] for record in read_records(folder, "epoch")
    ]


def test_invalid_values_of_a_record_are_left_out(tmp_path):
    run = Run(tmp_path / "run")
    run.tensorboard = TensorBoardLogger(run.folder, {"lr": 1.0, "arch": None})
    for genotype in ({"recurrent": 3}, {"recurrent": [["relu", 0]], "concat": [1]}):
        run.record(kind="epoch", epoch=1, step=3, seconds=1.0, loss=2.0, ppl=float("inf"), genotype=genotype)
    scalars, events = read_tensorboard(run.folder)
    assert scalars == {"epoch/loss": [(3, 2.0), (3, 2.0)]}
    assert len(events.Images("cell")) == 1


def test_missing_tensorboard_exits_2_with_an_install_hint(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate_arguments, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, "--data", str(corpus), "--save", str(tmp_path / "run")])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    needs = "train.py: error: --tensorboard: needs {0}; pip install {0}, or go without (--no-tensorboard)"
    assert lines == [needs.format(name) for name in ("tensorboard", "matplotlib")]
    assert not (tmp_path / "run").exists()
