"""The Triton code that Inductor writes from each kernel for an H100 computes what the kernel's function computes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from engine import cell_kernels, linear_cross_entropy, matmul, reference, second_derivative

pytest.importorskip("triton", reason="Triton is not installed")
SOME = ["layer:bf16", "batch:fp32", "none:fp32"]  # each norm and either precision
ALL = [f"{norm}:{precision}" for norm in reference.NORMS for precision in ("fp32", "bf16")]
MODULES = cell_kernels, second_derivative, linear_cross_entropy, matmul
KERNELS = {name for module in MODULES for name, value in vars(module).items() if hasattr(value, "compiled")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, the kernels run on it")
@pytest.mark.parametrize("pairs", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_triton_code_of_every_kernel_matches_its_function(pairs):
    """Results in fp32 differ by a few rounding errors, those in bf16 by one; no kernel has more than three launches."""
    done = subprocess.run(
        [sys.executable, "tests/engine/interpreted_triton.py", *pairs], cwd=ROOT, capture_output=True, text=True,
        timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": "tests:.", "TORCH_COMPILE_DISABLE": "0", "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == KERNELS
    for line in lines:
        assert line["float32"] < 16, line
        assert line["bfloat16"] <= 1, line
        assert line["launches"] <= 3, line
