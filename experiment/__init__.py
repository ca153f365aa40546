"""Runs one search or training: its flags, its start and resumption, its directory and its checkpoints.

Importing this package ends a script on a system that is not supported; each script imports it before the algorithm.
"""

import io
import sys


def unsupported(version: tuple[int, ...], platform: str) -> str | None:
    """Returns one line that says why a Python version or a platform (of `sys`) is not supported, or None if it is."""
    if version < (3, 11):
        return f"Python 3.11 or newer is needed, and this is {version[0]}.{version[1]}"
    if platform == "win32":
        return "Windows is not supported; use the Windows Subsystem for Linux (WSL)"
    return None


def escape_unencodable_output() -> None:
    """Makes stdout print an escape for a letter that the terminal lacks, such as one of a path."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if fault := unsupported(sys.version_info, sys.platform):
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)
