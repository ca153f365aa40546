"""Tests that the readers of runs and studies return all valid records and results, and skip everything else."""

import json

import pytest

from experiment import metrics


def test_incomplete_last_record_is_ignored(tmp_path):
    record = {"kind": "epoch", "epoch": 1, "valid_ppl": 5.0, "seconds": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n" + '{"kind": "epo')
    assert metrics.epochs(tmp_path) == [record]
    assert metrics.seconds(tmp_path) == 2.5
    assert metrics.seconds(tmp_path / "nowhere") == 0
    assert metrics.result(tmp_path) is None


DAMAGED = (
    "", "{", "[]", "{}", '{"valid_ppl": 5, "test_ppl": 5}', '{"valid_ppl": 5, "genotype": "LSTM"}',
    '{"valid_ppl": "5", "test_ppl": 5, "genotype": "LSTM"}', '{"valid_ppl": NaN, "test_ppl": 5, "genotype": "LSTM"}',
    '{"valid_ppl": 5, "test_ppl": 5, "genotype": {"recurrent": 1}}',
)  # fmt: skip


@pytest.mark.parametrize(("recorded", "shares"), [
    ({"valid": 0.5, "test": 0.0}, {"valid": 0.5}), ({"valid": None, "test": 0.01}, {"test": 0.01}), ({}, {}),
    ({"valid": "0.5", "test": True, "train": 0.5}, {}), ([0.5], {}), (None, {}),
])  # fmt: skip
def test_unknown_shares_are_the_valid_ones_above_zero(recorded, shares):
    assert metrics.unknown_shares({"unknown_share": recorded}) == shares


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_result_is_read_as_none(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    assert metrics.result(tmp_path) is None


INVALID = (
    "[]", "7", "{}", '{"kind": 3}', '{"kind": "epoch", "seconds": "x"}', "[" * 100_000,
    '{"trial": []}', '{"trial": "a"}', '{"trial": "a", "event": 3}', '{"trial": "a", "event": "done"}',
)  # fmt: skip


@pytest.mark.parametrize("line", INVALID)
def test_invalid_lines_are_skipped(line, tmp_path):
    good = {"kind": "epoch", "epoch": 1, "valid_ppl": 5.0, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(good)}\n")
    assert metrics.epochs(tmp_path) == [good]
    enormous = json.dumps({**good, "valid_ppl": 10**400})
    (tmp_path / "metrics.jsonl").write_text(f"{enormous}\n{json.dumps(good)}\n")
    assert metrics.epochs(tmp_path) == [good]
    event = {"trial": "select/a/1", "event": "done", "valid_ppl": 3.0}
    (tmp_path / metrics.EVENTS).write_text(f"{line}\n{json.dumps(event)}\n")
    assert metrics.events(tmp_path) == [event]
