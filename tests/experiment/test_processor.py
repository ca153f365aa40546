"""A run says that it shares its cores, and how many threads to use there, or that its processor is slow in bf16."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import SIZES, read_records, without_timings

import train
from experiment import processor, validate_arguments
from engine import PRECISIONS

STAT = """\
cpu  300 40 50 900 60 0 7 0 0 0
cpu0 100 20 30 400 30 1 2 3 5 6
cpu1 200 20 20 500 30 0 5 0 0 0
cpu10 9 9 9 9 9 9 9 9 9 9
intr 5 4
"""
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("fast", [True, False])
def test_only_bf16_on_a_cpu_without_products_of_it_is_replaced(monkeypatch, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for precision in PRECISIONS:
        assert processor.usable_precision(precision, CUDA) == precision
        expected = "fp32" if precision == "tf32" or (precision == "bf16" and not fast) else precision
        assert processor.usable_precision(precision, CPU) == expected


def test_run_in_tf32_that_began_on_cuda_resumes_on_a_cpu(corpus, tmp_path, monkeypatch, capsys):
    flags = [*SIZES, "--arch", "LSTM", "--data", str(corpus), "--save", str(tmp_path / "run"), "--epochs"]
    with monkeypatch.context() as patch:  # stands for the machine with CUDA
        patch.setattr(validate_arguments, "precision_faults", lambda args: [])
        assert train.main([*flags, "1", "--precision", "tf32"]) == 0
    with pytest.raises(SystemExit):
        train.main([*flags[:-2], str(tmp_path / "new"), "--epochs", "1", "--precision", "tf32"])
    assert "--precision tf32: is for CUDA" in capsys.readouterr().err
    assert train.main(["--resume", "--save", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert "note: --precision tf32: computed in fp32" in capsys.readouterr().out


def test_notes_of_several_ranks_on_cuda_mention_missing_graphs():
    assert processor.notes("fp32", CUDA, ranks=1) == []
    [line] = processor.notes("fp32", CUDA, ranks=2)
    assert "without CUDA graphs" in line and processor.notes("fp32", CUDA) == []


def test_without_onednn_no_cpu_has_fast_products_in_bf16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert processor.usable_precision("bf16", CPU) == "fp32"


def test_run_in_bf16_without_fast_products_of_it_equals_one_in_fp32_and_says_so(corpus, tmp_path, monkeypatch):
    """The decoder alone would be rounded at these sizes; with fast products it is, and the run differs."""
    runs = {}
    for name, precision, fast in (("fp32", "fp32", False), ("replaced", "bf16", False), ("rounded", "bf16", True)):
        monkeypatch.setattr(processor, "has_fast_bf16", lambda device, fast=fast: fast)
        flags = ["--arch", "DARTS", "--epochs", "1", "--data", str(corpus), "--precision", precision]
        flags += ["--engine", "fused"]
        assert train.main([*SIZES, *flags, "--save", str(tmp_path / name)]) == 0
        runs[name] = list(map(without_timings, read_records(tmp_path / name)))
        said = "--precision bf16: computed in fp32" in (tmp_path / name / "log.txt").read_text()
        assert said == (name == "replaced")
    assert runs["fp32"] == runs["replaced"] != runs["rounded"]


def test_busy_ticks_are_those_of_the_given_cores_without_idle_and_nice_ones():
    assert processor.busy_ticks(STAT, {0}) == 100 + 30 + 1 + 2 + 3
    assert processor.busy_ticks(STAT, {0, 1}) == 136 + 200 + 20 + 5
    assert processor.busy_ticks(STAT, {7}) == 0


@pytest.mark.skipif(not processor.STAT.exists(), reason="this system does not say how busy its cores are")
@pytest.mark.skipif(os.nice(0) > 0, reason="the other process would be nice as well, and such ones are not counted")
def test_cores_taken_counts_other_processes_and_not_this_one():
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.read(1)
            assert 0.5 < processor.cores_taken({core}, seconds=0.5) < 1.2
        finally:
            other.kill()


def test_cores_taken_is_none_where_the_system_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "STAT", tmp_path / "missing")
    assert processor.cores_taken({0}, seconds=0) is None
    assert processor.sharing_note(CPU) == []


@pytest.fixture
def two_threads_on_two_cores(monkeypatch, tmp_path):
    (tmp_path / "stat").write_text(STAT)
    monkeypatch.setattr(processor, "STAT", tmp_path / "stat")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.usefixtures("two_threads_on_two_cores")
@pytest.mark.parametrize(("taken", "device", "noted"), [
    (1.0, CPU, True), (2.0, CPU, True), (0.6, CPU, True), (0.4, CPU, False), (0.0, CPU, False), (None, CPU, False),
    (2.0, CUDA, False),
])  # fmt: skip
def test_note_names_the_threads_to_use_where_too_few_cores_are_free(monkeypatch, taken, device, noted):
    monkeypatch.setattr(processor, "cores_taken", lambda cores: taken)
    lines = processor.sharing_note(device)
    assert len(lines) == noted
    if noted:
        assert f"keep {taken:.1f} of the 2 CPU cores busy" in lines[0]
        assert "OMP_NUM_THREADS=1" in lines[0]


@pytest.mark.usefixtures("two_threads_on_two_cores")
def test_no_note_where_the_user_has_chosen_the_threads_or_there_is_one(monkeypatch):
    monkeypatch.setattr(processor, "cores_taken", lambda cores: 2.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert processor.sharing_note(CPU) == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert processor.sharing_note(CPU) == []


@pytest.mark.usefixtures("two_threads_on_two_cores")
def test_run_beside_a_busy_process_logs_the_note(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processor, "cores_taken", lambda cores: 1.0)
    flags = [*SIZES, "--arch", "DARTS", "--epochs", "1", "--data", str(corpus), "--save", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert "keep 1.0 of the 2 CPU cores busy; 2 threads" in capsys.readouterr().out
    assert "keep 1.0 of the 2 CPU cores busy; 2 threads" in (tmp_path / "run" / "log.txt").read_text()
