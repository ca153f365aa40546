"""One writer for a run directory: a lock that the operating system takes back when its process ends, in any way."""

import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

NAME = "lock"


class Locked(Exception):
    """Another process writes to the directory; the message says which."""


class Lock:
    """Held from its making to the end of the process, or to `release`. Raises `Locked`.

    The file stays when the lock is gone; what it says counts for nothing then.
    """

    def __init__(self, folder: Path):
        self.file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as it is held)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = said(self.file)
            self.file.close()
            raise Locked(f"{folder} is in use by {owner}") from error
        except OSError as error:  # a file system that has no locks
            print(f"note: {folder} cannot be locked ({error.strerror}); let one process at a time use it",
                  file=sys.stderr)  # fmt: skip
        try:
            self.file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, self.file)
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder / NAME)) from error

    def release(self) -> None:
        self.file.close()


def owner(folder: Path) -> str | None:
    """Which process writes to the directory; None if none does."""
    try:
        with open(folder / NAME, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return said(file)
    except OSError:
        pass  # no such file, or no locks
    return None


def said(file: TextIO) -> str:
    """The process that a lock file names."""
    file.seek(0)
    try:
        holder = json.loads(file.read(1000))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (ValueError, LookupError, TypeError):
        return "another process"
