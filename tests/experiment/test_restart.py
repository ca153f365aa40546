"""A run that ended before its first step does not block its command, work is never overwritten, and a run may resume
with the other engine."""

import json
import shutil
from argparse import Namespace

import pytest
from helpers import SIZES, outcome, run_compiling

import train
import train_search
from experiment import checkpoint
from experiment.experiment import Experiment, TrainingState
from experiment.run_directory import Run
from experiment.startup import unnamed_run
from experiment.validate_arguments import must_not_be_overwritten


def flags(corpus, folder, *more):
    return ["--data", str(corpus), *SIZES, "--lr", "1", "--epochs", "1", "--save", str(folder), *more]


def test_runs_without_names_that_start_in_one_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiment.run_directory.time.strftime", lambda _: "20261128-013000")
    first, args = Run("runs/train-20261128-013000"), Namespace(save="runs/train-20261128-013000")
    second = unnamed_run("train", args)
    assert str(second.folder) == args.save == "runs/train-20261128-013000-2"
    for run in (first, second):
        run.release()


def fail(*_):
    raise RuntimeError("in the first step")


def fail_in(script, flags, monkeypatch, owner, name):
    """Runs a script that ends with an error where `owner` calls its method `name`."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the first step"):
        patch.setattr(owner, name, fail)
        script.main(flags)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Returns the folder of a finished retraining of one epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(corpus, folder)) == 0
    return folder


@pytest.mark.parametrize("script", [train, train_search], ids=["train", "search"])
def test_run_that_ended_before_its_first_step_starts_again(script, corpus, tmp_path, monkeypatch):
    """The first attempt has other weights, of which nothing may be left."""
    assert script.main(flags(corpus, tmp_path / "whole")) == 0
    again = flags(corpus, tmp_path / "run")
    fail_in(script, [*again, "--seed", "5"], monkeypatch, TrainingState, "weight_gradient")
    assert {"config.json", "last.pt", "log.txt"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert script.main(again) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(("owner", "name"), [(TrainingState, "weight_gradient"), (Experiment, "save_last")])
def test_fine_tuning_that_ended_before_its_first_step_starts_again(owner, name, whole, corpus, tmp_path, monkeypatch):
    """It saves the weights that it starts from as best.pt before last.pt."""
    again = ["--finetune", str(whole), "--save", str(tmp_path / "run"), "--device", "cpu", "--epochs", "1"]
    fail_in(train, again, monkeypatch, owner, name)
    assert (tmp_path / "run" / "best.pt").exists()
    assert train.main(again) == 0


@pytest.mark.parametrize("left", [("config.json", "log.txt"), ("log.txt",), ("lock", ".last.pt.1.tmp"),
                                  (".config.json.0123456789abcdef.tmp",), ()])  # fmt: skip
def test_files_of_a_run_without_a_checkpoint_may_be_overwritten(left, whole, tmp_path):
    for name in left:
        source = whole / name
        (tmp_path / name).write_bytes(source.read_bytes() if source.exists() else b"")
    assert not must_not_be_overwritten(tmp_path)


def test_checkpoint_after_a_step_must_not_be_overwritten(corpus, tmp_path, monkeypatch):
    calls = []

    def second_fails(state, *args):
        calls.append(1)
        return fail() if len(calls) == 2 else gradient(state, *args)

    gradient = TrainingState.weight_gradient
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the first step"):
        patch.setattr(TrainingState, "weight_gradient", second_fails)
        train.main(flags(corpus, tmp_path, "--checkpoint_minutes", "0"))
    assert checkpoint.load(tmp_path / "last.pt")["progress"]["step"] == 1
    assert checkpoint.load(tmp_path / "previous.pt")["progress"]["step"] == 0
    assert must_not_be_overwritten(tmp_path)


@pytest.mark.parametrize(("name", "content"), [
    ("notes.txt", b"mine"), (".notes.tmp", b"mine"), ("lock", b"mine"), ("lock", b"[1]"),
    ("config.json", b'{"script": "other.py"}'), ("config.json", b"{"), ("config.json", b"[]"),
    ("last.pt", b"damaged"), ("best.pt", None), ("metrics.jsonl", None), ("genotype.json", b"{}"),
])  # fmt: skip
def test_any_other_file_must_not_be_overwritten(name, content, whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    (tmp_path / name).write_bytes((whole / name).read_bytes() if content is None else content)
    assert must_not_be_overwritten(tmp_path)


def test_resumed_run_removes_its_temporary_files_and_no_others(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name in (".last.pt.77.tmp", ".notes.tmp"):
        (tmp_path / "run" / name).write_text("half")
    assert train.main(["--resume", "--save", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob(".*")) == [".notes.tmp"]


def test_best_weights_alone_must_not_be_overwritten(whole, tmp_path):
    shutil.copy(whole / "best.pt", tmp_path)
    assert must_not_be_overwritten(tmp_path)


@pytest.mark.parametrize("script", [train, train_search], ids=["train", "search"])
def test_run_resumes_with_the_other_engine_after_a_note(script, corpus, tmp_path):
    results = []
    for name, engine in (("same", []), ("other", ["--engine", "fused"])):
        again = ["--resume", "--save", str(tmp_path / name), "--epochs", "2"]
        assert script.main(flags(corpus, tmp_path / name)) == 0
        assert script.main([*again, *engine]) == 0
        results.append(json.loads((tmp_path / name / "result.json").read_text())["valid_ppl"])
        noted = (tmp_path / name / "log.txt").read_text().count("the digits differ by rounding")
        assert noted == (name == "other")
        assert script.main(again) == 0  # with the engine that it had last, without another note
        assert (tmp_path / name / "log.txt").read_text().count("the digits differ by rounding") == noted
    assert json.loads((tmp_path / "other" / "config.json").read_text())["flags"]["engine"] == "fused"
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.slow
def test_run_whose_compiler_fails_equals_the_uncompiled_run(corpus, tmp_path):
    for name, variables in (("plain", {"TORCH_COMPILE_DISABLE": "1"}), ("failing", {"CXX": "/bin/false"})):
        code = f"import train; print(train.main({flags(corpus, tmp_path / name, '--engine', 'fused')!r}))"
        done = run_compiling(code, **variables)
        assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert outcome(tmp_path / "failing") == outcome(tmp_path / "plain")
    assert (tmp_path / "failing" / "log.txt").read_text().count("compiling failed") == 1
