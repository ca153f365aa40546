"""Whatever the flags and whatever the files: an exit code and lines for a person, and no file of theirs changed.

pytest tests/experiment/test_untrusted.py                     # 2,000 cases
"""

import contextlib
import io
import json
import os
import random
import shutil
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train
import train_search
import utils
from experiment import checkpoint

SIZES = "--emsize 6 --batch_size 2 --bptt 4 --lr 1 --epochs 1 --device cpu --engine eager --log_interval 9".split()
SCRIPTS = {"train": train, "search": train_search}
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus and a finished run of each kind."""
    home = tmp_path_factory.mktemp("home")
    (home / "corpus").mkdir()
    rng = random.Random(0)
    for split in ("train", "valid", "test"):
        (home / "corpus" / f"{split}.txt").write_text("\n".join(" ".join(rng.choices("abc", k=5)) for _ in range(8)))
    for kind, script in SCRIPTS.items():
        flags = ["--data", home / "corpus", "--save", home / kind, *SIZES]
        assert script.main([str(flag) for flag in flags]) == 0
    return home


def tree(folder):
    """Every file of the user's; a cache and a lock are nobody's work."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".npz" and path.name != "lock"
    }


def copied(home, folder):
    """A fresh copy of the runs and the corpus, to be spoilt."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(home, folder, ignore=shutil.ignore_patterns("*.npz"))


def call(script, *flags):
    """The exit code of a script and what it says; anything but an exit is a failure of the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
        except (
            checkpoint.CheckpointError,
            utils.RunError,
        ) as error:  # run_script: a line, exit code 1
            code = 1
            print(error, file=err)
    return code, out.getvalue(), err.getvalue()


def holds(code, out, err, before, folder):
    assert code in (0, 1, 2)
    assert "Traceback" not in out + err
    assert err.strip() or not code
    if code == 2:
        assert tree(folder) == before


# --- flags ---

ODD_NUMBERS = ["-1", "0", "nan", "inf", "1e400", "-0.5", "0.5", "2", "3", "99999999999999999999", "1_0", "", "x", "٣"]
ODD_WORDS = ["", " ", "\x00", "/", "..", "/dev/null", "a" * 5000, "penn\n", "~", "DARTS", "random:0", "random:-1",
             "Genotype(recurrent=[('tanh',0)], concat=[1])", "Genotype(" + "(" * 300, "{" * 200, "[1, 2]", "cuda:0",
             "cuda:-1", "cpu", "auto", "exact", "fused", "bf16", "tf32"]  # fmt: skip


@st.composite
def odd_flags(draw):
    script = draw(st.sampled_from(list(SCRIPTS)))
    actions = SCRIPTS[script].build_parser()._actions
    names = [a.option_strings[0] for a in actions if a.dest not in ("help", "emsize", "data", "save", "epochs")]
    flags = []
    for name in draw(st.lists(st.sampled_from([*names, "--colour", "--lrr"]), min_size=1, max_size=4)):
        flags.append(name)
        if draw(st.integers(0, 9)):
            flags.append(draw(st.sampled_from(ODD_NUMBERS + ODD_WORDS) | st.text(max_size=8)))
    return script, flags


@settings(SETTINGS, max_examples=800)
@given(case=odd_flags())
def test_flags(case, home, tmp_path):
    script, flags = case
    before = tree(home)
    save = tmp_path / "run"
    shutil.rmtree(save, ignore_errors=True)
    with mock.patch("training.overfit.STEPS", 3):
        code, out, err = call(SCRIPTS[script], "--data", home / "corpus", "--save", save, *SIZES, *flags)
    holds(code, out, err, before, home)
    assert save.exists() == (code < 2 and "usage:" not in out)  # 1: a run that diverged


# --- files ---


