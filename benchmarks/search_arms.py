"""Does a search find better cells than a draw does? Kinds of search beside random cells, a short training of each.

    python benchmarks/search_arms.py run --out FILE --data builtin --arm NAME="FLAGS OF train_search.py" ...
    python benchmarks/search_arms.py table docs/signal/builtin.jsonl         # what docs/signal.md says

`run` starts train_search.py and train.py, as many at a time as there are cores, each with one thread. Every search and
every training adds a line to FILE as it ends; what is there already is not run again, so a study that was stopped, or
gets another arm, goes on. All cells are trained with the same flags and the same seed, whatever found them. `table`
prints mean, sd, best and median perplexity of each arm, the p of a two-sided permutation test against the random cells
(or another arm's, `--against`; of ranks in the place of perplexities, `--ranks`), the mean depth of its cells, the mean
cosine between the alpha gradients of independent batches over its searches, and the median perplexity at which the
searches themselves ended; with what features the random cells' perplexities are correlated; and how cosine and
sensitivity went in each arm. scripts/signal_study.sh runs the studies of docs/signal.md.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from statistics import correlation, mean, median, stdev
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment import metrics
from genotypes import PRIMITIVES, from_json, resolve_cell, to_json
from study.features import depths

ROOT = Path(__file__).resolve().parent.parent
SIZES = (
    "--emsize 64 --batch_size 32 --dropout 0.3 --dropoutx 0.3 --dropouth 0.1 --dropouti 0.1 --dropoute 0 --device cpu"
    " --log_interval 20 --test skip"
)
SIGNAL = ("step", "cosine_whole", "cosine_direct", "cosine_implicit", "norm_ratio", "sensitivity", "relaxed_loss")
TRAIN_SEED = 1
NAMED = ("DARTS", "DARTS_V1")
MAX_SEED = 1000  # random cells that `table` knows, and seeds of searches


class Results:
    """The lines of a file, by what they are of; one is added at a time."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.by_key = {key(line): line for line in metrics.lines(path)}

    def add(self, line: dict) -> None:
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.by_key[key(line)] = line


def key(line: dict) -> tuple:
    """What was run: two lines with the same one would be the same. How often a search is measured changes nothing."""
    if line["kind"] == "search":
        return "search", re.sub(r" --diagnose_every \d+", "", line["flags"]), line["seed"]
    return "train", json.dumps(line["genotype"]), line["flags"], line["seed"]


def run_script(script: str, flags: str, seed: int) -> Path:
    """The directory of a finished run."""
    folder = Path(mkdtemp(prefix="arms-"))
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), "--seed", str(seed), "--save", str(folder)]
    log = folder.with_suffix(".out")
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"{shlex.join(command)}: exit code {code}, see {log}")
    log.unlink()
    return folder


def search(results: Results, arm: str, flags: str, seed: int) -> dict:
    """The genotype that a search ends with, that of each epoch, and what was measured on the way."""
    line = results.by_key.get(key({"kind": "search", "flags": flags, "seed": seed}))
    if line is None:
        folder = run_script("train_search.py", flags, seed)
        epochs, diagnoses = (
            metrics.epochs(folder),
            [row for row in metrics.records(folder) if row["kind"] == "diagnosis"],
        )
        line = {
            "kind": "search", "arm": arm, "flags": flags, "seed": seed,
            "genotype": metrics.read_json(folder / "genotype.json")["genotype"],
            "genotypes": [epoch["genotype"] for epoch in epochs],
            "valid_ppl": [round(epoch["valid_ppl"], 2) for epoch in epochs],
            "signal": [{name: diagnosis[name] for name in SIGNAL} for diagnosis in diagnoses],
            "seconds": round(epochs[-1]["seconds"], 1),
        }  # fmt: skip
        rmtree(folder)
        results.add(line)
        print(f"{arm}, seed {seed}: {from_json(line['genotype'])}", flush=True)
    return line


def train(results: Results, genotype: dict, flags: str) -> dict:
    """The validation perplexity of a cell after each epoch of a short training."""
    line = results.by_key.get(("train", json.dumps(genotype), flags, TRAIN_SEED))
    if line is None:
        folder = run_script("train.py", f"{flags} --arch {shlex.quote(str(from_json(genotype)))}", TRAIN_SEED)
        ppl = [round(epoch["valid_ppl"], 3) for epoch in metrics.epochs(folder)]
        line = {"kind": "train", "genotype": genotype, "flags": flags, "seed": TRAIN_SEED, "valid_ppl": ppl}
        rmtree(folder)
        results.add(line)
        print(f"{ppl[-1]:8.2f}  {from_json(genotype)}", flush=True)
    return line


