"""Tests that arbitrary flags and damaged files give an exit code and readable lines, and change no file of the user.

FULL_TESTS=1 pytest tests/experiment/test_untrusted.py        # 2,000 cases; 260 without
"""

import json
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers import FULL, ROOT, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train
import train_search
from experiment import checkpoint, metrics
from engine.memory import out_of_memory
from experiment.startup import memory_explained
from experiment.validate_arguments import APPENDED
from utils import RunError

SIZES = "--emsize 6 --batch_size 2 --bptt 4 --lr 1 --epochs 1 --device cpu --engine eager --log_interval 9".split()
SCRIPTS = {"train": train, "search": train_search}
SETTINGS = settings(
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus and a finished run of each script."""
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
    """Returns the contents of all files but caches and locks."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".npz" and path.name != "lock"
    }


def fresh_copy(home, folder):
    """Makes a fresh copy of the runs and the corpus, whose files a test can damage."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(home, folder, ignore=shutil.ignore_patterns("*.npz"))


def assert_handled(code, out, err, before, folder):
    """Asserts that a script ended without a traceback, and left the folder as before if it refused its input."""
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


@settings(SETTINGS, max_examples=800 if FULL else 100)
@given(case=odd_flags())
def test_arbitrary_flags_are_handled(case, home, tmp_path):
    script, flags = case
    before = tree(home)
    save = tmp_path / "run"
    shutil.rmtree(save, ignore_errors=True)
    with mock.patch("training.overfit.MAX_STEPS", 3):
        code, out, err = call(SCRIPTS[script], "--data", home / "corpus", "--save", save, *SIZES, *flags)
    assert_handled(code, out, err, before, home)
    assert save.exists() == (code < 2 and "usage:" not in out)  # A run that diverges has exit code 1 and a directory.


# --- files ---


def damage(raw, data):
    """Returns the bytes after one random kind of damage."""
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


@settings(SETTINGS, max_examples=600 if FULL else 80)
@given(data=st.data())
def test_damaged_files_are_handled(data, home, tmp_path):
    """A script resumes or evaluates a run or retrains its cell, after damage to one or two files of run or corpus."""
    kind = data.draw(st.sampled_from(list(SCRIPTS)))
    folder = fresh_copy(home, tmp_path / "copy")
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
            path.write_bytes(damage(path.read_bytes(), data))
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
    assert_handled(*result, before, folder)


# --- checkpoints with a valid checksum and odd contents ---

ODD_VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 10**30, 1e300, float("nan"), "", "x", [], {}, [1], {"a": 1}, (), [[]], "Genotype"]
) | st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.sampled_from([(), (0,), (1,), (3,), (6, 6), (2, 6), (1, 2, 3)]),
    st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool, torch.complex64]),
)


def paths(value, prefix=()):
    """Yields the path of keys and indices to each entry of a nested state."""
    if isinstance(value, dict | list) and len(prefix) < 6:
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value[:3])):
            yield (*prefix, key)
            yield from paths(part, (*prefix, key))


@settings(SETTINGS, max_examples=600 if FULL else 80)
@given(data=st.data())
def test_checkpoints_with_odd_entries_are_handled(data, home, tmp_path):
    kind = data.draw(st.sampled_from(list(SCRIPTS)))
    folder = fresh_copy(home, tmp_path / "copy")
    name = data.draw(st.sampled_from(["last.pt", "last.pt", "best.pt"]))
    state = checkpoint.load(folder / kind / name)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(list(paths(state))))
        part = state
        for key in parents:
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
    assert_handled(*result, before, folder)


# --- untrusted corpora and configurations ---


def test_corpus_with_escaping_endless_or_special_file_is_refused(home, tmp_path):
    corpus = tmp_path / "corpus"
    flags = ("--data", corpus, "--save", tmp_path / "run", *SIZES)
    shutil.copytree(home / "corpus", corpus)
    (corpus / "train.txt").unlink()
    for make, message in (
        (lambda path: path.symlink_to("/etc/hostname"), "leaves its folder"),
        (lambda path: path.symlink_to("/dev/zero"), "leaves its folder"),
        (os.mkfifo, "not a file"),
        (lambda path: path.open("wb").truncate(1 << 30), "a line of more than 268,435,456 bytes"),
    ):
        make(corpus / "train.txt")
        code, _, err = call(train, *flags)
        assert code == 2
        assert err.count("\n") == 1
        assert message in err
        (corpus / "train.txt").unlink()
    (corpus / "words.txt").write_text("a b c\n" * 20)
    (corpus / "train.txt").symlink_to("words.txt")  # A link inside the folder is permitted.
    assert call(train, *flags)[0] == 0


@pytest.mark.parametrize("name", APPENDED)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_run_with_a_link_or_pipe_for_a_file_that_it_changes_is_refused(kind, name, home, tmp_path):
    """A run directory from elsewhere must not lead to a file of the user's, nor hang."""
    shutil.copytree(home, tmp_path / "home")
    (outside := tmp_path / "outside").write_text("mine\n" * 20)
    path = tmp_path / "home" / kind / name
    for make in (lambda path: path.symlink_to(outside), os.mkfifo):
        path.unlink(missing_ok=True)
        make(path)
        code, _, err = call(SCRIPTS[kind], "--resume", "--epochs", 2, "--save", path.parent)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{name} is a link, or no file" in err
        assert outside.read_text() == "mine\n" * 20


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_pipes_in_the_place_of_files_that_are_read_do_not_hang(name, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    run = tmp_path / "home" / "train"
    (run / name).unlink()
    os.mkfifo(run / name)
    assert call(train, "--resume", "--save", run)[0] == 2
    assert list(metrics.records(run)) == [] or name == "config.json"
    assert metrics.read_json(run / name) is None


@pytest.mark.parametrize("folder", ["runs", "runs/one", "loop"])
def test_link_to_nothing_in_the_place_of_a_run_is_refused(folder, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("/nowhere/at/all", "runs")
    os.symlink("loop", "loop")
    code, _, err = call(train, "--data", home / "corpus", "--save", folder, *SIZES)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a link to nothing" in err


def test_odd_times_in_metrics_do_not_end_a_run_that_resumes(home, tmp_path):
    for i, line in enumerate(('{"seconds": 1e400}', '{"seconds": -1e300}', '{"seconds": [1]}', "[" * 100_000)):
        run = shutil.copytree(home / "train", tmp_path / str(i))
        (run / "metrics.jsonl").write_text(f"{line}\n" * 50)
        code, _, err = call(train, "--resume", "--epochs", 2, "--save", run)
        assert code == 0, err


def test_both_checkpoints_damaged_name_both_and_a_remedy(home, tmp_path):
    run = shutil.copytree(home / "train", tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        (run / name).write_bytes(b"damaged")
    code, _, err = call(train, "--resume", "--epochs", 2, "--save", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged one, and previous.pt is no better; start a new run" in err


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
def test_invalid_config_exits_2_and_changes_no_file(kind, change, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    path = tmp_path / "home" / kind / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + f", {change}}}")
    before = tree(tmp_path)
    code, _, err = call(SCRIPTS[kind], "--resume", "--save", tmp_path / "home" / kind)
    assert code == 2
    assert err.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400", "NaN"])
def test_number_of_config_that_no_float_can_hold_exits_2(value, home, tmp_path):
    run = shutil.copytree(home / "train", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    text = json.dumps({**config, "flags": config["flags"] | {"lr": "LR"}})
    (run / "config.json").write_text(text.replace('"LR"', value))
    code, _, err = call(train, "--resume", "--epochs", 2, "--save", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json is damaged" in err


@pytest.mark.parametrize("kind", SCRIPTS)
def test_config_of_another_version_names_the_flag(kind, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    path = tmp_path / "home" / kind / "config.json"
    config = json.loads(path.read_text())
    fewer = {name: value for name, value in config["flags"].items() if name != "lr"}
    for flags, message in (
        ({**config["flags"], "backoff": 0.5}, "of another version (with 'backoff')"),
        (fewer, "of another version (no lr)"),
    ):
        path.write_text(json.dumps({**config, "flags": flags}))
        code, _, err = call(SCRIPTS[kind], "--resume", "--save", tmp_path / "home" / kind)
        assert code == 2
        assert err.count("\n") == 1
        assert message in err


def test_evaluate_refuses_weights_of_another_dtype(home, tmp_path):
    state = checkpoint.load(home / "train" / "best.pt")
    for dtype in (torch.complex64, torch.float64):
        state["model"] = {name: weight.to(dtype) for name, weight in state["model"].items()}
        (tmp_path / "x.pt").write_bytes(checkpoint.with_checksum({k: v for k, v in state.items() if k != "format"}))
        code, _, err = call(evaluate, tmp_path / "x.pt", "--device", "cpu")
        assert code == 2
        assert err.count("\n") == 1


def test_cell_with_too_many_nodes_is_refused(home, tmp_path):
    cell = tmp_path / "cell.json"
    for nodes in (65, 10**6):
        cell.write_text(json.dumps({"recurrent": [["tanh", 0]] * nodes, "concat": [1]}))
        code, _, err = call(train, "--data", home / "corpus", "--arch", cell, "--save", tmp_path / "run", *SIZES)
        assert code == 2
        assert err.count("\n") == 1


@pytest.mark.parametrize("kind", SCRIPTS)
def test_checkpoint_of_another_run_names_the_flags_that_differ(kind, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    flags = ["--data", home / "corpus", "--save", tmp_path / "wide", *SIZES, "--emsize", 8, "--dropout", 0.5]
    assert call(SCRIPTS[kind], *flags)[0] == 0
    shutil.copy(tmp_path / "wide" / "last.pt", tmp_path / "home" / kind / "last.pt")
    code, _, err = call(SCRIPTS[kind], "--resume", "--save", tmp_path / "home" / kind)
    assert code == 2
    assert "--emsize 6: " in err
    assert "was written with 8" in err
    assert "--dropout 0.75: " in err


@pytest.mark.parametrize("emsize", [10**7, 2**31 - 1])
def test_impossible_model_size_raises_an_out_of_memory_error(emsize, home, tmp_path):
    flags = ("--data", home / "corpus", "--save", tmp_path / "run", *SIZES, "--emsize", emsize)
    with pytest.raises(RuntimeError) as caught:
        train.main([str(flag) for flag in flags])
    assert out_of_memory(caught.value)


@pytest.mark.parametrize(("kind", "flags"), [
    ("train", "--optimizer adam --lr 1e20"), ("train", "--lr 1e20 --bptt 1 --bptt_std 3"),
    ("search", "--arch_lr 1e20 --arch_start 0"),
])  # fmt: skip
def test_largest_rates_end_without_an_error_of_torch(kind, flags, home, tmp_path):
    code, out, err = call(SCRIPTS[kind], "--data", home / "corpus", "--save", tmp_path / "run", *SIZES, *flags.split())
    assert code in (0, 1), out + err


# --- lack of memory and errors of the program ---


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--small_batch_size 2 "),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "4 of the 4 batch elements",
        ),
    ],
)
def test_out_of_memory_names_sizes_and_flags_that_need_less(kind, error, message, home, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(SCRIPTS[kind], "clipped_gradient", fail)
    flags = ["--data", home / "corpus", "--save", tmp_path / "run", *SIZES, "--batch_size", 4]
    monkeypatch.setattr("sys.argv", [kind, *map(str, flags)])
    assert train.signals.run_script(SCRIPTS[kind].main) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert "--emsize 6, --bptt 4 and 4 of the 4 batch elements" in last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "64 of the 64 batch elements at a time on each of 4 ranks; --small_batch_size 32 needs about half"),
        ({"small_batch_size": 16}, "16 of the 64 batch elements at a time on each of 4 ranks; --small_batch_size 8 "),
        ({"arch_batch_size": 4 * 36}, "--small_batch_size 4 needs about half"),
        ({"small_batch_size": 1}, "take a smaller --emsize"),
    ],
)
def test_out_of_memory_on_several_ranks_advises_a_size_that_each_can_have(changes, message):
    flags = {"batch_size": 256, "small_batch_size": 256, "arch_batch_size": 256, "emsize": 8, "bptt": 5, "norm": "none"}
    with pytest.raises(RunError, match=message), memory_explained(Namespace(**(flags | changes)), 4):
        raise torch.OutOfMemoryError("CUDA out of memory")


def run_script(program, stdout):
    """Returns a finished Python process whose output is buffered, as it is by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from experiment.signals import run_script\n{program}"],
        cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise MemoryError", 1, "error: out of memory; take --device cpu, or fewer --samples"),
        ("print('a')", 1, "error: a file: No space left on device"),
    ],
)
def test_end_of_a_script_is_one_line(end, code, line):
    """The output is a full disk."""
    program = f"def main():\n {end}\n return 0\n"
    program += "sys.exit(run_script(main, advice='--device cpu, or fewer --samples'))"
    with open("/dev/full", "w") as full:
        done = run_script(program, full)
    assert (done.returncode, done.stderr) == (code, line + "\n")


@contextmanager
def unread_pipe():
    """Yields a file to write to that nothing reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        yield write
    finally:
        os.close(write)


def test_output_that_nothing_reads_ends_with_141_and_no_line():
    with unread_pipe() as output:
        done = run_script("sys.exit(run_script(lambda: print('a') or 0))", output)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_output_does_not_fail_a_script():
    program = "sys.stdout = sys.stderr = None\nsys.exit(run_script(lambda: print('a') or 0))"
    assert run_script(program, None).returncode == 0


@pytest.mark.parametrize("script", ["train.py", "visualize.py"])
def test_ctrl_c_while_a_script_is_imported_is_one_line(script):
    """The module that is imported first after `experiment` raises the signal."""
    program = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        " def find_spec(self, name, *_):\n"
        "  if name in ('data', 'genotypes'): os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = [{script!r}]\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_picture_whose_path_nothing_reads_is_made_quietly(tmp_path):
    command = [sys.executable, "visualize.py", "cell", "DARTS", "--out", tmp_path / "cell.dot"]
    with unread_pipe() as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "cell.dot").exists()


def test_refused_flags_end_a_script_with_their_exit_code():
    assert train.signals.run_script(lambda: sys.exit(2)) == 2
    assert train.signals.run_script(lambda: sys.exit()) == 0


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ZeroDivisionError(), KeyError("hidden")])
def test_program_error_is_not_reported_as_divergence(kind, error, home, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(SCRIPTS[kind], "clipped_gradient", fail)
    with pytest.raises(type(error)):
        SCRIPTS[kind].main([str(f) for f in ("--data", home / "corpus", "--save", tmp_path / "run", *SIZES)])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
