"""How a run fares on a machine that it shares: the pace of a small search alone, and beside others like it.

    python benchmarks/shared_machine.py                            # 15 minutes on 2 otherwise idle CPU cores
    python benchmarks/shared_machine.py --threads 2 --others 0 1 2 --spin default 0 1000 10000

A thread of OpenMP that waits at a barrier spins, and only sleeps after GOMP_SPINCOUNT turns (libgomp). Where there are
more busy threads than cores, it spins in the place of the thread that it waits for. Prints, for each spin count, the
median milliseconds a step over the rounds, taken in turn, and the ratio to that beside the first number of --others.
The spin count `default` is libgomp's own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from search_arms import ROOT, SIZES

from experiment import metrics

SEARCH = f"--data builtin {SIZES} --epochs 50 --log_interval 5".split()


def milliseconds(threads: int, spin: str, others: int, steps: int) -> float:
    """Returns the milliseconds a step of a search beside `others` searches with as many threads and the same spin
    count. All are started together, and `steps` steps of the first one are timed, once all have done ten."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment["OMP_NUM_THREADS"] = str(threads)
    if spin != "default":
        environment["GOMP_SPINCOUNT"] = spin
    with tempfile.TemporaryDirectory() as folder:
        saves = [Path(folder, str(i)) for i in range(1 + others)]
        searches = [
            subprocess.Popen(
                [sys.executable, ROOT / "train_search.py", *SEARCH, "--save", save],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            )
            for save in saves
        ]  # fmt: skip
        try:
            while True:
                found = [seconds_by_step(save) for save in saves]
                if all(10 in each for each in found):  # all of them have compiled and train
                    break
                if any(search.poll() is not None for search in searches):
                    sys.exit("a search has ended before its tenth step")
                time.sleep(0.5)
            first = found[0]
            start = max(first)
            while max(first) < start + steps:
                time.sleep(0.5)
                first = seconds_by_step(saves[0])
        finally:
            for search in searches:
                search.kill()
                search.wait()
    return 1000 * (first[start + steps] - first[start]) / steps


def seconds_by_step(save: Path) -> dict[int, float]:
    """Returns the seconds of a run up to each of the steps that metrics.jsonl has."""
    return {record["step"]: record["seconds"] for record in metrics.records(save) if record["kind"] == "interval"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of each search")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2], help="searches beside the timed one")
    parser.add_argument("--spin", nargs="+", default=["default", "0", "1000"], help="spin counts")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed, a multiple of 5")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.steps % 5:
        parser.error(f"--steps {args.steps}: must be a multiple of 5, the steps of a log interval")
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for others in args.others:
            for spin in args.spin:
                found.setdefault((spin, others), []).append(milliseconds(args.threads, spin, others, args.steps))
    for spin in args.spin:
        reference = median(found[spin, args.others[0]])
        for others in args.others:
            ms = median(found[spin, others])
            ratio = ms / reference
            print(f"spin {spin:>8}, {args.threads} threads, beside {others}: {ms:7.1f} ms a step, {ratio:.2f} times")


if __name__ == "__main__":
    main()
