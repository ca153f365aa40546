"""Protects the compiled kernels on the disk: a file that has changed since it was written is removed, not loaded.

Inductor reads its cache unchecked, and a library that is cut short ends the process as it is loaded.
"""

import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from time import time

CHECKSUMS = "checksums.txt"  # a line for each file, its sha256 and path; the last line of a file counts


def unusable() -> OSError | None:
    """Returns the error of creating the cache's folder, if it cannot be created. Then torch._dynamo is imported with
    another one, to which nothing is written: optimizers need this module, and its import creates the folder."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        os.makedirs(given or tempfile.gettempdir(), exist_ok=True)
    except OSError as error:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parent)
        importlib.import_module("torch._dynamo")

        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if given:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = given
        return error
    return None


UNUSABLE = unusable()


def folder() -> Path:
    """Returns the folder of Inductor's cache, which is created if it is missing. Raises OSError."""
    if UNUSABLE:
        raise UNUSABLE
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


@contextmanager
def checked() -> Iterator[None]:
    """Removes damaged files from the cache, at the first call in this process, and records the files that the block
    adds to it. Raises OSError if the folder cannot be used."""
    from torch._dynamo.utils import counters

    logging.getLogger("torch._inductor.codecache").setLevel(logging.ERROR)  # compiles unreadable files again, at length
    cached, root, since = counters["inductor"]["fxgraph_cache_miss"], folder(), time() - 1
    remove_damaged(root)
    yield
    if counters["inductor"]["fxgraph_cache_miss"] > cached:
        record_checksums(root, since)


def files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yields the name and path of each file in the cache that is written once."""
    for path in root.rglob("*"):
        temporary = path.name.startswith(".") or path.suffix in (".lock", ".tmp")
        if path.is_file() and not temporary and path.name != CHECKSUMS:
            yield path.relative_to(root).as_posix(), path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded(root: Path) -> dict[str, str]:
    """Returns the checksums of files by their names. Lines that are damaged name no file."""
    try:
        lines = (root / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, _, name in (line.partition(" ") for line in lines)}


@cache
def remove_damaged(root: Path) -> None:
    """Removes the files whose checksum is not the one that was recorded. Raises OSError if one cannot be removed."""
    checksums = recorded(root)
    for name, path in files(root):
        with suppress(FileNotFoundError):  # another process has removed it
            if name in checksums and sha256(path) != checksums[name]:
                path.unlink()


def record_checksums(root: Path, since: float) -> None:
    """Records the checksums of the files that were written after the time `since`, so that nothing is hashed that other
    programs keep in the same folder. A folder that cannot be written goes without."""
    with suppress(OSError):
        new = [(name, path) for name, path in files(root) if path.stat().st_mtime >= since]
        with open(root / CHECKSUMS, "a", encoding="utf-8") as file:
            file.write("".join(f"{sha256(path)} {name}\n" for name, path in new))


def discard(error: BaseException) -> None:
    """Removes the library that could not be loaded, if `error` says so, so that the next process compiles it again."""
    with suppress(OSError):
        if isinstance(error, ImportError) and error.path and folder() in Path(error.path).parents:
            Path(error.path).unlink()
