"""Tests what each step of a search and of a retraining computes, and from when on the weights are averaged."""

import itertools

import pytest
import torch
from helpers import read_records
from small_runs import SCRIPTS, run
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_search
from experiment import checkpoint, metrics, processor
from training.optimizers import saved_average

AT_ONCE = {"train": "", "search": "--arch_start 0"}  # The alphas of a search move from its first step on.


@pytest.mark.parametrize("kind", SCRIPTS)
def test_weight_step_is_taken_at_the_recorded_rate_of_its_length(kind, corpus, tmp_path):
    rates = []

    def note(optimizer, *_):
        if type(optimizer) is torch.optim.SGD:
            rates.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(note)
    try:
        folder = run(
            kind, corpus, tmp_path / "run", f"--optimizer sgd --lr 3 --epochs 1 --log_interval 1 {AT_ONCE[kind]}"
        )
    finally:
        hook.remove()
    assert rates == [record["lr"] for record in read_records(folder, "interval")]
    assert len(set(rates)) > 1


def test_both_steps_of_a_search_have_one_loss_and_the_difference_is_in_fp32(corpus, tmp_path, monkeypatch):
    """A search step computes five losses: of the training batch, the validation batch, the two ends of the central
    difference, and the training batch again for the weights."""
    seen, micro_batches = [], train_search.MicroBatches

    def spy(model, batch, micro_batch_size, **coefficients):
        seen.append((model.engine.precision, micro_batch_size, coefficients, batch))
        return micro_batches(model, batch, micro_batch_size, **coefficients)

    monkeypatch.setattr(train_search, "MicroBatches", spy)
    monkeypatch.setattr(processor, "has_fast_bf16", lambda device: True)
    flags = "--unrolled --alpha 0.2 --beta 0.1 --small_batch_size 2 --arch_start 0 --epochs 1 --lr 1 --limit_tokens 100"
    run("search", corpus, tmp_path / "run", f"{flags} --engine fused --precision bf16")
    both = {"alpha": 0.2, "beta": 0.1}
    assert len(seen) >= 10 and len(seen) % 5 == 0
    for step in zip(*[iter(seen)] * 5, strict=True):
        precisions, sizes, coefficients, batches = zip(*step, strict=True)
        assert precisions == ("bf16", "bf16", "fp32", "fp32", "bf16")
        assert set(sizes) == {2}
        assert coefficients == (both, {}, both, both, both)
        first, _, plus, minus, weights = batches
        assert plus is minus is first and first.masks.relu is not None and weights.masks.relu is None
        assert torch.equal(weights.x, first.x) and not torch.equal(weights.masks.hidden, first.masks.hidden)


def test_average_after_disregards_the_validation_loss(corpus, tmp_path, monkeypatch):
    rising = itertools.count(1.0, 0.1)  # by these losses NT-ASGD would switch after the seventh epoch
    monkeypatch.setattr(
        "experiment.experiment.evaluate",
        lambda model, text, bptt, name: next(rising) if name == "valid" else 1.0,
    )
    folder = run("train", corpus, tmp_path / "run", "--lr 3 --average_after 9 --epochs 10 --limit_tokens 100")
    assert [record["phase"] for record in read_records(folder, "epoch")] == ["sgd"] * 9 + ["asgd"]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_averaging_run_evaluates_and_saves_the_averaged_weights(kind, corpus, tmp_path):
    """best.pt has the averaged weights, and last.pt the raw ones, from which training resumes."""
    folder = run(kind, corpus, tmp_path / "run", f"--optimizer asgd --lr 3 --epochs 2 {AT_ONCE[kind]}")
    best, last = (checkpoint.load(folder / name) for name in ("best.pt", "last.pt"))

    def is_average(state):
        weights = [w for name, w in state["model"].items() if name != "cell.alphas"]
        return all(map(torch.equal, weights, saved_average(state["optimizer"])))

    assert is_average(best) and not is_average(last)
    ppls = [record["valid_ppl"] for record in read_records(folder, "epoch")]
    expected = ppls[-1] if kind == "search" else min(ppls)
    assert metrics.result(folder)["valid_ppl"] == pytest.approx(expected)
