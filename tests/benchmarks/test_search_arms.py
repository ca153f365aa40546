"""benchmarks/search_arms.py runs only what its results file lacks, and its table summarizes the results."""

import json
import sys

import pytest
from helpers import ROOT, write_corpus

sys.path.insert(0, str(ROOT / "benchmarks"))
import search_arms

from genotypes import random_genotype, resolve_cell, to_json


def train_record(genotype, ppl, flags="--epochs 1"):
    return {"kind": "train", "genotype": to_json(genotype), "flags": flags, "seed": 1, "valid_ppl": [2 * ppl, ppl]}


def search_record(arm, genotype, seed, cosines):
    signal = [{"step": 10 * n, "cosine_whole": c, "sensitivity": 2.0} for n, c in enumerate(cosines, start=1)]
    return {"kind": "search", "arm": arm, "flags": "", "seed": seed, "genotype": to_json(genotype), "signal": signal}


def write_records(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("predecessors", "depth"), [((0, 0, 0), 1), ((0, 1, 2), 2), ((0, 1, 1, 0), 1.5)])
def test_mean_depth_of_a_cell(predecessors, depth):
    assert search_arms.mean_depth({"recurrent": [["tanh", j] for j in predecessors]}) == depth


def test_table_compares_cells_trained_with_equal_flags(tmp_path, capsys):
    cell_1, cell_2 = random_genotype(5000), random_genotype(5001)
    lines = [train_record(random_genotype(n), 50 + n) for n in range(4)]
    lines += [train_record(resolve_cell("DARTS"), 55), train_record(cell_1, 41), train_record(cell_2, 43)]
    lines += [train_record(cell_1, 20, "--epochs 9"), train_record(random_genotype(0), 30, "--epochs 9")]
    lines += [search_record("mine", cell_1, 1, [0.5, None]), search_record("mine", cell_2, 2, [0.9, 0.7])]
    search_arms.table([write_records(tmp_path / "one.jsonl", lines)])
    out = capsys.readouterr().out.splitlines()
    [first, second] = [row.split("|") for row in out if row.startswith("| mine") and row.count("|") > 6]
    # This is the smallest two-sided p of two values against four, which can be split in 15 ways.
    assert [entry.strip() for entry in first[2:8]] == ["2", "42.00", "1.41", "41.00", "42.00", f"{2 / 15:.4f}"]
    assert first[9].strip() == "0.70"
    assert [entry.strip() for entry in second[2:6]] == ["1", "20.00", "", "20.00"]
    assert any(row.startswith("| random | 4 | 51.50 |") for row in out)
    assert any(row.startswith("| DARTS | 1 | 55.00 |") for row in out)
    assert "| mine | 10 | 0.70 | 2.0e+00 |" in out and "| mine | 20 | 0.70 | 2.0e+00 |" in out
    assert any("mean depth" in row and "tanh" in row for row in out)

    search_arms.table([tmp_path / "one.jsonl"], seeds=range(2, 3))
    [only, *_] = [row.split("|") for row in capsys.readouterr().out.splitlines() if row.startswith("| mine")]
    assert [entry.strip() for entry in only[2:4]] == ["1", "43.00"]


def test_table_shows_what_shorter_searches_would_have_found(tmp_path, capsys):
    early, late = random_genotype(5000), random_genotype(5001)
    lines = [train_record(random_genotype(n), 50 + n) for n in range(3)]
    lines += [train_record(early, 47), train_record(late, 44), search_record("mine", late, 1, [])]
    lines[-1]["genotypes"] = [
        to_json(cell) for cell in (random_genotype(5002), early, late)
    ]  # the first is not trained
    search_arms.table([write_records(tmp_path / "one.jsonl", lines)])
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines() if row.startswith("| mine")]
    assert [[entry.strip() for entry in row[1:4]] for row in rows] == [
        ["mine", "1", "44.00"],
        ["mine, after 2 epochs", "1", "47.00"],
    ]


def test_runs_in_the_results_file_are_not_repeated(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path, train=40, valid=16, test=16)
    monkeypatch.setattr(search_arms, "SIZES", "--emsize 8 --batch_size 4 --bptt 6 --lr 1 --device cpu --engine eager")
    monkeypatch.setattr(sys, "argv", [
        "search_arms.py", "run", "--out", str(tmp_path / "one.jsonl"), "--data", str(corpus), "--seeds", "1",
        "--random_cells", "2", "--train_epochs", "2", "--search_flags", "--epochs 1 --diagnose_every 4",
        "--arm", "first=--norm none", "--jobs", "2", "--lengths", "1",
    ])  # fmt: skip
    assert search_arms.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert sorted(line["kind"] for line in lines) == ["search", "train", "train", "train"]
    [search] = [line for line in lines if line["kind"] == "search"]
    assert len(search["genotypes"]) == 1 and search["signal"][0]["step"] == 4
    assert all(len(line["valid_ppl"]) == 2 for line in lines if line["kind"] == "train")
    capsys.readouterr()
    monkeypatch.setattr(search_arms, "run_script", None)  # No run is missing, so none may start.
    assert search_arms.main() == 0
    assert capsys.readouterr().out == ""


def test_failed_run_exits_with_its_command_and_log(tmp_path, monkeypatch):
    monkeypatch.setattr(search_arms, "mkdtemp", lambda prefix: str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"train.py --arch .*: exit code 2, see .*run.out"):
        search_arms.run_script("train.py", "--arch nothing --device cpu", 1)
