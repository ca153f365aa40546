#!/usr/bin/env bash
# Search a cell on WikiText-2, second order, at the published settings for Penn Treebank.
# Cost: 50 epochs of 2.25 times as many steps as search_ptb.sh. The paper transfers the cell found on Penn Treebank instead.
# Extra flags are passed on: scripts/search_wt2.sh --seed 0 --save runs/wt2-0
# To resume after an interruption: python train_search.py --resume --save RUN
set -euo pipefail
exec bash "$(dirname -- "$0")/search_ptb.sh" --data wikitext-2 "$@"
