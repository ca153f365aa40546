#!/usr/bin/env bash
# Retrain a cell on Penn Treebank at the published settings; DARTS reaches 58.1 valid, 55.7 test (paper), 23M weights.
# Cost: up to 8000 epochs; the paper gives 3 days on a 1080Ti. Stop it when the validation loss has settled.
# Extra flags are passed on: scripts/train_ptb.sh --arch runs/search-... --save runs/mine
# To resume after an interruption: python train.py --resume --save RUN
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
run_python train.py \
  --data penn \
  --arch DARTS \
  --epochs 8000 \
  --batch_size 64 \
  --emsize 850 \
  --bptt 35 \
  --lr 20 \
  --clip 0.25 \
  --wdecay 8e-7 \
  --dropout 0.75 \
  --dropouth 0.25 \
  --dropoutx 0.75 \
  --dropouti 0.2 \
  --dropoute 0.1 \
  --beta 1e-3 \
  --init_range 0.04 \
  --nonmono 5 \
  --seed 1267 \
  "$@"
