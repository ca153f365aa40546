#!/usr/bin/env bash
# Lint and tests, in an environment of their own (.venv), as continuous integration runs them.
# Cost: 6 minutes on 2 cores, and a minute for the install. Arguments go to pytest: scripts/test.sh -k data
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a worker for each core, and a core for each worker: small tensors gain nothing from a second one; files in their order,
# since by default those with the fewest tests, which are the longest ones, run last and alone
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder "$@"
