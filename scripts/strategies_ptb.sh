#!/usr/bin/env bash
# The table of docs/strategies.md: one strategy after the other against the plain recipe, on a sixth of Penn Treebank,
# two seeds each, every run over the same text as often. Goes on where it was stopped.
# Cost: 1 to 2 hours on 2 CPU cores, one run on each (JOBS=2, the default). Penn Treebank is downloaded if missing.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements.txt
export OUT=${1:-runs/strategies} OMP_NUM_THREADS=1
mkdir -p "$OUT"

one() { # one NAME SEED FLAGS...
  local name=$1 seed=$2 folder=$OUT/$1-$2
  shift 2
  [ -e "$folder/result.json" ] && return
  if [ -e "$folder/config.json" ]; then
    set -- --resume
  else
    set -- --data penn --limit_tokens 150000 --epochs 10 --emsize 64 --batch_size 20 --seed "$seed" \
      --dropout 0.3 --dropoutx 0.2 --dropouth 0.1 --dropouti 0.1 --dropoute 0 --log_interval 500 --init_range 0.04 "$@"
  fi
  .venv/bin/python train.py "$@" --save "$folder" >"$folder.out" 2>&1 || {
    echo "$name, seed $seed: failed, see $folder.out"
    return 1
  }
  echo "$name, seed $seed: $(tail -n 1 "$folder.out")"
}
export -f one

for seed in 1 2; do
  while read -r row; do echo "${row/ / $seed }"; done <<'ROWS'
plain --arch DARTS
cosine --warmup 200 --schedule cosine
patience --patience 2
rdrop --rdrop 1
fraternal --fraternal 1
mos --n_experts 3
lstm --arch LSTM
gru --arch GRU
random0 --arch random:0
random1 --arch random:1
random2 --arch random:2
adamw --optimizer adamw --lr 2e-3
ROWS
done | xargs -P "${JOBS:-2}" -I{} bash -c 'one {}'

.venv/bin/python scripts/strategies.py "$OUT"
