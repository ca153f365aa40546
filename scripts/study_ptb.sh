#!/usr/bin/env bash
# The study of docs/study.md: eight methods of searching against random cells, on the first 300,000 tokens of Penn Treebank.
#   scripts/study_ptb.sh                    what docs/study/penn-64 lacks: about 17 hours on 2 CPU cores in all
#   scripts/study_ptb.sh proxy --dry_run    one stage; further flags are those of trials.py
#   WIDTH=128 scripts/study_ptb.sh proxy    which short training ranks cells as a long one at 128 hidden units: 7 hours
#   CONFIRM=1 scripts/study_ptb.sh          the confirmation, which decides the claim: 9 hours
# It may be stopped at any time; each trial adds a line to trials.jsonl as it ends. Penn Treebank is downloaded if missing.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-cluster.txt
stages=(proxy search select)
[ -z "${CONFIRM:-}" ] || stages=(search select baseline retrain)
if (($# == 0)); then
  for stage in "${stages[@]}" report; do bash scripts/study_ptb.sh "$stage"; done
  exit
fi
stage=$1
study=docs/study/penn-${WIDTH:-64}${CONFIRM:+-confirmation}
if [ -e "$study/study.json" ]; then
  exec .venv/bin/python trials.py "$stage" --resume --study "$study" "${@:2}"
fi
sizes="--emsize ${WIDTH:-64} --batch_size 32 --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0"
sizes+=" --limit_tokens 300000 --device cpu"
moves="--arch_lr 0.03 --arch_start 2"
none_unrolled=none-unrolled="--norm none --unrolled $moves"
layer_unrolled=layer-unrolled="--norm layer --unrolled $moves"
low="--schedule step --step_size 2 --gamma 0.1"  # a tenth of the rate in the third epoch
tanh8="Genotype(recurrent=[('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0),"
tanh8+=" ('tanh', 0)], concat=[1, 2, 3, 4, 5, 6, 7, 8])"
identity8=${tanh8//tanh/identity}
search="$sizes --arch_batch_size 64 --log_interval 20 --diagnose_every 100"
train="$sizes --precision bf16 --log_interval 100"
all=(--study "$study" --data penn --gpus_per_trial 0 --baselines DARTS DARTS_V1 LSTM --full_epochs 60 --seeds 8
  --search_epochs 3 --search_flags "$search" --proxy_epochs 3 6 12 20)
if [ -n "${CONFIRM:-}" ]; then
  exec .venv/bin/python trials.py "$stage" "${all[@]}" --seed 17 --train_flags "$train --average_after 40" \
    --methods "$none_unrolled" "$layer_unrolled" random \
    --random_cells 16 --select_epochs 60 "${@:2}"
fi
exec .venv/bin/python trials.py "$stage" "${all[@]}" --train_flags "$train" \
  --proxy_cells DARTS DARTS_V1 "$tanh8" "$identity8" random:{101..108} --proxy_reference 60 \
  --proxy_flags "--schedule step --step_size 10 --gamma 0.1 --epochs 12" "--average_after 20 --epochs 24" \
  --methods none-first="--norm none $moves" "$none_unrolled" \
  batch-first="--norm batch $moves" batch-unrolled="--norm batch --unrolled $moves" \
  layer-first="--norm layer $moves" "$layer_unrolled" \
  none-first-low="--norm none $moves $low" none-unrolled-low="--norm none --unrolled $moves $low" random \
  --random_cells 32 --select_epochs 24 --select_flags "--average_after 20" "${@:2}"
