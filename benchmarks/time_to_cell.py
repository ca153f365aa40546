"""Seconds from nothing to a found cell and its retraining, for each engine, norm and number of threads on a CPU.

    python benchmarks/time_to_cell.py --json FILE             # the text that comes with Python; 20 minutes on 2 cores
    python benchmarks/time_to_cell.py --data penn    # 300,000 tokens of Penn Treebank: 90 minutes
    python benchmarks/time_to_cell.py --start                    # compiling alone: 11 minutes

Each combination searches and retrains with the flags of scripts/quickstart.sh or scripts/search_recommended.sh, one
process at a time, after runs of a few steps have compiled the kernels. With --start, such runs show what compiling
costs: the seconds of a search and of a retraining with an empty cache of kernels, with a full one, and uncompiled.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from search_arms import ROOT, SIZES

from experiment import metrics
from engine import ENGINES
from engine.reference import NORMS

# By corpus: the flags of both scripts, those of the search, and those of the retraining.
RECIPES = {
    "builtin": (f"--data builtin {SIZES}", "--epochs 4", "--epochs 8"),
    "penn": (
        f"--data penn --limit_tokens 300000 {SIZES}",
        "--search_split train --epochs 3 --arch_batch_size 64 --arch_lr 0.03 --arch_start 2 --derive_from mean",
        "--epochs 6",
    ),
}
FEW_STEPS = "--limit_tokens 5000 --epochs 1"


def seconds(script: str, flags: str, threads: int, save: Path, **environment: str) -> float:
    """Returns the seconds of a whole run, from the start of its process to the end."""
    command = [sys.executable, ROOT / script, *shlex.split(flags), "--save", save]
    clock = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    )
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
    return time.perf_counter() - clock


def starts(norm: str) -> tuple[tuple[str, str], ...]:
    """Returns the scripts, with flags for which a few steps call every kernel. DARTS has all four activations."""
    return ("train_search.py", f"--arch_start 0 --norm {norm}"), ("train.py", "--arch DARTS")


def to_cell(data: str, engine: str, norm: str, threads: int) -> dict:
    """Returns the seconds of a search and of the retraining of its cell, and the perplexity that this reaches."""
    both, of_search, of_training = RECIPES[data]
    with TemporaryDirectory() as folder:
        search, train = Path(folder, "search"), Path(folder, "train")
        flags = f"{both} --engine {engine}"
        for script, more in starts(norm) if engine == "fused" else ():
            seconds(script, f"{flags} {FEW_STEPS} {more}", threads, Path(folder, f"compiling-{script}"))
        search_s = seconds("train_search.py", f"{flags} {of_search} --norm {norm}", threads, search)
        train_s = seconds("train.py", f"{flags} {of_training} --arch {search}", threads, train)
        ppl = metrics.read_json(train / "result.json")["valid_ppl"]
    return {"data": data, "engine": engine, "norm": norm, "threads": threads,
            "search_s": search_s, "train_s": train_s, "valid_ppl": ppl}  # fmt: skip


def to_first_steps(data: str, norm: str, threads: int) -> list[dict]:
    """Returns the seconds of a search and of a retraining of a few steps, by the state of the cache of kernels."""
    both = RECIPES[data][0]
    records = []
    for script, more in starts(norm):
        with TemporaryDirectory() as folder:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "kernels"))}
            for state, engine in (("empty", "fused"), ("full", "fused"), ("uncompiled", "eager")):
                flags = f"{both} {FEW_STEPS} --engine {engine} {more}"
                taken = seconds(script, flags, threads, Path(folder, state), **cache)
                records.append({"script": script, "norm": norm, "threads": threads, "cache": state, "seconds": taken})
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=RECIPES, default="builtin")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--start", action="store_true", help="measure compiling alone, of --norms")
    parser.add_argument("--json", type=Path, metavar="FILE", help="each line is written there as it is measured")
    args = parser.parse_args()
    lines: list[dict] = []
    for norm, threads in product(args.norms, args.threads):
        if args.start:
            new = to_first_steps(args.data, norm, threads)
        else:
            new = [to_cell(args.data, engine, norm, threads) for engine in args.engines]
        for line in new:
            print("  ".join(f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in line.items()), flush=True)  # fmt: skip
        lines += new
        if args.json:
            args.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
