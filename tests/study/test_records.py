"""Tests that trials.jsonl restores what it can and skips what is not a line of it."""

import json

import pytest

from experiment import metrics
from study.jobs import Job, name_parts
from study.records import ARCHIVE, archive, restore

EPOCH = {"kind": "epoch", "epoch": 1, "valid_ppl": 5.0, "seconds": 2.5}
RESULT = {"valid_ppl": 5.0, "test_ppl": None, "genotype": "LSTM"}


def test_restored_trial_has_the_result_and_the_epochs_and_is_done(tmp_path):
    job = Job("select/first-1/1", "train.py", ("--lr", "1"))
    folder = tmp_path / "a" / job.name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "interval", "seconds": 1.0}\n' + json.dumps(EPOCH) + "\n")
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "config.json").write_text(json.dumps({"flags": {}, "threads": 1, "hardware": "x86_64, AVX2"}))
    archive(tmp_path / "a", job)
    [line] = metrics.lines(tmp_path / "a" / ARCHIVE)
    assert line["ran_on"] == {"threads": 1, "hardware": "x86_64, AVX2"}
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / ARCHIVE).rename(tmp_path / "b" / ARCHIVE)
    assert restore(tmp_path / "b") == [job.name]
    assert job.is_done(tmp_path / "b")
    assert metrics.result(tmp_path / "b" / job.name) == RESULT
    assert metrics.epochs(tmp_path / "b" / job.name) == [EPOCH]
    assert restore(tmp_path / "b") == []


def test_last_line_of_a_trial_counts_and_existing_directories_remain(tmp_path):
    lines = [{"trial": "search/a/1", "epochs": [], "result": {**RESULT, "valid_ppl": ppl}} for ppl in (5.0, 4.0)]
    other = {"trial": "search/b/1", "epochs": [], "halved": {"epoch": 1, "valid_ppl": 3.0}}
    (tmp_path / ARCHIVE).write_text("".join(json.dumps(line) + "\n" for line in (*lines, other)))
    (tmp_path / "search/b/1").mkdir(parents=True)
    assert restore(tmp_path) == ["search/a/1"]
    assert metrics.result(tmp_path / "search/a/1")["valid_ppl"] == 4.0
    assert list((tmp_path / "search/b/1").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../a/1",
        "search/" + "x" * 101 + "/1",
        "search/a\0/1",
        "search/../1",
        "search/a/../../x",
        "/search/a/1",
        "search/a",
        "search/./1",
        "other/a/1",
        3,
        None,
    ],
)
def test_lines_with_other_names_write_nothing(name, tmp_path):
    assert name_parts(name) is None
    (tmp_path / "study").mkdir()
    line = {"trial": name, "epochs": [EPOCH], "result": RESULT}
    (tmp_path / "study" / ARCHIVE).write_text(f"[]\n{{\n{json.dumps(line)}\n" + json.dumps({"trial": "search/a/1"}))
    assert restore(tmp_path / "study") == []
    assert [path.name for path in tmp_path.rglob("*")] == ["study", ARCHIVE]


def test_names_of_trials_have_a_stage_a_cell_and_a_seed():
    assert name_parts("select/first-1/2") == ("select", "first-1", "2")
    assert name_parts("proxy/full/DARTS/2") == ("proxy", "full", "DARTS", "2")
