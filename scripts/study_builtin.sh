#!/usr/bin/env bash
# A whole study in small, on the text that every Python carries: two methods and two seeds each, two random cells, two
# baselines, proxies, selection, retraining, leaderboard. It shows the workflow; so little text ranks no cells.
# Extra flags are passed on: scripts/study_builtin.sh --dry_run; to resume: scripts/study_builtin.sh --resume --study DIR
# Cost: 8 minutes on 2 CPU cores after the install.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-cluster.txt
# the fused engine would compile for longer than it saves here
sizes="--emsize 64 --batch_size 32 --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0"
sizes+=" --engine eager --log_interval 60 --device cpu"
exec .venv/bin/python trials.py run --data builtin --train_flags "$sizes" --search_flags "$sizes" \
  --baselines DARTS LSTM --full_epochs 10 \
  --proxy_cells DARTS_V1 DARTS_V2 ENAS random:1000 --proxy_epochs 1 2 --proxy_reference 4 --proxy_seeds 2 \
  --methods first unrolled random --seeds 2 --random_cells 2 --search_epochs 3 \
  --select_epochs 5 --top 2 "$@"