def spoil(raw, data):
    """Bytes that something happened to."""
    raw = bytearray(raw)
    at = data.draw(st.integers(0, len(raw)))
    what = data.draw(st.sampled_from(["cut", "flip", "insert", "replace", "empty", "double", "noise"]))
    if what == "cut":
        return raw[:at]
    if what == "flip" and raw:
        raw[at % len(raw)] ^= 1 << data.draw(st.integers(0, 7))
        return raw
    if what == "insert":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=20)) + raw[at:]
    if what == "replace":
        new = data.draw(st.binary(max_size=20))
        return raw[:at] + new + raw[at + len(new) :]
    return {"empty": b"", "double": raw + raw}.get(what, data.draw(st.binary(max_size=200)))


@settings(SETTINGS, max_examples=600)
@given(data=st.data())
def test_files(data, home, tmp_path):
    """A run that goes on, or is evaluated, with any of its files spoilt, or those of its corpus."""
    kind = data.draw(st.sampled_from(list(SCRIPTS)))
    folder = copied(home, tmp_path / "copy")
    names = [
        "config.json",
        "last.pt",
        "previous.pt",
        "best.pt",
        "metrics.jsonl",
        "genotype.json",
        "../corpus/train.txt",
    ]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        path = folder / kind / name
        if path.exists():
            path.write_bytes(spoil(path.read_bytes(), data))
    before = tree(folder)
    do = data.draw(st.sampled_from(["resume", "evaluate", "arch"]))
    if do == "resume":
        result = call(SCRIPTS[kind], "--resume", "--save", folder / kind, "--data", folder / "corpus", "--epochs", 1)
    elif do == "evaluate":
        result = call(evaluate, folder / kind / "last.pt", "--data", folder / "corpus", "--device", "cpu")
    else:
        result = call(train, "--data", folder / "corpus", "--arch", folder / "search", "--save", tmp_path / "new",
                      *SIZES)  # fmt: skip
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    holds(*result, before, folder)


# --- checkpoints that are sealed well and hold something else ---

ODD_VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 10**30, 1e300, float("nan"), "", "x", [], {}, [1], {"a": 1}, (), [[]], "Genotype"]
) | st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.sampled_from([(), (0,), (1,), (3,), (6, 6), (2, 6), (1, 2, 3)]),
    st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64]),
)


def places(value, where=()):
    """The way to every part of a state."""
    if isinstance(value, dict | list) and len(where) < 6:
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value[:3])):
            yield (*where, key)
            yield from places(part, (*where, key))


@settings(SETTINGS, max_examples=600)
@given(data=st.data())
def test_states(data, home, tmp_path):
    kind = data.draw(st.sampled_from(list(SCRIPTS)))
    folder = copied(home, tmp_path / "copy")
    name = data.draw(st.sampled_from(["last.pt", "last.pt", "best.pt"]))
    state = checkpoint.load(folder / kind / name)
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(list(places(state))))
        part = state
        for key in way:
            part = part[key]
        if data.draw(st.booleans()) and isinstance(part, dict):
            del part[last]
        else:
            part[last] = data.draw(ODD_VALUES)
    path = folder / kind / name
    path.write_bytes(checkpoint.with_checksum({name: part for name, part in state.items() if name != "format"}))
    before = tree(folder)
    if data.draw(st.booleans()):
        more = ("--epochs", data.draw(st.sampled_from([1, 2])))
        result = call(SCRIPTS[kind], "--resume", "--save", folder / kind, "--data", folder / "corpus", *more)
    else:
        result = call(evaluate, path, "--data", folder / "corpus", "--device", "cpu")
    holds(*result, before, folder)


# --- a corpus from a stranger ---


