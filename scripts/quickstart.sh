#!/usr/bin/env bash
# See it work: search a cell on a text that every Python carries, retrain it, and compare it with a random cell
# and the published one under the same budget. Needs no network after the install.
# Cost: 5 minutes on 2 CPU cores after the install.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
source scripts/common.sh
python_with requirements.txt

out=runs/quickstart-$(date +%Y%m%d-%H%M%S)
common=(--data builtin --emsize 64 --batch_size 32 --lr 5
  --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0
  --engine eager) # the fused engine would compile for longer than it saves here

echo "== searching (unrolled) in $out/search"
.venv/bin/python train_search.py "${common[@]}" --unrolled --epochs 2 --log_interval 20 --save "$out/search"

for cell in "found $out/search" "random random:0" "published DARTS"; do
  read -r name arch <<<"$cell"
  echo "== retraining the $name cell in $out/$name"
  .venv/bin/python train.py "${common[@]}" --arch "$arch" --epochs 12 --log_interval 60 --save "$out/$name"
done

.venv/bin/python scripts/summary.py "$out"/{found,random,published}

echo
.venv/bin/python visualize.py report "$out/search" # what the search saw, for a browser
