#!/usr/bin/env bash
# What a GPU is asked once: the CUDA tests, the steps at the published sizes in every precision, two epochs of the
# search and three of the retraining on Penn Treebank (the first compiles and captures; metrics.jsonl has the seconds
# of each). Everything it prints, and JSON, go to OUT; gpu_report.py makes a table of it and says which targets are met.
# Cost: written to end within 9 minutes on an H100 with torch 2.11; no GPU has run it yet.
#   OUT=results bash benchmarks/gpu.sh      PYTHON names the interpreter; needs no network if corpora/penn is there
set -uo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.." || exit
OUT=${OUT:-benchmarks/results/gpu-$(date +%Y%m%d-%H%M%S)}
python=${PYTHON:-python3}
mkdir -p "$OUT"
[[ -z $(ls -A "$OUT") ]] || { echo "$OUT: holds files already; name another folder by OUT" >&2; exit 2; }
"$python" -c "
from data import load_corpus
from utils import DataError
try: load_corpus('penn')  # downloads it if it is missing
except DataError as error: raise SystemExit(str(error))" || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"

failed=0
stage() { # name, seconds, command
  local name=$1 seconds=$2 from=$SECONDS
  shift 2
  echo "== $name"
  # -k: a process that waits for a GPU does not end by SIGTERM
  timeout -k 5 "$seconds" "$@" > "$OUT/$name.txt" 2>&1 || { echo "$name: exit $?" | tee -a "$OUT/failed.txt"; failed=1; }
  tail -n 15 "$OUT/$name.txt"
  echo "{\"stage\": \"$name\", \"seconds\": $((SECONDS - from))}" >> "$OUT/stages.jsonl"
}

if "$python" -c "import pytest, hypothesis" 2> "$OUT/pytest_missing.txt"; then
  stage tests 90 "$python" -m pytest -p no:cacheprovider -m "not slow" -k "on_cuda or [cuda" tests/engine
else
  echo "tests: skipped, this Python has no pytest and hypothesis" | tee "$OUT/tests.txt"
fi
# One process each: what one step breaks, such as the capture of CUDA graphs, is whole in the next.
for step in search-unrolled:90 train:40 search-first:30 evaluate:20 search-exact:50; do
  stage "step-${step%:*}" "${step#*:}" "$python" benchmarks/step.py --device cuda --precisions fp32 tf32 bf16 \
    --steps "${step%:*}" --json "$OUT/step-${step%:*}.json"
done
stage search 130 "$python" train_search.py --data penn --unrolled --precision bf16 --epochs 2 --arch_start 0 \
  --device cuda --test skip --save "$OUT/search"
# --bptt_std 0: segments of two lengths, so that the third epoch captures no more graphs; in a long run hardly any does
stage train 80 "$python" train.py --data penn --arch DARTS --precision bf16 --epochs 3 --bptt_std 0 --device cuda \
  --test skip --save "$OUT/train"
rm -f "$OUT"/*/*.pt
"$python" benchmarks/gpu_report.py "$OUT" | tee "$OUT/report.md"
tar czf "$OUT/all.tgz" -C "$OUT" --exclude all.tgz .
exit "$failed"
