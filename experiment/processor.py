"""Says what a run should know of the processor that it is on: that it lacks fast products in bf16, or that other
processes keep its cores busy, beside which several threads are slower than one.

A thread of OpenMP that waits for the others spins. Where there are more busy threads than cores, it spins in the place
of the thread that it waits for, and a step takes several times as long (benchmarks/NOTES.md has the measurement).
"""

import os
import time
from pathlib import Path

import torch

from engine.matmul import has_fast_bf16

STAT = Path("/proc/stat")  # Linux has it; elsewhere nothing is said.
SECONDS = 0.2  # how long the cores are watched


def usable_precision(precision: str, device: torch.device) -> str:
    """Returns the `precision` that was asked for, or "fp32" in the place of a "bf16" that would be slower there, and of
    the "tf32" of a run that began on CUDA."""
    slower = precision == "bf16" and not has_fast_bf16(device)
    return "fp32" if slower or (precision == "tf32" and device.type == "cpu") else precision


def notes(precision: str, device: torch.device, ranks: int = 1) -> list[str]:
    """Returns the lines that a run which asks for this `precision` should log about its processors, of which it has as
    many as `ranks`."""
    lines = sharing_note(device)
    if ranks > 1 and device.type == "cuda":
        lines.append("note: several ranks run without CUDA graphs, and may be slower than one GPU that has them")
    if usable_precision(precision, device) != precision:
        lines.insert(0, f"note: --precision {precision}: computed in fp32, since this processor has no fast products"
                        f" in {precision}")  # fmt: skip
    return lines


def busy_ticks(stat: str, cores: set[int]) -> int:
    """Returns the clock ticks that these cores have been busy according to the text of /proc/stat (see proc_stat(5)),
    without those of processes of lower priority (`nice`), which give way."""
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, _nice, system, _idle, _iowait, *interrupts = map(int, fields[:8])
            ticks += user + system + sum(interrupts)
    return ticks


def cores_taken(cores: set[int], seconds: float = SECONDS) -> float | None:
    """Returns how many of these cores other processes keep busy, measured over `seconds`; None if the system does not
    report it."""
    try:
        before, own, start = busy_ticks(STAT.read_text(), cores), time.process_time(), time.monotonic()
        time.sleep(seconds)
        ticks = busy_ticks(STAT.read_text(), cores) - before
    except (OSError, ValueError):
        return None
    own, elapsed = time.process_time() - own, time.monotonic() - start
    return max(0.0, (ticks / os.sysconf("SC_CLK_TCK") - own) / elapsed)


def sharing_note(device: torch.device) -> list[str]:
    """Returns a line if this process has more threads on the CPU than other processes leave cores for, unless the user
    has chosen their number by OMP_NUM_THREADS."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or "OMP_NUM_THREADS" in os.environ or not STAT.exists():
        return []
    cores = os.sched_getaffinity(0)
    taken = cores_taken(cores)
    if taken is None or threads <= len(cores) - taken + 0.5:  # Half a core is within what a short look can tell.
        return []
    free = max(1, round(len(cores) - taken))
    return [
        f"note: other processes keep {taken:.1f} of the {len(cores)} CPU cores busy; {threads} threads, which wait for"
        f" one another, may be several times slower beside them than OMP_NUM_THREADS={free}"
    ]
