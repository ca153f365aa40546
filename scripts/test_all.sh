#!/usr/bin/env bash
# Every test, with those that are too long for every commit: kills and fuzzing at full length, compiled variants, Ray, the
# browser, and on Penn Treebank the agreement of the finite and the exact product (skipped unless it is in corpora/penn).
# Cost: about an hour on 2 cores. Arguments go to pytest: scripts/test_all.sh -k crash
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
FULL_TESTS=1 exec bash scripts/test.sh -m "slow or not slow" "$@"
