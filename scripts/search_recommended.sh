#!/usr/bin/env bash
# Search a cell on Penn Treebank with the defaults of docs/signal.md. The cells that it found are better than random
# ones after 6 epochs of training at this size; whether they end better is open (docs/study.md).
# Cost: 3 minutes on one CPU core. The cell is then retrained at any size: scripts/train_ptb.sh --arch RUN
# Extra flags are passed on: scripts/search_recommended.sh --seed 0 --save runs/search-0
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
run_python train_search.py \
  --data penn \
  --limit_tokens 300000 \
  --search_split train \
  --epochs 3 \
  --batch_size 32 \
  --arch_batch_size 64 \
  --emsize 64 \
  --dropout 0.3 \
  --dropouth 0.1 \
  --dropoutx 0.3 \
  --dropouti 0.1 \
  --dropoute 0 \
  --norm none \
  --arch_lr 0.03 \
  --arch_start 2 \
  --derive_from mean \
  "$@"
