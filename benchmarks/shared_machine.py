"""How a run fares on a machine that it shares: the pace of a small search, or of the quick start, alone and beside
others like it.

    python benchmarks/shared_machine.py                            # 15 minutes on 2 otherwise idle CPU cores
    python benchmarks/shared_machine.py --threads 2 --others 0 1 2 --spin default 0 1000 10000
    python benchmarks/shared_machine.py --quickstart --threads 1 --others 0 1 --rounds 1 --spin default  # 8 minutes

A thread of OpenMP that waits at a barrier spins, and only sleeps after GOMP_SPINCOUNT turns (libgomp). Where there are
more busy threads than cores, it spins in the place of the thread that it waits for. Prints, for each spin count, the
median milliseconds a step over the rounds, taken in turn, and the ratio to that beside the first number of --others;
with --quickstart the median seconds of the whole quick start, whose processes take --threads threads each.
The spin count `default` is libgomp's own.
"""

import argparse
import contextlib
import os
import signal
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
    environment = openmp(threads, spin)
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
                timings = [seconds_by_step(save) for save in saves]
                if all(10 in each for each in timings):  # all of them have compiled and train
                    break
                if any(search.poll() is not None for search in searches):
                    sys.exit("a search has ended before its tenth step")
                time.sleep(0.5)
            first = timings[0]
            start = max(first)
            while max(first) < start + steps:
                time.sleep(0.5)
                first = seconds_by_step(saves[0])
        finally:
            for search in searches:
                search.kill()
                search.wait()
    return 1000 * (first[start + steps] - first[start]) / steps


def openmp(threads: int, spin: str) -> dict[str, str]:
    """Returns the environment of a process with this number of threads and this spin count."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    return environment | {"OMP_NUM_THREADS": str(threads)} | ({} if spin == "default" else {"GOMP_SPINCOUNT": spin})


def quickstart_seconds(threads: int, spin: str, others: int) -> float:
    """Returns the seconds of a quick start that `others` others are started together with, all of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        runs = [
            subprocess.Popen(
                ["bash", ROOT / "scripts" / "quickstart.sh", "1", str(Path(folder, str(i)))],
                stdout=subprocess.DEVNULL, env=openmp(threads, spin), start_new_session=True,
            )
            for i in range(1 + others)
        ]  # fmt: skip
        try:
            if runs[0].wait():
                sys.exit("the quick start failed")
            return time.perf_counter() - start
        finally:
            for run in runs:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its processes
                    os.killpg(run.pid, signal.SIGKILL)
                run.wait()


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
    parser.add_argument("--quickstart", action="store_true", help="time scripts/quickstart.sh instead of a search")
    args = parser.parse_args()
    if args.steps % 5:
        parser.error(f"--steps {args.steps}: must be a multiple of 5, the steps of a log interval")
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for others in args.others:
            for spin in args.spin:
                if args.quickstart:
                    taken = quickstart_seconds(args.threads, spin, others)
                else:
                    taken = milliseconds(args.threads, spin, others, args.steps)
                seconds.setdefault((spin, others), []).append(taken)
    for spin in args.spin:
        reference = median(seconds[spin, args.others[0]])
        for others in args.others:
            taken = median(seconds[spin, others])
            unit = "s" if args.quickstart else "ms a step"
            setting = f"spin {spin:>8}, threads {args.threads}, beside {others}"
            print(f"{setting}: {taken:7.1f} {unit}, {taken / reference:.2f} times")


if __name__ == "__main__":
    main()
