"""Tests that a run resumes bit-identically after a SIGKILL at a random moment, another signal or a full disk.

pytest tests/experiment/test_crash.py                 # 1 kill
pytest tests/experiment/test_crash.py --kills 200     # an hour on one core
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from resource import RLIMIT_FSIZE, setrlimit

import pytest
from helpers import ROOT, SIZES, finish, outcome, wait_for

import train
from experiment import checkpoint
from experiment.signals import StopSignal, run_script

# The runs save a checkpoint at every step, so that most kills interrupt the saving of one.
FLAGS = [*SIZES, "--checkpoint_minutes", "0"]
RUNS = {
    "first order": ("train_search.py", "--lr 1 --epochs 3"),
    "unrolled": ("train_search.py", "--lr 1 --epochs 2 --arch_start 1 --unrolled --diagnose_every 4 --engine fused"),
    "retraining": ("train.py", "--arch DARTS_V1 --lr 20 --epochs 8 --nonmono 1 --alpha 0.1 --engine fused"),
    "strategies": (
        "train.py",
        "--arch LSTM --optimizer adam --warmup 9 --schedule cosine --rdrop 0.5 --n_experts 2 --small_batch_size 2"
        " --epochs 4",
    ),
}


def start(name, corpus, save, *more, **kwargs):
    script, flags = RUNS[name]
    flags = [*FLAGS, *flags.split(), "--data", corpus, "--save", save, *more]
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """A function that gives, by the name of a run, its outcome without interruption and the seconds from its first
    checkpoint to its end. It starts each run once, at first use."""
    cache = {}

    def get(name):
        if name not in cache:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            process = start(name, corpus, folder)
            wait_for((folder / "last.pt").exists, process)
            clock = time.monotonic()
            finish(process)
            cache[name] = outcome(folder), time.monotonic() - clock
        return cache[name]

    return get


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def test_killed_and_resumed_run_is_bit_identical(kill, uninterrupted, corpus, tmp_path):
    name = list(RUNS)[kill % len(RUNS)]
    expected, seconds = uninterrupted(name)
    rng, code = random.Random(kill), 0
    while code == 0:  # The run ended before the kill: it is started again, and killed sooner.
        folder = tmp_path / str(seconds)
        process, seconds = start(name, corpus, folder), rng.uniform(0, seconds)
        wait_for((folder / "last.pt").exists, process)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        code = process.returncode
    assert code == -signal.SIGKILL
    finish(start(name, corpus, folder, "--resume"))
    resumed = outcome(folder)
    assert resumed.keys() == expected.keys()
    assert [key for key in expected if resumed[key] != expected[key]] == []


@pytest.mark.parametrize("name", [pytest.param("unrolled", marks=pytest.mark.slow), "retraining"])
def test_run_with_damaged_last_checkpoint_resumes_from_previous(name, uninterrupted, corpus, tmp_path):
    folder = tmp_path / "run"
    process = start(name, corpus, folder)
    wait_for((folder / "previous.pt").exists, process)
    process.kill()
    process.communicate()
    raw = bytearray((folder / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    # Between the two renamings of a save last.pt and previous.pt are links to one file; only last.pt is damaged here.
    (folder / "last.pt").unlink()
    (folder / "last.pt").write_bytes(raw)
    out = finish(start(name, corpus, folder, "--resume"))
    message = "last.pt: not a checkpoint, or a damaged one; resuming from previous.pt, the checkpoint before it"
    assert out.splitlines()[0].endswith(message)
    assert outcome(folder) == uninterrupted(name)[0]


def test_killed_retraining_has_epochs_before_and_after_the_switch(uninterrupted):
    """The retraining must have both phases, so that kills reach both."""
    expected, _ = uninterrupted("retraining")
    phases = [record["phase"] for record in expected["metrics.jsonl"] if record["kind"] == "epoch"]
    assert phases[:1] == ["sgd"]
    assert phases[-2:] == ["asgd", "asgd"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("retraining", signal.SIGTERM),
        pytest.param("retraining", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("unrolled", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_a_checkpoint_and_exits_130(name, number, uninterrupted, corpus, tmp_path):
    folder = tmp_path / "run"
    process = start(name, corpus, folder, "--checkpoint_minutes", 1000)  # Only the signal can cause a save.
    wait_for((folder / "metrics.jsonl").exists, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert f"--resume --save {folder}" in out
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] >= 3  # The first record of metrics has step 3.
    finish(start(name, corpus, folder, "--resume"))
    assert outcome(folder) == uninterrupted(name)[0]


@pytest.fixture
def default_sigint_handler():
    """Restores the default handler of SIGINT, because background jobs of a shell and their children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_sigint_raises_keyboard_interrupt(default_sigint_handler):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)  # A repeated SIGUSR1 has no further effect.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_sigint_ends_a_run_within_a_step(default_sigint_handler, corpus, tmp_path, monkeypatch, capsys):
    """Such a run resumes bit-identically from the checkpoint before that step."""
    flags = [*FLAGS, *"--arch DARTS_V1 --lr 1 --epochs 2".split(), "--data", str(corpus)]
    assert train.main([*flags, "--save", str(tmp_path / "whole")]) == 0
    clipped_gradient, steps = train.clipped_gradient, itertools.count(1)

    def interrupted(*arguments):
        if next(steps) == 9:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return clipped_gradient(*arguments)

    monkeypatch.setattr(train, "clipped_gradient", interrupted)
    again = ["--save", str(tmp_path / "run")]
    assert run_script(lambda: train.main([*flags, *again])) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "interrupted" and "resume" not in out
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["step"] == 8
    assert train.main(["--resume", *again]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("retraining", 2_500),
        pytest.param("retraining", 15_000, marks=pytest.mark.slow),
        pytest.param("unrolled", 12_000, marks=pytest.mark.slow),
    ],
)
def test_run_on_a_full_disk_exits_1_and_resumes_bit_identically(name, limit, uninterrupted, corpus, tmp_path):
    """A limit on the size of files (RLIMIT_FSIZE) stands for a full disk; the log, the metrics or a checkpoint reaches
    it."""
    folder = tmp_path / "run"
    process = start(name, corpus, folder, preexec_fn=lambda: setrlimit(RLIMIT_FSIZE, (limit, limit)))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert "Traceback" not in out
    assert out.splitlines()[-1].startswith(f"error: {folder}/")
    if (folder / "last.pt").exists():
        checkpoint.load(folder / "last.pt")
    finish(start(name, corpus, folder, "--resume"))
    assert outcome(folder) == uninterrupted(name)[0]


