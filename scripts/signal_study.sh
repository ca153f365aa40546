#!/usr/bin/env bash
# The studies of docs/signal.md: kinds of search against random cells, on the text that every Python carries and on the
# first 300,000 tokens of Penn Treebank. What docs/signal/*.jsonl holds already is not run again.
# Cost: 4 hours on 2 CPU cores for the studies on both (one alone: scripts/signal_study.sh builtin). Penn Treebank is
# downloaded.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements-cluster.txt # SciPy, for the tests

moves="--arch_lr 0.03 --arch_start 2"

study() { # study TEXT FLAGS...: first the kind of search that is the default, with more seeds, then the others
  local run=(.venv/bin/python benchmarks/search_arms.py run --out "docs/signal/$1.jsonl" --data "$1" "${@:2}")
  "${run[@]}" --seeds 8 --cells DARTS DARTS_V1 --arm none-first="--norm none $moves"
  "${run[@]}" --seeds 4 \
    --arm layer-first="--norm layer $moves" \
    --arm batch-first="--norm batch $moves" \
    --arm none-unrolled="--norm none --unrolled $moves" \
    --arm layer-unrolled="--norm layer --unrolled $moves" \
    --arm batch-unrolled="--norm batch --unrolled $moves" \
    --arm none-first-slow="--norm none --arch_lr 0.003 --arch_start 2"
}

more_arms() { # what the defaults change beside norm, order and rate, and the published settings; takes study's arguments
  .venv/bin/python benchmarks/search_arms.py run --out "docs/signal/$1.jsonl" --data "$1" "${@:2}" --seeds 4 \
    --arm none-first-last="--norm none --arch_lr 0.03 --arch_start 2 --derive_from last" \
    --arm none-first-early="--norm none --arch_lr 0.03 --arch_start 0" \
    --arm published="--norm batch --unrolled --arch_lr 0.003 --arch_start 0 --init_range 0.04 --derive_from last"
}

rates() { # the learning rate and the initial range: two cells, 8 epochs
  local flags
  for flags in "--lr 2.5" "--lr 5" "--lr 10" "--lr 40" "--lr 5 --init_range 0.04" "--lr 20 --init_range 0.04"; do
    .venv/bin/python benchmarks/search_arms.py run --out docs/signal/rates.jsonl --data builtin --seeds 0 \
      --random_cells 1 --cells DARTS --train_epochs 8 --train_flags "$flags"
  done
}

diagnosis() { # diagnosis NAME FLAGS...: a search on Penn Treebank under each norm, measured as it runs
  local norm save flags
  for norm in none layer batch; do
    [ -s "docs/signal/$1-$norm.jsonl" ] && continue
    save=runs/$1-$norm
    flags=(--data penn --search_split train "${@:2}" --norm "$norm" --seed 1 --test skip --device cpu)
    [ -e "$save/config.json" ] && flags=(--resume)
    .venv/bin/python train_search.py "${flags[@]}" --save "$save"
    grep '"kind": "diagnosis"' "$save/metrics.jsonl" >"docs/signal/$1-$norm.jsonl"
  done
}

lengths() { # longer searches, and the cells that they had after fewer epochs
  .venv/bin/python benchmarks/search_arms.py run --out docs/signal/builtin.jsonl --data builtin --train_epochs 8 \
    --search_flags "--search_split train --epochs 12 --diagnose_every 120" --seeds 4 --lengths 3 4 6 8 \
    --arm none-first-12="--norm none --arch_lr 0.03 --arch_start 2"
}

(($#)) || set -- builtin penn rates diagnosis published_sizes lengths
for text in "$@"; do
  case $text in
    builtin)
      for arms in study more_arms; do
        "$arms" builtin --train_epochs 8 --search_flags "--search_split train --epochs 4 --diagnose_every 40"
      done ;;
    penn) study penn --train_epochs 6 --train_flags "--limit_tokens 300000" \
      --search_flags "--search_split train --limit_tokens 300000 --epochs 3 --arch_batch_size 64 --diagnose_every 100" ;;
    rates | lengths) "$text" ;;
    # 100 hidden units, a batch of 64; and the published sizes, the whole text, two epochs: 150 steps and some
    diagnosis) diagnosis h100 --limit_tokens 300000 --emsize 100 --batch_size 64 --dropout 0.3 --dropoutx 0.3 \
      --dropouth 0.1 --dropouti 0.1 --dropoute 0 --epochs 3 --diagnose_every 60 ;;
    published_sizes) diagnosis h300 --precision bf16 --arch_start 0 --epochs 2 --diagnose_every 50 --log_interval 10 ;;
  esac
done
.venv/bin/python benchmarks/search_arms.py table docs/signal/{builtin,penn,first,rates}.jsonl
