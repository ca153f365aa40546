"""A lock that lets one process write to a run directory; the operating system releases it when that process ends."""

import fcntl
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from utils import with_filename

NAME = "lock"


class Locked(Exception):
    """Raised when another process holds the lock of a directory; the message names both."""


def acquire(folder: Path) -> TextIO:
    """Locks `folder` until the file that is returned is closed, and writes the process and host to that file.

    The file stays when the lock is released, and its content has no meaning then. On a file system without locks this
    prints a note and locks nothing. Raises `Locked` if another process holds the lock, OSError that names the file if
    it cannot be written.
    """
    file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = read_owner(file)
        file.close()
        raise Locked(f"{folder} is in use by {holder}") from error
    except OSError as error:  # The file system has no locks.
        print(f"note: {folder} cannot be locked ({error.strerror}); let one process at a time use it", file=sys.stderr)
    try:
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
    except OSError as error:
        raise with_filename(error, folder / NAME) from error
    return file


def owner(folder: Path) -> str | None:
    """Returns the process that holds the lock of `folder`, for a message; None if none does or there are no locks."""
    with suppress(OSError), open(folder / NAME, encoding="utf-8") as file:  # without a lock file or locks it fails
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_owner(file)
    return None


def read_owner(file: TextIO) -> str:
    """Returns the process and host that an open lock file names, for a message."""
    file.seek(0)
    try:
        return owner_in(file.read(1000))
    except ValueError:
        return "another process"


def owner_in(text: str) -> str:
    """Returns the process and host that the content of a lock file names. Raises ValueError if it names none."""
    try:
        holder = json.loads(text)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("names no process") from error


def is_lock(path: Path) -> bool:
    """Returns whether a file named `NAME` is a lock file, rather than a file of the user's with that name."""
    try:
        if not path.is_file() or path.stat().st_size > 1000:
            return False
        text = path.read_text(encoding="utf-8")
        return not text or bool(owner_in(text))
    except (OSError, ValueError):
        return False
