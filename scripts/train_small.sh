#!/usr/bin/env bash
# Retrain the cell that search_recommended.sh found on the whole of Penn Treebank, at a size that a CPU carries: 256 hidden
# units, 4.3M weights. docs/evaluation.md has the perplexities.
# Cost: 1 hour 45 minutes on one core with bfloat16 (AMX); an epoch takes 1:45. Another cell: scripts/train_small.sh --arch LSTM
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cell="Genotype(recurrent=[('sigmoid', 0), ('tanh', 0), ('tanh', 1), ('relu', 1), ('tanh', 1), ('tanh', 1), ('tanh', 1),"
cell+=" ('tanh', 2)], concat=[1, 2, 3, 4, 5, 6, 7, 8])"
run_python train.py \
  --data penn \
  --arch "$cell" \
  --epochs 60 \
  --emsize 256 \
  --batch_size 32 \
  --dropout 0.4 \
  --dropoutx 0.4 \
  --dropouth 0.15 \
  --dropouti 0.1 \
  --dropoute 0 \
  --precision bf16 \
  --device cpu \
  --seed 1 \
  "$@"