def test_a_corpus_that_leaves_its_folder_never_ends_or_has_no_lines(home, tmp_path):
    corpus = tmp_path / "corpus"
    flags = ("--data", corpus, "--save", tmp_path / "run", *SIZES)
    shutil.copytree(home / "corpus", corpus)
    (corpus / "train.txt").unlink()
    for make, says in (
        (lambda path: path.symlink_to("/etc/hostname"), "leaves its folder"),
        (lambda path: path.symlink_to("/dev/zero"), "leaves its folder"),
        (os.mkfifo, "not a file"),
        (lambda path: path.open("wb").truncate(1 << 30), "a line of more than 268,435,456 bytes"),
    ):
        make(corpus / "train.txt")
        code, _, err = call(train, *flags)
        assert code == 2
        assert err.count("\n") == 1
        assert says in err
        (corpus / "train.txt").unlink()
    (corpus / "words.txt").write_text("a b c\n" * 20)
    (corpus / "train.txt").symlink_to("words.txt")  # one that stays is a name like another
    assert call(train, *flags)[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        '"resumed": null',
        '"resumed": 3',
        '"versions": NaN',
        '"x": Infinity',
        '"flags": [1]',
        '"script": 1',
        '"sha256": 0',
    ],
)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_an_odd_config_changes_nothing(kind, change, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    path = tmp_path / "home" / kind / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + f", {change}}}")
    before = tree(tmp_path)
    code, _, err = call(SCRIPTS[kind], "--resume", "--save", tmp_path / "home" / kind)
    assert code == 2
    assert err.count("\n") == 1
    assert tree(tmp_path) == before


def test_weights_of_another_kind_are_not_evaluated(home, tmp_path):
    state = checkpoint.load(home / "train" / "best.pt")
    for kind in (torch.complex64, torch.float64):
        state["model"] = {name: weight.to(kind) for name, weight in state["model"].items()}
        (tmp_path / "x.pt").write_bytes(checkpoint.with_checksum({k: v for k, v in state.items() if k != "format"}))
        code, _, err = call(evaluate, tmp_path / "x.pt", "--device", "cpu")
        assert code == 2
        assert err.count("\n") == 1


def test_a_cell_of_a_million_nodes_is_refused(home, tmp_path):
    cell = tmp_path / "cell.json"
    for nodes in (65, 10**6):
        cell.write_text(json.dumps({"recurrent": [["tanh", 0]] * nodes, "concat": [1]}))
        code, _, err = call(train, "--data", home / "corpus", "--arch", cell, "--save", tmp_path / "run", *SIZES)
        assert code == 2
        assert err.count("\n") == 1


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_state_of_a_run_of_another_size_says_which_flag_differs(kind, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    flags = ["--data", home / "corpus", "--save", tmp_path / "wide", *SIZES, "--emsize", 8, "--dropout", 0.5]
    assert call(SCRIPTS[kind], *flags)[0] == 0
    shutil.copy(tmp_path / "wide" / "last.pt", tmp_path / "home" / kind / "last.pt")
    code, _, err = call(SCRIPTS[kind], "--resume", "--save", tmp_path / "home" / kind)
    assert code == 2
    assert "--emsize 6: " in err
    assert "was written with 8" in err
    assert "--dropout 0.75: " in err


def test_a_size_that_no_memory_holds_ends_with_the_sizes(home, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        train.main([str(f) for f in ("--data", home / "corpus", "--save", tmp_path / "run", *SIZES, "--emsize", 10**7)])
    assert checkpoint.out_of_memory(caught.value)


# --- errors that are nobody's fault, and those of the program ---


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--small_batch_size 2 "),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "4 rows"),
    ],
)
def test_no_memory_ends_with_the_sizes_and_what_needs_less(kind, error, says, home, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(SCRIPTS[kind], "clipped_gradient", fail)
    flags = ["--data", home / "corpus", "--save", tmp_path / "run", *SIZES, "--batch_size", 4]
    monkeypatch.setattr("sys.argv", [kind, *map(str, flags)])
    assert train.signals.run_script(SCRIPTS[kind].main) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert says in last
    assert "--emsize 6, --bptt 4 and 4 rows of --batch_size 4" in last


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ZeroDivisionError(), KeyError("hidden")])
def test_an_error_of_the_program_is_not_taken_for_divergence(kind, error, home, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(SCRIPTS[kind], "clipped_gradient", fail)
    with pytest.raises(type(error)):
        SCRIPTS[kind].main([str(f) for f in ("--data", home / "corpus", "--save", tmp_path / "run", *SIZES)])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
