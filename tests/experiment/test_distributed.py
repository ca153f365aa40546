"""Tests that several ranks give the gradients of one process with as many micro-batches, and resume bit-identically."""

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
from experiment import checkpoint
from engine.reference import NORMS
from experiment.distributed import Distributed
from experiment.validate_arguments import rank_faults

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FLAGS = [*SIZES, "--checkpoint_minutes", "0"]
RUNS = {
    "search": ("train_search.py", "--lr 1 --epochs 1 --unrolled --diagnose_every 8 --arch_batch_size 8"),
    "retraining": ("train.py", "--arch DARTS_V1 --lr 20 --epochs 5 --nonmono 1 --dropoute 0.2 --engine fused"),
}


def torchrun(*command):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """The gradients on two ranks, by norm and name."""
    path = tmp_path_factory.mktemp("gradients") / "two.pt"
    finish(torchrun("tests/gradients.py", path, B // 2))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_match_the_gradients_of_two_micro_batches(norm, of_two_ranks):
    """The test compares the gradients of the weights and of the alphas (first and second order) on both engines in
    float64; those by central differences must agree to a millionth. Without batch normalisation they must also equal
    the gradients of one process with the whole batch."""
    two = of_two_ranks[norm]
    parts, whole = (gradients(Distributed(), micro_batch_size, norm) for micro_batch_size in (B // 2, B))
    for one in (parts,) if norm == "batch" else (parts, whole):
        assert two.keys() == one.keys()
        for name, value in one.items():
            tolerance = 1e-6 if name.endswith("finite") else 1e-10
            assert value.norm() > 1e-4, name
            assert (two[name] - value).norm() <= tolerance * value.norm(), name
    first, finite, exact = (parts[f"eager, alphas, {hessian}"] for hessian in (None, "finite", "exact"))
    # The three gradients of the alphas differ, and batch normalisation depends on the micro-batch, so that the
    # comparisons above are not vacuous.
    assert (finite - first).norm() > 1e-2 * first.norm()
    assert (finite - exact).norm() < 1e-2 * (finite - first).norm()
    if norm == "batch":
        assert (whole["eager, alphas, None"] - first).norm() > 1e-2 * first.norm()


def start_run(name, corpus, save, *more):
    script, flags = RUNS[name]
    return torchrun(script, *FLAGS, *flags.split(), "--data", corpus, "--save", save, *more)


def workers(process):
    """Returns the ids of the worker processes of a torchrun process."""
    pids = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in pids.split()]


@pytest.mark.parametrize("name", ["search", pytest.param("retraining", marks=pytest.mark.slow)])
def test_killed_and_resumed_ranks_are_bit_identical(name, corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    finish(start_run(name, corpus, whole))
    expected = outcome(whole)
    moment = random.Random(name).randrange(1, len(expected["metrics.jsonl"]) // 2)

    process = start_run(name, corpus, folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(read_records(folder)) >= moment, process)
    if name == "search":
        os.kill(workers(process)[-1], signal.SIGKILL)  # torchrun then ends the other worker
    else:
        process.terminate()  # torchrun forwards the signal, and both workers end after the same step
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("interrupted; continue with") == (name == "retraining")
    assert not (folder / "result.json").exists()

    finish(start_run(name, corpus, folder, "--resume"))
    resumed = outcome(folder)
    assert resumed.keys() == expected.keys()
    assert [key for key in expected if resumed[key] != expected[key]] == []
    if name == "retraining":
        assert [record["phase"] for record in read_records(whole, "epoch")][-1] == "asgd"  # the run had both phases


def test_one_process_refuses_to_resume_a_run_of_two_ranks(corpus, tmp_path, capsys):
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


def test_batch_size_not_divisible_by_ranks_is_reported_once(corpus, tmp_path):
    process = torchrun("train.py", *FLAGS, "--data", corpus, "--save", tmp_path / "run", "--batch_size", 5)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out.count("--batch_size 5: must divide evenly among 2 ranks") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_rank_faults_reports_flags_that_do_not_fit_the_ranks(changes, message):
    flags = {"batch_size": 16, "small_batch_size": 16, "overfit": False, "device": "cpu", **changes}
    errors = rank_faults(Namespace(**flags), 4, 4)
    assert errors == [] if message is None else len(errors) == 1 and errors[0].startswith(message)
    assert rank_faults(Namespace(**flags), 1, 1) == []


def test_collectives_of_a_single_process_are_identities():
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


def test_each_rank_samples_masks_of_its_own_and_the_main_one_those_of_a_single_process():
    ranks, samples = Distributed(), []
    for ranks.rank in range(3):
        torch.manual_seed(3)
        ranks.seed(3)
        samples.append(tuple(torch.rand(4).tolist()))
    torch.manual_seed(3)
    assert samples[0] == tuple(torch.rand(4).tolist()) and len(set(samples)) == 3
