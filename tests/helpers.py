"""What tests of whole runs share: a made-up language to train on, and what a run leaves behind."""

import json
import math
import random
import time
from pathlib import Path

from genotypes import PRIMITIVES
from training.diagnostics import Signal

ROOT = Path(__file__).parent.parent
# Flags of a model so small that a run of either script takes a second.
SIZES = "--emsize 8 --batch_size 4 --bptt 6 --log_interval 3 --device cpu".split()
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


def write_rows(folder, rows):
    """metrics.jsonl of these."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def most_likely(probabilities):
    """The cell that alphas point to, by loops, as JSON."""
    recurrent, edge = [], 0
    while edge < len(probabilities):
        best = None
        for j in range(len(recurrent) + 1):
            for op, p in list(zip(PRIMITIVES, probabilities[edge], strict=True))[1:]:
                if best is None or p > best[0]:
                    best = p, op, j
            edge += 1
        recurrent.append([best[1], best[2]])
    return {"recurrent": recurrent, "concat": list(range(1, len(recurrent) + 1))}


def search_rows(epochs, each=2, nodes=8, seed=0, diagnosed=True):
    """Rows of metrics.jsonl such as a search writes, of alphas that wander."""
    rng, found, step = random.Random(seed), [], 0
    alphas = [[rng.gauss(0, 0.01) for _ in PRIMITIVES] for _ in range(nodes * (nodes + 1) // 2)]
    for epoch in range(1, epochs + 1):
        for k in range(each + 1):
            step += 7 + (k == 1)
            alphas = [[a + rng.gauss(0, 0.1) for a in edge] for edge in alphas]
            powers = [[math.exp(a) for a in edge] for edge in alphas]
            probabilities = [[round(p / sum(edge), 5) for p in edge] for edge in powers]
            row = {
                "epoch": epoch, "step": step, "seconds": 0.5 * step, "lr": 20 / epoch / (1 + k),
                "loss": 7 - 0.01 * step, "ppl": math.exp(7 - 0.01 * step), "genotype": most_likely(probabilities),
                "probabilities": probabilities,
            }  # fmt: skip
            if k < each:
                found.append(
                    {"kind": "interval", **row, "rate": 20 / epoch, "norm": rng.uniform(0.1, 3), "tokens_per_s": 1e4}
                )
            else:
                valid = 6.9 - 0.01 * step
                found.append({"kind": "epoch", **row, "valid_loss": valid, "valid_ppl": math.exp(valid)})
        if diagnosed:
            values = {name: rng.uniform(0.1, 1) for name in Signal._fields}
            found.append({"kind": "diagnosis", "epoch": epoch, "step": step, "seconds": 0.5 * step, **values})
    return found


def train_rows(epochs, first=300.0, last=70.0, averaged=None):
    """Such as a retraining writes, averaging its weights after so many epochs."""
    values = [first * (last / first) ** (epoch / epochs) for epoch in range(1, epochs + 1)]
    return [
        {"kind": "epoch", "epoch": epoch, "step": 50 * epoch, "seconds": 9.0 * epoch, "loss": math.log(value), "lr": 20,
         "ppl": value, "valid_loss": math.log(value), "valid_ppl": value,
         "phase": "asgd" if averaged is not None and epoch > averaged else "sgd"}
        for epoch, value in enumerate(values, start=1)
    ]  # fmt: skip


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
