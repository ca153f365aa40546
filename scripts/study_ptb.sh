#!/usr/bin/env bash
# The study of docs/study.md: eight methods of searching against random cells, on the first 300,000 tokens of Penn Treebank.
#   scripts/study_ptb.sh                       what docs/study lacks of its three parts, on 2 CPU cores:
#   scripts/study_ptb.sh proxies               which short training ranks cells as a long one does: 5 hours
#   scripts/study_ptb.sh two                   the two methods that are put to the test: 8 hours
#   scripts/study_ptb.sh eight                 the other six, which join the two afterwards: 12 hours
#   scripts/study_ptb.sh two select --dry_run  one stage; further flags are those of trials.py
#   WIDTH=128 scripts/study_ptb.sh proxies     with 128 hidden units: 7 hours
# It may be stopped at any time; each trial adds a line to trials.jsonl as it ends. Penn Treebank is downloaded if missing.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-cluster.txt
if (($# < 2)); then
  for part in ${1:-proxies two eight}; do
    case $part in
      proxies) stages="proxy" ;;
      two) stages="search select baseline retrain" ;;
      eight) stages="search select" ;;
      *) echo "$part: no part of the study; take proxies, two or eight" >&2 && exit 2 ;;
    esac
    for stage in $stages report; do bash scripts/study_ptb.sh "$part" "$stage"; done
  done
  exit
fi
part=$1 stage=$2
moves="--arch_lr 0.03 --arch_start 2"
low="--schedule step --step_size 2 --gamma 0.1"  # a tenth of the rate in the third epoch
methods=(none-unrolled="--norm none --unrolled $moves" layer-unrolled="--norm layer --unrolled $moves")
[ "$part" != eight ] || methods+=(none-first="--norm none $moves" layer-first="--norm layer $moves"
  batch-first="--norm batch $moves" batch-unrolled="--norm batch --unrolled $moves"
  none-first-low="--norm none $moves $low" none-unrolled-low="--norm none --unrolled $moves $low")
sizes="--emsize ${WIDTH:-64} --batch_size 32 --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0"
sizes+=" --limit_tokens 300000 --device cpu"
train="$sizes --precision bf16 --log_interval 100"
tanh8="Genotype(recurrent=[('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0), ('tanh', 0),"
tanh8+=" ('tanh', 0)], concat=[1, 2, 3, 4, 5, 6, 7, 8])"
study=docs/study/penn-${WIDTH:-64}
[ "$part" = proxies ] || study+=-confirmation
if [ -e "$study/study.json" ]; then
  flags=(--resume --study "$study")
elif [ "$part" = proxies ]; then
  flags=(--study "$study" --data penn --gpus_per_trial 0 --train_flags "$train" --full_epochs 60 --proxy_reference 60
    --proxy_cells DARTS DARTS_V1 "$tanh8" "${tanh8//tanh/identity}" random:{101..108} --proxy_epochs 3 6 12 20
    --proxy_flags "--schedule step --step_size 10 --gamma 0.1 --epochs 12" "--average_after 20 --epochs 24")
else
  flags=(--study "$study" --data penn --gpus_per_trial 0 --train_flags "$train --average_after 40" --full_epochs 60
    --baselines DARTS DARTS_V1 LSTM --seed 17 --seeds 8 --random_cells 16 --search_epochs 3 --select_epochs 60
    --proxy_epochs 3 6 12 20
    --search_flags "$sizes --arch_batch_size 64 --log_interval 20 --diagnose_every 100"
    --methods "${methods[@]}" random)
fi
[ "$part" != eight ] || flags+=(--methods "${methods[@]}" random)
exec .venv/bin/python trials.py "$stage" "${flags[@]}" "${@:3}"