def test_second_process_on_a_run_exits_2_and_names_the_first_pid(corpus, tmp_path):
    folder = tmp_path / "run"
    first = start("unrolled", corpus, folder, "--epochs", 500)
    wait_for((folder / "metrics.jsonl").exists, first)
    for flags in ((), ("--resume",)):
        second = start("unrolled", corpus, folder, *flags)
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert out.count("\n") == 1
        assert f"process {first.pid} on " in out
    first.kill()
    first.communicate()
    assert (folder / "lock").exists()  # The lock file of a killed process does not lock the run.
    third = start("unrolled", corpus, folder, "--resume", "--epochs", 500)
    wait_for_line(third, "resumed at")
    third.kill()
    third.communicate()


@pytest.mark.parametrize("name", ["first order", pytest.param("unrolled", marks=pytest.mark.slow)])
def test_deterministic_flag_changes_nothing_on_a_cpu(name, uninterrupted, corpus, tmp_path):
    finish(start(name, corpus, tmp_path / "run", "--deterministic"))
    deterministic, expected = outcome(tmp_path / "run"), uninterrupted(name)[0]
    for name in ("result.json", "metrics.jsonl", "genotype.json"):  # Checkpoints differ because they contain the flags.
        assert deterministic[name] == expected[name]


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no line of the output contains {text!r}")
