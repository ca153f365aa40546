#!/usr/bin/env bash
# Lint and tests, in an environment of their own (.venv), as continuous integration runs them.
# Cost: about 14 minutes on 2 cores after the install. Arguments go to pytest: scripts/test.sh -k data
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -m "not slow" "$@"
