#!/usr/bin/env bash
# What a GPU is asked once: the CUDA tests, the steps at the published sizes in every precision, two epochs of the
# search and three of the retraining on Penn Treebank (the first compiles and captures; metrics.jsonl has the seconds
# of each). Everything it prints, and JSON, go to OUT; gpu_report.py makes a table of it and says which targets are met.
# Cost: written to end within 9 minutes on an H100 with torch 2.11; no GPU has run it yet.
#   OUT=results bash benchmarks/gpu.sh      needs corpora/penn, and no network; PYTHON names the interpreter
set -uo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.." || exit
OUT=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$OUT"
[[ -f corpora/penn/train.txt ]] || { echo "corpora/penn: missing; copy Penn Treebank there" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"

failed=0
stage() { # name, seconds, command
  local name=$1 seconds=$2 from=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" > "$OUT/$name.txt" 2>&1 || { echo "$name: exit $?" | tee -a "$OUT/failed.txt"; failed=1; }
  tail -n 15 "$OUT/$name.txt"
  echo "{\"stage\": \"$name\", \"seconds\": $((SECONDS - from))}" >> "$OUT/stages.jsonl"
}

if "$python" -c "import pytest, hypothesis" 2> "$OUT/pytest_missing.txt"; then
  stage tests 110 "$python" -m pytest -q tests/engine
else
  echo "tests: skipped, this Python has no pytest and hypothesis" | tee "$OUT/tests.txt"
fi
stage step 210 "$python" benchmarks/step.py --device cuda --precisions fp32 tf32 bf16 --json "$OUT/step.json" \
  --steps search-unrolled train search-first evaluate search-exact
stage search 130 "$python" train_search.py --data penn --unrolled --precision bf16 --epochs 2 --arch_start 0 \
  --device cuda --test skip --save "$OUT/search"
stage train 90 "$python" train.py --data penn --arch DARTS --precision bf16 --epochs 3 --device cuda \
  --test skip --save "$OUT/train"
rm -f "$OUT"/*/*.pt
"$python" benchmarks/gpu_report.py "$OUT" | tee "$OUT/report.md"
tar czf "$OUT/all.tgz" -C "$OUT" --exclude all.tgz .
exit "$failed"
