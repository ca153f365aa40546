"""Several processes take the step that one would take with as many small batches, and are killed and go on together."""

import os
import random
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from gradients import B, gradients
from helpers import ROOT, SIZES, finish, outcome, read_records, wait_for

import train
from engine.reference import NORMS
from experiment import checkpoint
from experiment.distributed import Distributed
from experiment.validate_arguments import rank_faults

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FLAGS = [*SIZES, "--checkpoint_minutes", "0"]
RUNS = {
    "search": ("train_search.py", "--lr 1 --epochs 1 --unrolled --diagnose_every 8 --arch_batch_size 8"),
    "retraining": ("train.py", "--arch DARTS_V1 --lr 20 --epochs 5 --nonmono 1 --dropoute 0.2"),
}


def start(*command):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_have_the_gradients_of_two_small_batches(norm, tmp_path):
    """Of weights and alphas, in every order, on both engines, in float64; a central difference to a millionth. Without
    batch normalisation they are those of one process with the whole batch, too."""
    finish(start("tests/gradients.py", tmp_path / "two.pt", B // 2, norm))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    parts, whole = (gradients(Distributed(), rows, norm) for rows in (B // 2, B))
    for one in (parts,) if norm == "batch" else (parts, whole):
        assert two.keys() == one.keys()
        for name, value in one.items():
            tolerance = 1e-6 if name.endswith("finite") else 1e-10
            assert value.norm() > 1e-4, name
            assert (two[name] - value).norm() <= tolerance * value.norm(), name
    first, finite, exact = (parts[f"eager, alphas, {hessian}"] for hessian in (None, "finite", "exact"))
    # else the above would compare the same thing three times, and batch normalisation not depend on the rows at hand
    assert (finite - first).norm() > 1e-2 * first.norm()
    assert (finite - exact).norm() < 1e-2 * (finite - first).norm()
    if norm == "batch":
        assert (whole["eager, alphas, None"] - first).norm() > 1e-2 * first.norm()


def begin(name, corpus, save, *more):
    script, flags = RUNS[name]
    return start(script, *FLAGS, *flags.split(), "--data", corpus, "--save", save, *more)


def workers(process):
    """The processes that a torchrun started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_that_are_killed_end_as_if_they_had_not_been(name, corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(begin(name, corpus, whole))
    expected = outcome(whole)
    moment = random.Random(name).randrange(1, len(expected["metrics.jsonl"]) // 2)

    process = begin(name, corpus, folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(read_records(folder)) >= moment, process)
    if name == "search":
        os.kill(workers(process)[-1], signal.SIGKILL)  # and torchrun ends the other one
    else:
        process.terminate()  # which it hands on: both end after the same step
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("interrupted; continue with") == (name == "retraining")
    assert not (folder / "result.json").exists()

    finish(begin(name, corpus, folder, "--resume"))
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    if name == "retraining":
        assert [row["phase"] for row in read_records(whole, "epoch")][-1] == "asgd"  # both phases were there


def test_a_run_of_two_ranks_is_not_continued_by_one(corpus, tmp_path, capsys):
    """And the other way round; the line says how."""
    flags = [*FLAGS, "--arch", "DARTS_V1", "--data", str(corpus), "--save", str(tmp_path / "run")]
    assert train.main([*flags, "--epochs", "1"]) == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save({key: value for key, value in state.items() if key != "format"} | {"ranks": 2},
                    tmp_path / "run" / "last.pt")  # fmt: skip
    with pytest.raises(SystemExit) as end:
        train.main(["--resume", "--save", str(tmp_path / "run"), "--epochs", "2"])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("is one of 2 ranks, not 1; start it with torchrun and 2 processes in all")


def test_flags_that_ranks_cannot_share_are_refused_once(corpus, tmp_path):
    process = start("train.py", *FLAGS, "--data", corpus, "--save", tmp_path / "run", "--batch_size", 5)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("--batch_size 5: must divide evenly among 2 ranks") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"batch_size": 9}, "--batch_size 9: must divide evenly among 4 ranks"),
        ({"batch_size": 2}, "--batch_size 2: must divide evenly among 4 ranks"),
        ({"small_batch_size": 2}, None),
        ({"small_batch_size": 3}, "--small_batch_size 3: must divide the 4 batch elements of each of 4 ranks"),
        ({"batch_size": 4, "norm": "layer"}, None),
        (
            {"batch_size": 4, "norm": "batch"},
            "--batch_size 4: --norm batch normalises over the batch and needs at least 2 elements on each of 4 ranks",
        ),
        ({"arch_batch_size": 32}, None),
        (
            {"arch_batch_size": 24},
            "--arch_batch_size 24: must divide evenly among 4 ranks, into multiples of",
        ),
        ({"arch_batch_size": 18}, "--arch_batch_size 18: must divide evenly among 4 ranks"),
        ({"overfit": True}, "--overfit: is for one process"),
        ({"device": "cuda:1"}, "--device cuda:1: each rank takes a GPU of its own"),
    ],
)
def test_what_ranks_cannot_share(given, said):
    flags = {"batch_size": 16, "small_batch_size": 16, "overfit": False, "device": "cpu", **given}
    faults = rank_faults(Namespace(**flags), 4, 4)
    assert faults == [] if said is None else len(faults) == 1 and faults[0].startswith(said)
    assert rank_faults(Namespace(**flags), 1, 1) == []


def test_one_process_is_all_ranks():
    alone, tensor = Distributed(), torch.arange(6.0).view(2, 3)
    before = tensor.clone()
    alone.all_reduce_mean([tensor])
    assert torch.equal(tensor, before)
    assert alone.shard(tensor, dim=1) is tensor
    assert alone.all_gather(tensor) is tensor
    assert (
        alone.all_reduce_any(True, False),
        alone.gather(7),
        alone.broadcast_from_main(lambda: 8),
        alone.is_main,
    ) == (
        [True, False],
        [7],
        8,
        True,
    )
