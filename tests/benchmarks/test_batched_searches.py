"""benchmarks/batched_searches.py counts the operations of a step, and estimates batched steps from them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, run_compiling

sys.path.insert(0, str(ROOT))
from benchmarks import batched_searches as batched


def test_launches_of_simple_operations():
    a, b, out = torch.empty(3, 4), torch.empty(4, 5), torch.empty(3, 5)
    batched.Launches.recorded.clear()
    with batched.Launches() as launches:
        torch.mm(a, b, out=out)
        a.t()[1:].unbind(0)
        out.add_(1)
    assert launches.recorded == [(2 * 3 * 4 * 5, 4 * (12 + 20 + 15)), (0, 4 * 15)]


SMALL_STEP = """
from benchmarks import batched_searches, step
step.sizes_of = lambda name, small: SIZES
first, unrolled, again = (
    batched_searches.launches_of(name, "fp32", "none") for name in ("search-first", "search-unrolled", "search-first")
)
assert first == again and len(unrolled) > len(first), (len(first), len(unrolled), len(again))
print(sum(each.flop for each in first))
"""


def test_arithmetic_of_a_first_order_step_matches_its_closed_form():
    """Two passes forward and two backward, of which one computes the gradients of the weights. A step after another one
    in the same process has all of its launches."""
    T, B, H, V, N = 3, 4, 32, 64, 2
    done = run_compiling(SMALL_STEP.replace("SIZES", str({"T": T, "B": B, "H": H, "V": V, "N": N})))
    recurrence = 2 * T * B * 2 * H * (2 * H + H * N * (N + 1) // 2)
    decoder = 2 * T * B * H * V
    # The gradient of the embedded input is computed in the pass for the weights alone.
    assert float(done.stdout) == 5 * (recurrence + decoder) - 2 * T * B * H * 2 * H, done.stderr


@pytest.mark.parametrize(("searches", "expected"), [(1, 2e-3 + 1e-3 + 5e-3), (4, 2e-3 + 4e-3 + 20e-3)])
def test_a_launch_takes_the_largest_of_its_three_times(searches, expected):
    args = SimpleNamespace(latency_us=1.0, tflops=1.0, tb_per_s=1.0)
    launches = [batched.Launch(0, 0), batched.Launch(0, 0), batched.Launch(1e6, 10), batched.Launch(10, 5e6)]
    assert batched.milliseconds(launches, searches, args) == pytest.approx(expected)
