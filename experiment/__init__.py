"""Runs one search or training: its flags, its start and resumption, its directory and its checkpoints.

Importing this package ends a script on a system that is not supported; each script imports it before the algorithm.
"""

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any


def unsupported(version: tuple[int, ...], platform: str) -> str | None:
    """Returns one line that says why a Python version or a platform (of `sys`) is not supported, or None if it is."""
    if version < (3, 11):
        return f"Python 3.11 or newer is needed, and this is {version[0]}.{version[1]}"
    if platform == "win32":
        return "Windows is not supported; use the Windows Subsystem for Linux (WSL)"
    return None


def end_at_once(number: int, frame: Any) -> None:
    """Ends the process on Ctrl-C, without the traceback of whatever is being imported."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def set_up_terminal() -> None:
    """Sets up the terminal of a script that begins: Ctrl-C raises KeyboardInterrupt, stdout prints an escape for a
    letter that the terminal lacks, such as one of a path, and a stdout or stderr that is closed discards all output."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (
        open(os.devnull, "w") if file is None else file  # noqa: SIM115 (open for as long as the process runs)
        for file in (sys.stdout, sys.stderr)
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_unwritable_output() -> None:
    """Flushes stdout. If that fails, redirects it to the null device, since Python would flush it again at exit and
    report the failure."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_script_here() -> bool:
    """Returns whether this process runs one of the repository's scripts, rather than a program that imports it."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is not None and Path(script).resolve().parent == Path(__file__).resolve().parent.parent


if is_script_here() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)  # importing torch takes seconds
if fault := unsupported(sys.version_info, sys.platform):
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)
