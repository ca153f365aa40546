#!/usr/bin/env bash
# Retrain the cell that search_recommended.sh found on the whole of Penn Treebank, at a size that a CPU carries: 256 hidden
# units, 3.9M weights. 30 epochs, then 8 in which the weights are averaged (--finetune). docs/evaluation.md has the result.
# Cost: 80 minutes on one core of a Xeon with AMX. The second argument is another cell: scripts/train_small.sh RUN LSTM
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
run=${1:-runs/penn-256}
cell="Genotype(recurrent=[('sigmoid', 0), ('tanh', 0), ('tanh', 1), ('relu', 1), ('tanh', 1), ('tanh', 1), ('tanh', 1),"
cell+=" ('tanh', 2)], concat=[1, 2, 3, 4, 5, 6, 7, 8])"
(run_python train.py \
  --data penn \
  --arch "${2:-$cell}" \
  --epochs 30 \
  --emsize 256 \
  --batch_size 32 \
  --dropout 0.4 \
  --dropoutx 0.4 \
  --dropouth 0.15 \
  --dropouti 0.1 \
  --dropoute 0 \
  --precision bf16 \
  --device cpu \
  --test skip \
  --seed 1 \
  --save "$run")
run_python train.py --finetune "$run" --epochs 8 --test skip --seed 1 --device cpu --precision bf16 --save "$run-averaged"
