"""Helpers of several tests: a synthetic corpus, calls of a script, readers of a run's files and synthetic records."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiment.checkpoint import CheckpointError
from genotypes import PRIMITIVES
from training.diagnostics import Signal
from utils import RunError

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("FULL_TESTS") == "1"  # scripts/test_all.sh: property tests and kills at full length
# These flags give a model so small that a run of either script takes a second. The fused engine, which takes twice as
# long as the eager one where its kernels are not compiled, is for the tests that ask for it.
SIZES = "--emsize 8 --batch_size 4 --bptt 6 --log_interval 3 --device cpu --engine eager".split()
TIMINGS = {"seconds", "tokens_per_s"}  # equal runs may differ in these values alone


class Kill(BaseException):
    """Stands for SIGKILL: no handler of the scripts catches it, so that only the files on disk survive."""


def kill():
    raise Kill


def examples(count):
    """Returns how many examples a property test takes: `count` at full length, and a third of it by default."""
    return count if FULL else count // 3


def run_compiling(code, prefix=(), **environment):
    """Runs the code in a separate Python process that compiles kernels; all other tests run them uncompiled. The
    command of that process follows `prefix`."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "TORCH_COMPILE_DISABLE": "0", **environment},
    )  # fmt: skip


def write_corpus(folder, **lines):
    """Writes train.txt, valid.txt and test.txt with the given numbers of lines; each line has nine words, and the words
    are not equally likely."""
    rng = random.Random(0)
    for split, count in lines.items():
        text = "\n".join(" ".join(rng.choices("abcdefgh", weights=range(8, 0, -1), k=9)) for _ in range(count))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder


def without_timings(record):
    return {key: value for key, value in record.items() if key not in TIMINGS}


def read_records(folder, kind=None):
    """Returns the records of a run's metrics.jsonl: all of them, or those of one kind."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if kind in (None, record["kind"])]


def outcome(folder):
    """Returns the contents of a run's files without the timings, so that two runs can be compared bit by bit."""
    files = {name: (folder / name).read_bytes() for name in ("last.pt", "best.pt", "genotype.json")
             if (folder / name).exists()}  # fmt: skip
    files["result.json"] = without_timings(json.loads((folder / "result.json").read_text()))
    assert list(folder.glob(".*")) == []  # no temporary file is left
    files["metrics.jsonl"] = list(map(without_timings, read_records(folder)))
    return files


def write_records(folder, records):
    """Writes the records to metrics.jsonl in a folder, which it creates, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def most_likely(probabilities):
    """Derives the most likely cell from the probabilities of the edges, with plain loops, as JSON."""
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


def search_records(epochs, each=2, nodes=8, seed=0, diagnosed=True):
    """Returns records such as a search writes to metrics.jsonl; the alphas follow a random walk."""
    rng, records, step = random.Random(seed), [], 0
    alphas = [[rng.gauss(0, 0.01) for _ in PRIMITIVES] for _ in range(nodes * (nodes + 1) // 2)]
    for epoch in range(1, epochs + 1):
        for k in range(each + 1):
            step += 7 + (k == 1)
            alphas = [[a + rng.gauss(0, 0.1) for a in edge] for edge in alphas]
            powers = [[math.exp(a) for a in edge] for edge in alphas]
            probabilities = [[round(p / sum(edge), 5) for p in edge] for edge in powers]
            record = {
                "epoch": epoch, "step": step, "seconds": 0.5 * step, "lr": 20 / epoch / (1 + k),
                "loss": 7 - 0.01 * step, "ppl": math.exp(7 - 0.01 * step), "genotype": most_likely(probabilities),
                "probabilities": probabilities,
            }  # fmt: skip
            if k < each:
                records.append(
                    {"kind": "interval", **record, "rate": 20 / epoch, "norm": rng.uniform(0.1, 3), "tokens_per_s": 1e4}
                )
            else:
                valid = 6.9 - 0.01 * step
                records.append({"kind": "epoch", **record, "valid_loss": valid, "valid_ppl": math.exp(valid)})
        if diagnosed:
            values = {name: rng.uniform(0.1, 1) for name in Signal._fields}
            records.append({"kind": "diagnosis", "epoch": epoch, "step": step, "seconds": 0.5 * step, **values})
    return records


def train_records(epochs, first=300.0, last=70.0, averaged=None):
    """Returns records such as a retraining writes to metrics.jsonl; from epoch `averaged` + 1 on it averages its
    weights."""
    values = [first * (last / first) ** (epoch / epochs) for epoch in range(1, epochs + 1)]
    return [
        {"kind": "epoch", "epoch": epoch, "step": 50 * epoch, "seconds": 9.0 * epoch, "loss": math.log(value), "lr": 20,
         "ppl": value, "valid_loss": math.log(value), "valid_ppl": value,
         "phase": "asgd" if averaged is not None and epoch > averaged else "sgd"}
        for epoch, value in enumerate(values, start=1)
    ]  # fmt: skip


def finish(process):
    """Waits for a process, asserts that its exit code is 0 and returns its output."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def copy_scripts(folder, body, *requirements):
    """Copies scripts/ to `folder`, with a .venv whose Python is a shell script with this body, and where each of the
    files of requirements, which are empty, counts as installed."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in requirements:
        (folder / name).write_text("")
        (folder / ".venv" / f"{name}.installed").write_text("")


def wait_for(holds, process, seconds=120):
    """Polls `holds` while the process runs, until its value is true, and returns that value."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)
    return value


def call(script, *flags):
    """Returns the exit code, stdout and stderr of a script; an exception that it does not handle fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
        except (CheckpointError, RunError) as error:  # run_script prints these errors as one line and returns 1.
            code = 1
            print(error, file=err)
    return code, out.getvalue(), err.getvalue()