def run(args: argparse.Namespace) -> None:
    """Every search and every training that the file does not hold yet."""
    results = Results(args.out)
    train_flags, search_flags = (
        f"{SIZES} --data {args.data} {flags}".strip()
        for flags in (f"--epochs {args.train_epochs} {args.train_flags}", args.search_flags)
    )
    named = [to_json(resolve_cell(name)) for name in (*(f"random:{n}" for n in range(args.random_cells)), *args.cells)]
    trainings = {}  # by genotype, since several searches may find one cell
    with ThreadPoolExecutor(args.jobs) as pool:

        def start_training(genotype: dict) -> None:
            if (name := json.dumps(genotype)) not in trainings:
                trainings[name] = pool.submit(train, results, genotype, train_flags)

        searches = [
            pool.submit(search, results, name, f"{search_flags} {flags}", seed)
            for seed in range(1, args.seeds + 1)
            for name, flags in args.arm
        ]
        for genotype in named:
            start_training(genotype)
        for future in searches:
            record = future.result()
            for genotype in (record["genotype"], *(record["genotypes"][epochs - 1] for epochs in args.lengths)):
                start_training(genotype)
        for future in trainings.values():
            future.result()


def table(paths: Sequence[Path], seeds: range = range(MAX_SEED), against: str = "random", ranks: bool = False) -> None:
    """Prints for each file, and each way in which it has trained cells, the arms beside the random cells, then the
    signal. Searches with other seeds are left out. The arms are tested `against` the random cells or those of an
    arm, by their perplexities or, with `ranks`, by the ranks of these."""
    for path in paths:
        lines = [line for line in Results(path).by_key.values() if line["kind"] == "train" or line["seed"] in seeds]
        for flags in dict.fromkeys(line["flags"] for line in lines if line["kind"] == "train"):
            table_of(f"{path.name}: {flags}", lines, flags, against, ranks)
        print("\n| arm | step | cosine, mean | sensitivity, median |\n|---|---|---|---|")
        for arm in dict.fromkeys(line["arm"] for line in lines if line["kind"] == "search"):
            signal_of(arm, [s for line in lines if line.get("arm") == arm for s in line["signal"]])


@cache
def known_cells() -> dict[str, dict]:
    """Random and published cells by name."""
    return {name: to_json(resolve_cell(name)) for name in (*(f"random:{n}" for n in range(MAX_SEED)), *NAMED)}


def table_of(title: str, lines: Collection[dict], flags: str, against: str, ranks: bool) -> None:
    """Every cell that was trained with those flags, by what it comes from."""
    trained = {
        json.dumps(line["genotype"]): line["valid_ppl"][-1]
        for line in lines
        if line["kind"] == "train" and line["flags"] == flags
    }
    cells = {name: cell for name, cell in known_cells().items() if json.dumps(cell) in trained}
    drawn = [cell for name, cell in cells.items() if name.startswith("random")]
    random = [trained[json.dumps(cell)] for cell in drawn]
    columns = ("cells", "n", "mean", "sd", "best", "median", "p", "depth", "agreement", "searches' own, median")
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name, group in (("random", drawn), *((name, [cells[name]]) for name in NAMED if name in cells)):
        if group:
            print(row(name, group, trained))
    searches = [line for line in lines if line["kind"] == "search" and json.dumps(line["genotype"]) in trained]
    others = [trained[json.dumps(line["genotype"])] for line in searches if line["arm"] == against]
    others = random if against == "random" else others
    p_of = partial(p_value, others=others, ranks=ranks)
    for arm in dict.fromkeys(line["arm"] for line in searches):
        runs = [line for line in searches if line["arm"] == arm]
        signals = [s for line in runs for s in line["signal"]]
        ends = [line["valid_ppl"][-1] for line in runs if "valid_ppl" in line]
        cells_of_arm = [line["genotype"] for line in runs]
        print(row(arm, cells_of_arm, trained, p_of if arm != against else None, signals, ends))
        for epochs, group in enumerate(zip(*(line.get("genotypes", ())[:-1] for line in runs), strict=False), start=1):
            if all(json.dumps(cell) in trained for cell in group):
                print(row(f"{arm}, after {epochs} epochs", group, trained, p_of))
    if len(drawn) > 2:
        print("\ncorrelation of the random cells' perplexity with " + correlations(drawn, random))


