"""What tests of whole runs share: a made-up language to train on, and what a run leaves behind."""

import json
import random
import time

TIMES = {"seconds", "tokens_per_s"}  # of what is compared, all that may differ


def write_corpus(folder, **lines):
    """train.txt, valid.txt and test.txt of so many lines of nine words; the words are not equally likely."""
    rng = random.Random(0)
    for split, count in lines.items():
        text = "\n".join(" ".join(rng.choices("abcdefgh", weights=range(8, 0, -1), k=9)) for _ in range(count))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder


def untimed(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def rows(folder, kind=None):
    """Of metrics.jsonl; all, or those of a kind."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if kind in (None, row["kind"])]


def outcome(folder):
    """All that a run leaves, but for what tells the time."""
    found = {name: (folder / name).read_bytes() for name in ("last.pt", "best.pt", "genotype.json")
             if (folder / name).exists()}  # fmt: skip
    found["result.json"] = untimed(json.loads((folder / "result.json").read_text()))
    assert list(folder.glob(".*")) == []  # nothing half written is left
    found["metrics.jsonl"] = list(map(untimed, rows(folder)))
    return found


def finish(process):
    """What a process said that ended well."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def wait_for(holds, process, seconds=120):
    """What `holds` gives once that is true, while the process runs."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    return found
