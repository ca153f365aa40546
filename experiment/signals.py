"""How a script ends: asked to stop, out of memory, on a fault of its surroundings or done."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from experiment import checkpoint
from experiment.distributed import exit_process
from utils import RunError


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into `requested`, to be obeyed between two steps; after the first, Ctrl-C acts
    at once. (Slurm sends SIGUSR1 as a warning, where it is asked to, and what torchrun hands on may come twice.)"""

    def __enter__(self) -> "StopSignal":
        self.requested = False
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.previous = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_script(main: Callable[[], int]) -> int:
    """The exit code of a script: what its surroundings did to it gives one line, not a traceback."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    code = 1
    try:
        code = main()
    except (RunError, checkpoint.CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:  # before the first step, when the weights are made
        if not checkpoint.out_of_memory(error):
            raise
        print("error: out of memory; take a smaller --emsize, --n_experts or --small_batch_size", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    return exit_process(code)