def row(
    name: str,
    cells: Sequence[dict],
    trained: dict[str, float],
    p_of: Callable[[Sequence[float]], str] | None = None,
    signal: Sequence[dict] = (),
    ends: Sequence[float] = (),
) -> str:
    """A row of the table: of these cells, and of what was measured in the searches that found them, which ended at the
    perplexities `ends`. `p_of` gives the p of the cells' perplexities."""
    ppl = [trained[json.dumps(cell)] for cell in cells]
    sd = f"{stdev(ppl):.2f}" if len(ppl) > 1 else ""
    p = p_of(ppl) if p_of else ""
    agreement = numbers(signal, "cosine_whole")
    return (
        f"| {name} | {len(ppl)} | {mean(ppl):.2f} | {sd} | {min(ppl):.2f} | {median(ppl):.2f} | {p} "
        f"| {mean(map(mean_depth, cells)):.2f} | {f'{mean(agreement):.2f}' if agreement else ''} "
        f"| {f'{median(ends):.1f}' if ends else ''} |"
    )


def p_value(ppl: Sequence[float], others: Sequence[float], ranks: bool) -> str:
    """The p of a permutation test of the difference of the means of perplexities, or of their ranks among both samples;
    empty if either has fewer than two."""
    from scipy.stats import rankdata

    from study.stats import permutation_test

    if min(len(ppl), len(others)) < 2:
        return ""
    both = rankdata([*ppl, *others]) if ranks else [*ppl, *others]
    return f"{permutation_test(both[: len(ppl)], both[len(ppl) :]):.4f}"


def signal_of(arm: str, signal: Sequence[dict]) -> None:
    """How agreement and sensitivity went over the searches of an arm."""
    for step in sorted({s["step"] for s in signal}):
        at_step = [s for s in signal if s["step"] == step]
        cosines, growth = numbers(at_step, "cosine_whole"), numbers(at_step, "sensitivity")
        if cosines and growth:
            print(f"| {arm} | {step} | {mean(cosines):.2f} | {median(growth):.1e} |")


def numbers(signal: Sequence[dict], name: str) -> list[float]:
    """Those of one kind that were finite."""
    return [s[name] for s in signal if s[name] is not None]


def mean_depth(cell: dict) -> float:
    """How many nodes lie between s_0 and a node's output, itself included, in the mean over the nodes."""
    return mean(depths(cell["recurrent"]))


def correlations(cells: Sequence[dict], ppl: Sequence[float]) -> str:
    """Pearson's r of the perplexity with the mean depth, and with how often each primitive occurs."""
    features = {"mean depth": [mean_depth(cell) for cell in cells]}
    for primitive in PRIMITIVES[1:]:
        features[primitive] = [sum(op == primitive for op, _ in cell["recurrent"]) for cell in cells]
    return ", ".join(
        f"{name} {correlation(values, ppl):.2f}" for name, values in features.items() if len(set(values)) > 1
    )


def arm(text: str) -> tuple[str, str]:
    """NAME=FLAGS, apart."""
    name, sign, flags = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text}: NAME=FLAGS expected")
    return name, flags


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", default="builtin")
    runs.add_argument("--out", type=Path, required=True, metavar="FILE")
    runs.add_argument(
        "--arm", type=arm, action="append", default=[], metavar="NAME=FLAGS", help="flags of train_search.py"
    )
    runs.add_argument("--seeds", type=int, default=4, help="searches of each arm")
    runs.add_argument(
        "--lengths", type=int, nargs="*", default=[], metavar="EPOCHS", help="train what searches had after these, too"
    )
    runs.add_argument("--random_cells", type=int, default=16)
    runs.add_argument("--cells", nargs="*", default=[], metavar="ARCH")
    runs.add_argument("--train_epochs", type=int, default=8)
    runs.add_argument("--train_flags", default="", help="of every training of a cell")
    runs.add_argument("--search_flags", default="", help="of every search")
    runs.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    tables = commands.add_parser("table")
    tables.add_argument("files", nargs="+", type=Path)
    tables.add_argument(
        "--seeds", nargs=2, type=int, default=(0, MAX_SEED), metavar=("FIRST", "LAST"), help="of the searches"
    )
    tables.add_argument("--against", default="random", metavar="ARM", help="whose cells the others are tested against")
    tables.add_argument("--ranks", action="store_true", help="test ranks in the place of perplexities")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        table(args.files, range(args.seeds[0], args.seeds[1] + 1), args.against, args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
