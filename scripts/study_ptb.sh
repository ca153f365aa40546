#!/usr/bin/env bash
# The study of docs/study.md: three searches by either order against six random cells, on a sixth of Penn Treebank.
# Extra flags are passed on: scripts/study_ptb.sh --dry_run; to resume: scripts/study_ptb.sh --resume --study DIR
# Cost: 1 to 2 hours on 2 CPU cores. Penn Treebank is downloaded if missing.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-cluster.txt
sizes="--emsize 64 --dropout 0.3 --dropoutx 0.2 --dropouth 0.1 --dropouti 0.1 --dropoute 0 --limit_tokens 150000"
sizes+=" --log_interval 500 --device cpu --init_range 0.04"
exec .venv/bin/python trials.py run --data penn \
  --train_flags "$sizes --batch_size 20" \
  --search_flags "$sizes --batch_size 32 --lr 10 --norm batch --arch_lr 0.003 --arch_start 0 --derive_from last" \
  --baselines DARTS LSTM --full_epochs 12 \
  --proxy_cells DARTS_V1 DARTS_V2 ENAS random:1000 random:1001 random:1002 \
  --proxy_epochs 1 2 4 --proxy_reference 6 --proxy_seeds 2 \
  --methods first unrolled random --seeds 3 --search_epochs 4 --select_epochs 6 --top 2 "$@"
