"""Tests that a run resumes bit-identically after a SIGKILL at a random moment, another signal or a full disk.

pytest tests/experiment/test_crash.py                 # 1 kill
pytest tests/experiment/test_crash.py --kills 200     # 25 minutes on one core
"""

import os
import random
import signal
import subprocess
import sys
import time
from resource import RLIMIT_FSIZE, setrlimit

import pytest
from helpers import ROOT, SIZES, Kill, finish, kill, outcome, wait_for

import train
import train_search
from experiment import checkpoint
from experiment.run_directory import Run
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
SCRIPTS = {"train.py": train, "train_search.py": train_search}


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


def run_here(name, corpus, save, *more):
    """Runs a script in this process, with the flags that `start` gives it; returns its exit code."""
    script, flags = RUNS[name]
    flags = [*FLAGS, *flags.split(), "--data", corpus, "--save", save, *more]
    return run_script(lambda: SCRIPTS[script].main(list(map(str, flags))))


@pytest.mark.parametrize("name", [pytest.param("unrolled", marks=pytest.mark.slow), "retraining"])
def test_run_with_damaged_last_checkpoint_resumes_from_previous(
    name, uninterrupted, before_step, corpus, tmp_path, capsys
):
    folder = tmp_path / "run"
    before_step(SCRIPTS[RUNS[name][0]], 9, kill)
    with pytest.raises(Kill):
        run_here(name, corpus, folder)
    raw = bytearray((folder / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    # Between the two renamings of a save last.pt and previous.pt are links to one file; only last.pt is damaged here.
    (folder / "last.pt").unlink()
    (folder / "last.pt").write_bytes(raw)
    capsys.readouterr()
    assert run_here(name, corpus, folder, "--resume") == 0
    message = "last.pt: not a checkpoint, or a damaged one; resuming from previous.pt, the checkpoint before it"
    assert capsys.readouterr().err.splitlines()[0].endswith(message)
    assert outcome(folder) == uninterrupted(name)[0]


def test_killed_retraining_has_epochs_before_and_after_the_switch(uninterrupted):
    """The retraining must have both phases, so that kills reach both."""
    expected, _ = uninterrupted("retraining")
    phases = [record["phase"] for record in expected["metrics.jsonl"] if record["kind"] == "epoch"]
    assert phases[:1] == ["sgd"]
    assert phases[-2:] == ["asgd", "asgd"]


@pytest.fixture
def default_sigint_handler():
    """Restores the default handler of SIGINT, because background jobs of a shell and their children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("retraining", signal.SIGTERM),
        ("retraining", signal.SIGUSR1),
        pytest.param("unrolled", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_a_checkpoint_and_exits_130(
    name, number, uninterrupted, before_step, default_sigint_handler, corpus, tmp_path, capsys
):
    folder, handler = tmp_path / "run", signal.getsignal(number)
    before_step(SCRIPTS[RUNS[name][0]], 4, lambda: os.kill(os.getpid(), number))
    assert run_here(name, corpus, folder, "--checkpoint_minutes", 1000) == 130  # Only the signal can cause a save.
    assert f"--resume --save {folder}" in capsys.readouterr().out
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] == 4
    assert signal.getsignal(number) is handler
    assert run_here(name, corpus, folder, "--resume", "--checkpoint_minutes", 0) == 0
    assert outcome(folder) == uninterrupted(name)[0]


def test_second_sigint_raises_keyboard_interrupt(default_sigint_handler):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)  # A repeated SIGUSR1 has no further effect.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_sigint_ends_a_run_within_a_step(
    uninterrupted, before_step, default_sigint_handler, corpus, tmp_path, capsys
):
    """Such a run resumes bit-identically from the checkpoint before that step."""

    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "run"
    before_step(train, 9, interrupt_twice)
    assert run_here("retraining", corpus, folder) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "interrupted" and "resume" not in out
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] == 8
    assert run_here("retraining", corpus, folder, "--resume") == 0
    assert outcome(folder) == uninterrupted("retraining")[0]


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


def test_second_process_on_a_run_exits_2_and_names_the_first_pid(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    first = start("retraining", corpus, folder, "--epochs", 500)
    try:
        wait_for((folder / "metrics.jsonl").exists, first)
        for flags in ((), ("--resume",)):
            assert run_here("retraining", corpus, folder, *flags) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"process {first.pid} on " in line
    finally:
        first.kill()
        first.communicate()
    assert (folder / "lock").exists()  # The lock file of a killed process does not lock the run.
    Run(folder).release()
