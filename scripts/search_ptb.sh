#!/usr/bin/env bash
# Search a cell on Penn Treebank, second order, at the published settings.
# Cost: 50 epochs. The published code took 4 h 21 min on a V100 (Liu et al. report 6 h on a 1080Ti).
# Extra flags are passed on: scripts/search_ptb.sh --seed 0 --save runs/ptb-0
# To resume after an interruption: python train_search.py --resume --save RUN
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
run_python train_search.py \
  --data penn \
  --unrolled \
  --epochs 50 \
  --batch_size 256 \
  --emsize 300 \
  --bptt 35 \
  --lr 20 \
  --clip 0.25 \
  --wdecay 5e-7 \
  --dropout 0.75 \
  --dropouth 0.25 \
  --dropoutx 0.75 \
  --dropouti 0.2 \
  --dropoute 0 \
  --beta 1e-3 \
  --arch_lr 3e-3 \
  --arch_wdecay 1e-3 \
  --derive_from last \
  --norm batch \
  --init_range 0.04 \
  --arch_start 0 \
  --seed 3 \
  "$@"
