"""No leak: what a run holds after 20 epochs is what it held after 2."""

import os
import platform
import subprocess
import sys

import pytest
from helpers import ROOT

# The script's own loop, asked at each epoch's end how much is resident.
ASK = """
import sys
from experiment import progress
import {script}

def resident():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1])

close = progress.Progress.close_epoch

def close_and_tell(self, *arguments, **more):
    close(self, *arguments, **more)
    print("resident", resident())

progress.Progress.close_epoch = close_and_tell
sys.exit({script}.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here to ask")
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_search", "--unrolled"),
        ("train_search", "--unrolled --hessian exact"),
        ("train", "--nonmono 5 --dropout 0.3"),
    ],
)
def test_twenty_epochs_need_no_more_memory_than_two(script, flags, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split in ("train", "valid", "test"):
        (corpus / f"{split}.txt").write_text("a b c d e f g h\n" * 24)
    flags += f" --data {corpus} --save {tmp_path / 'run'} --emsize 32 --batch_size 4 --bptt 10 --lr 1 --epochs 20"
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(script=script), *flags.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("resident")]
    assert len(held) == 20
    assert held[-1] <= 1.02 * held[1], held


FAULTS = """
import resource, torch, utils
if {kept}:
    utils.choose_device("cpu")
for _ in range(12):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(megabytes << 18) for megabytes in (64, 48, 96)]
    held.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_what_a_run_frees_it_keeps_for_its_next_step():
    fresh, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], cwd=ROOT, capture_output=True).stdout)
        for kept in (False, True)
    )
    assert 10 * kept < fresh
