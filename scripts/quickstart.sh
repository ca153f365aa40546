#!/usr/bin/env bash
# See it work: search a cell on a text that every Python carries, retrain it, and compare it with five random cells and
# the published one under the same budget, in a table and a picture. Needs no network after the install.
# Another search and other random cells: scripts/quickstart.sh SEED
# Cost: 3 minutes on 2 CPU cores after the install.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-plots.txt

seed=${1:-1}
export OUT=${2:-runs/quickstart-$(date +%Y%m%d-%H%M%S)} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export COMMON="--data builtin --device cpu --emsize 64 --batch_size 32 --seed $seed
  --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0"
mkdir -p "$OUT"

retrain() { # retrain NAME ARCH: its validation perplexity epoch by epoch goes to a file of its own
  # shellcheck disable=SC2086
  .venv/bin/python train.py $COMMON --arch "$2" --epochs 8 --log_interval 60 --save "$OUT/$1" >"$OUT/$1.out" 2>&1 || {
    tail -n 5 "$OUT/$1.out" >&2
    return 1
  }
  echo "== retrained the $1 cell: $(tail -n 1 "$OUT/$1.out")"
}
export -f retrain

cells=(published=DARTS)
for ((i = 1; i <= 5; i++)); do cells+=("random-$i=random:$((5 * seed + i))"); done
retrain_others() { # retrain_others N: the cells that need no search, N at a time
  # shellcheck disable=SC2016
  printf '%s\n' "${cells[@]}" | xargs -P "$1" -I{} bash -c 'retrain "${1%%=*}" "${1#*=}"' _ {}
}

cores=$(.venv/bin/python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
beside=$((cores / OMP_NUM_THREADS - 1)) # processes that have a core for each of their threads, beside the search
if ((beside > 0)); then
  set -m # gives the trainings a process group, so that the trap ends all of it
  retrain_others "$beside" &
  set +m
  trap 'kill -- -$! 2>/dev/null || true' EXIT
fi
echo "== searching in $OUT/search"
# shellcheck disable=SC2086
.venv/bin/python train_search.py $COMMON --epochs 4 --log_interval 30 --save "$OUT/search"
retrain found "$OUT/search"
if ((beside > 0)); then wait $!; else retrain_others 1; fi

.venv/bin/python scripts/summary.py "$OUT"/{found,random-{1..5},published}
echo
.venv/bin/python visualize.py train "$OUT"/{found,random-{1..5},published} --out "$OUT/cells.svg"
.venv/bin/python visualize.py report "$OUT/search" # what the search saw, for a browser
