#!/usr/bin/env bash
# Search a cell on WikiText-2, second order, at the published settings for Penn Treebank.
# Cost: 50 epochs of 2.25 times as many steps as search_ptb.sh. The paper transfers the cell found on Penn Treebank instead.
# Extra flags are passed on: scripts/search_wt2.sh --seed 0 --save runs/wt2-0
# To resume after an interruption: python train_search.py --resume --save RUN
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
run_python train_search.py \
  --data wikitext-2 \
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
