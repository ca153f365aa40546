"""Handles how a script ends: on a signal, out of memory, on a fault of its environment, or when it is done."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from experiment import checkpoint, discard_unwritable_output, set_up_terminal
from engine.memory import out_of_memory
from experiment.distributed import exit_process
from utils import RunError


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) into `requested`, which the loop checks between two steps.
    After the first signal, Ctrl-C acts at once. A signal that torchrun forwards may arrive twice."""

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


def run_script(main: Callable[[], int], advice: str = "a smaller --emsize, --n_experts or --small_batch_size") -> int:
    """Runs a script and returns its exit code; faults of its environment print one line instead of a traceback.

    The code is that of `main`, 130 if it is interrupted, 141 if nothing reads its output any more, and 1 for a
    `RunError`, a `CheckpointError`, an OSError or a lack of memory, against which the line gives
    this advice. Other errors propagate. One of several ranks exits here and does not return.
    """
    set_up_terminal()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    code = 1
    try:
        done = main()
        sys.stdout.flush()
        code = done
    except (RunError, checkpoint.CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:  # raised before the first step, when the weights are created
        if not out_of_memory(error):
            raise
        print(f"error: out of memory; take {advice}", file=sys.stderr)
    except BrokenPipeError:  # such as that of `| head`
        discard_unwritable_output()
        code = 141  # that of a process that SIGPIPE ends
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        discard_unwritable_output()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as end:  # of refused flags, or of --help
        code = int(end.code or 0)
    return exit_process(code)
