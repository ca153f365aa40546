"""Tests that a run needs no more memory after 20 epochs than after 2, and that malloc reuses freed memory."""

import os
import platform
import subprocess
import sys

import pytest
from helpers import ROOT

# This program runs a script and prints its resident memory at the end of each epoch.
PROGRAM = """
import sys
from experiment import progress
import {script}

def resident():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1])

close = progress.Progress.close_epoch

def close_and_print(self, *arguments, **more):
    close(self, *arguments, **more)
    print("resident", resident())

progress.Progress.close_epoch = close_and_print
sys.exit({script}.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status")
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        pytest.param("train_search", "--unrolled", marks=pytest.mark.slow),
        pytest.param("train_search", "--unrolled --hessian exact", marks=pytest.mark.slow),
        ("train", "--nonmono 5 --dropout 0.3"),
    ],
)
def test_memory_after_20_epochs_is_that_after_2(script, flags, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "valid", "test"):
        (corpus / f"{split}.txt").write_text("a b c d e f g h\n" * 24)
    flags += f" --data {corpus} --save {tmp_path / 'run'} --emsize 32 --batch_size 4 --bptt 10 --lr 1 --epochs 20"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(script=script), *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    resident = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("resident")]
    assert len(resident) == 20
    assert resident[-1] <= 1.02 * resident[1], resident


# This program prints the page faults of the last of some rounds of allocations of the same sizes, before a device is
# chosen and after.
PAGE_FAULTS = """
import resource, torch, utils

def last_round():
    for _ in range(12):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(megabytes << 18) for megabytes in (64, 48, 96)]
        tensors.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

print(last_round())
utils.choose_device("cpu")
print(last_round())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="malloc may not be glibc's")
def test_freed_memory_is_reused_by_the_next_step():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True)
    default, configured = map(int, done.stdout.split())
    assert 10 * configured < default
