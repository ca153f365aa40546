#!/usr/bin/env bash
# Retrain a cell on WikiText-2 at the published settings; DARTS reaches 71.2 valid, 69.6 test (paper), 33M weights.
# Cost: up to 8000 epochs of 2.25 times as many steps as train_ptb.sh. Stop it when the validation loss has settled.
# Extra flags are passed on: scripts/train_wt2.sh --arch runs/search-... --save runs/mine
# To resume after an interruption: python train.py --resume --save RUN
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
run_python train.py \
  --data wikitext-2 \
  --arch DARTS \
  --epochs 8000 \
  --batch_size 64 \
  --emsize 700 \
  --bptt 35 \
  --lr 20 \
  --clip 0.25 \
  --wdecay 5e-7 \
  --dropout 0.75 \
  --dropouth 0.15 \
  --dropoutx 0.75 \
  --dropouti 0.2 \
  --dropoute 0.1 \
  --beta 1e-3 \
  --init_range 0.04 \
  --nonmono 5 \
  --seed 1267 \
  "$@"
