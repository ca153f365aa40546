"""Kill -9 at any moment, go on, and the run ends as if nothing had happened: bytes are compared.

pytest tests/experiment/test_crash.py                 # 8 kills
pytest tests/experiment/test_crash.py --kills 200     # an hour on one core
"""

import os
import random
import signal
import subprocess
import sys
import time
from resource import RLIMIT_FSIZE, setrlimit

import pytest
from helpers import ROOT, SIZES, finish, outcome, wait_for

from experiment import checkpoint
from experiment.signals import StopSignal

# A checkpoint at every step, so that most kills fall into the writing of one.
FLAGS = [*SIZES, "--checkpoint_minutes", "0"]
RUNS = {
    "first order": ("train_search.py", "--lr 1 --epochs 3"),
    "unrolled": ("train_search.py", "--lr 1 --epochs 2 --arch_start 1 --unrolled --diagnose_every 4"),
    "retraining": ("train.py", "--arch DARTS_V1 --lr 20 --epochs 8 --nonmono 1 --alpha 0.1"),
    "strategies": (
        "train.py",
        "--arch LSTM --optimizer adam --warmup 9 --schedule cosine --rdrop 0.5 --n_experts 2 --small_batch_size 2"
        " --epochs 4",
    ),
}


def begin(name, corpus, save, *more, **how):
    script, flags = RUNS[name]
    flags = [*FLAGS, *flags.split(), "--data", corpus, "--save", save, *more]
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """By name of a run: what it leaves when nobody disturbs it, and the seconds from its first checkpoint to its end.
    Made at first use."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            process = begin(name, corpus, folder)
            wait_for((folder / "last.pt").exists, process)
            clock = time.monotonic()
            finish(process)
            made[name] = outcome(folder), time.monotonic() - clock
        return made[name]

    return get


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(kill, whole, corpus, tmp_path):
    name = list(RUNS)[kill % len(RUNS)]
    expected, seconds = whole(name)
    rng, folder = random.Random(kill), tmp_path / "run"
    process = begin(name, corpus, folder)
    try:
        wait_for((folder / "last.pt").exists, process)
        process.wait(timeout=rng.uniform(0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    finish(begin(name, corpus, folder, "--resume"))
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


@pytest.mark.parametrize("name", ["unrolled", "retraining"])
def test_a_damaged_last_checkpoint_costs_no_more_than_the_way_from_the_one_before(name, whole, corpus, tmp_path):
    folder = tmp_path / "run"
    process = begin(name, corpus, folder)
    wait_for((folder / "previous.pt").exists, process)
    process.kill()
    process.communicate()
    raw = bytearray((folder / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    (folder / "last.pt").unlink()  # it may be previous.pt too, in the moment between two renamings
    (folder / "last.pt").write_bytes(raw)
    out = finish(begin(name, corpus, folder, "--resume"))
    says = "last.pt: not a checkpoint, or a damaged one; going on from previous.pt, the one before it"
    assert out.splitlines()[0].endswith(says)
    assert outcome(folder) == whole(name)[0]


def test_the_retraining_that_is_killed_averages_from_its_middle_on(whole):
    """Else the kills would miss a phase."""
    expected, _ = whole("retraining")
    phases = [row["phase"] for row in expected["metrics.jsonl"] if row["kind"] == "epoch"]
    assert phases[:1] == ["sgd"]
    assert phases[-2:] == ["asgd", "asgd"]


@pytest.mark.parametrize(
    ("name", "number"),
    [("retraining", signal.SIGTERM), ("retraining", signal.SIGINT), ("unrolled", signal.SIGUSR1)],
)
def test_a_signal_ends_a_run_after_its_step(name, number, whole, corpus, tmp_path):
    folder = tmp_path / "run"
    process = begin(name, corpus, folder, "--checkpoint_minutes", 1000)  # so that the signal alone saves
    wait_for((folder / "metrics.jsonl").exists, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert f"--resume --save {folder}" in out
    assert checkpoint.load(folder / "last.pt")["progress"]["step"] >= 3  # the step of the first row of metrics
    finish(begin(name, corpus, folder, "--resume"))
    assert outcome(folder) == whole(name)[0]


@pytest.fixture
def obeys_ctrl_c():
    """Which a shell's background job, and what it starts, does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_is_not_held_back(obeys_ctrl_c):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)  # a warning that is repeated
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once_and_does_no_harm(whole, corpus, tmp_path):
    folder = tmp_path / "run"
    process = begin("retraining", corpus, folder)
    wait_for((folder / "metrics.jsonl").exists, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    finish(begin("retraining", corpus, folder, "--resume"))
    assert outcome(folder) == whole("retraining")[0]


@pytest.mark.parametrize(("name", "limit"), [("retraining", 2_500), ("retraining", 15_000), ("unrolled", 12_000)])
def test_a_disk_that_takes_no_more_ends_a_run_that_goes_on_later(name, limit, whole, corpus, tmp_path):
    """The system's limit on the size of a file stands for a full disk: a log, metrics or a checkpoint meets it."""
    folder = tmp_path / "run"
    full = begin(name, corpus, folder, preexec_fn=lambda: setrlimit(RLIMIT_FSIZE, (limit, limit)))
    out, _ = full.communicate(timeout=60)
    assert full.returncode == 1, out
    assert "Traceback" not in out
    assert out.splitlines()[-1].startswith(f"error: {folder}/")
    if (folder / "last.pt").exists():
        checkpoint.load(folder / "last.pt")
    finish(begin(name, corpus, folder, "--resume"))
    assert outcome(folder) == whole(name)[0]


def test_a_second_process_is_refused_with_the_first_one_s_number(corpus, tmp_path):
    folder = tmp_path / "run"
    first = begin("unrolled", corpus, folder, "--epochs", 500)
    wait_for((folder / "metrics.jsonl").exists, first)
    for flags in ((), ("--resume",)):
        second = begin("unrolled", corpus, folder, *flags)
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert out.count("\n") == 1
        assert f"process {first.pid} on " in out
    first.kill()
    first.communicate()
    assert (folder / "lock").exists()  # what a killed process leaves binds nobody
    third = begin("unrolled", corpus, folder, "--resume", "--epochs", 500)
    wait_for_line(third, "resumed at")
    third.kill()
    third.communicate()


def test_a_deterministic_run_is_the_same_run_on_a_cpu(whole, corpus, tmp_path):
    finish(begin("unrolled", corpus, tmp_path / "run", "--deterministic"))
    found, expected = outcome(tmp_path / "run"), whole("unrolled")[0]
    for name in ("result.json", "metrics.jsonl", "genotype.json"):  # a checkpoint tells the flags apart
        assert found[name] == expected[name]


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come")
