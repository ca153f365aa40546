#!/usr/bin/env bash
# The tests that are too long for every commit: agreement of the finite and the exact product on Penn Treebank.
# Cost: about 25 minutes on 2 cores. Penn Treebank must lie in corpora/penn.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-dev.txt
.venv/bin/python -m pytest -m slow "$@"
