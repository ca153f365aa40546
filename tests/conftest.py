"""Settings of every test."""

import os

# The kernels of the fused engine are compiled by tests of them alone (test_kernels.py), which ask for it: elsewhere
# the same functions run as they stand, so that no test waits for a compiler.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=8, help="how many runs test_crash.py kills")
