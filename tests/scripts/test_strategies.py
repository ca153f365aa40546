"""Tests of whole runs with each training strategy: resuming, flags, combinations, stopping rules and refusals."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import SIZES, Kill, kill, outcome, read_records
from small_runs import SCRIPTS, run

import evaluate
import train
import train_search
from experiment import arguments, checkpoint, experiment
from architect import Architect
from data import load_corpus
from engine.dropout import DropoutRates
from engine.reference import NORMS
from genotypes import from_json
from model_search import RNNModelSearch, derive
from training import evaluation
from training.lr_schedule import DECAYS, SHAPES
from training.optimizers import OPTIMIZERS as SEARCH_OPTIMIZERS
from utils import batchify

OPTIMIZERS = ("ntasgd", *SEARCH_OPTIMIZERS)
RATE = {"momentum": 0.3, "adam": 0.01, "adamw": 0.01}  # learning rates for a model of this size; that of SGD is 3


@pytest.fixture(autouse=True)
def cells_of_three_nodes(monkeypatch):
    """Gives the relaxed cell three nodes: what a strategy does and a run saves does not depend on their number."""
    monkeypatch.setattr(train_search, "RNNModelSearch", partial(RNNModelSearch, steps=3))


@pytest.fixture(scope="module")
def first_stage(corpus, tmp_path_factory):
    """The directory of a finished run to fine-tune."""
    return run("train", corpus, tmp_path_factory.mktemp("first") / "run", "--epochs 3 --lr 3 --arch random:4")


def result(folder):
    return json.loads((folder / "result.json").read_text())


# --- killed and resumed ---

TRAIN = [
    "--optimizer sgd --warmup 17 --warmup_start 0.01 --warmup_shape linear --schedule exponential --engine fused",
    "--optimizer asgd --warmup 17 --warmup_shape exponential --warmup_start 0.01 --schedule constant --lr 3",
    "--optimizer adam --lr 0.01 --schedule step --step_size 0.5 --gamma 0.3 --clip_value 0.01 --clip 0.1",
    "--optimizer adamw --lr 0.01 --schedule cosine --final_lr 0.001 --cycle 1 --warmup 5",
    "--optimizer momentum --momentum 0.5 --lr 1 --schedule polynomial --final_lr 0.5 --power 2",
    "--schedule plateau --plateau_patience 0 --gamma 0.1 --lr 20 --arch DARTS_V1",
    "--optimizer ntasgd --schedule cosine --warmup 20 --nonmono 1 --lr 20 --epochs 5",
    "--clip 0 --lr 0.3 --limit_tokens 100", "--patience 2 --min_delta 0.01 --lr 20 --epochs 6",
    "--rdrop 0.7 --fraternal 2 --n_experts 3 --small_batch_size 2 --engine fused", "--rdrop 0.7 --arch LSTM",
    "--fraternal 0.7 --arch GRU", "--average_after 1 --lr 3 --epochs 3",
    "--finetune FIRST --nonmono 1 --epochs 4 --engine fused",
]  # fmt: skip
SEARCH = [
    *(f"--optimizer {name} --lr {RATE.get(name, 3)}" for name in ("asgd", "adam", "adamw")),
    "--unrolled --optimizer momentum --momentum 0.5 --lr 1 --clip_value 0.01 --warmup 7 --schedule cosine --epochs 2"
    " --engine fused",
    "--schedule plateau --patience 1 --lr 20 --epochs 5", "--stop_stable 1 --arch_start 0 --epochs 4 --arch_lr 1e-4",
    "--max_identity 1 --norm batch --init_range 0.04 --arch_start 0 --seed 6 --arch_lr 0.1 --epochs 5",
    "--limit_tokens 100 --search_split train", "--arch_batch_size 8 --unrolled --derive_from last --bptt 4",
    *(f"--norm {norm} --unrolled --arch_start 1 --epochs 3 --stop_stable 1 --engine fused" for norm in NORMS),
]  # fmt: skip
SHORT = SEARCH[:1] + SEARCH[3:4] + SEARCH[7:8]  # the searches that scripts/test.sh kills


def test_killed_retrainings_have_every_optimizer_and_schedule():
    flags = " ".join(TRAIN)
    names = {"optimizer": OPTIMIZERS, "schedule": DECAYS, "warmup_shape": SHAPES}
    assert [name for flag, all_of_it in names.items() for name in all_of_it if f"--{flag} {name}" not in flags] == []


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        *(("train", flags) for flags in TRAIN),
        *(pytest.param("search", flags, marks=() if flags in SHORT else pytest.mark.slow) for flags in SEARCH),
    ],
)
def test_killed_and_resumed_run_is_bit_identical(kind, flags, corpus, first_stage, before_step, tmp_path, monkeypatch):
    """The first kill comes in a step of the second epoch, just after a checkpoint; the second one in that epoch's
    validation."""
    script, base = SCRIPTS[kind], f"--checkpoint_minutes 0 --epochs {2 if kind == 'search' else 3}"
    if "--finetune" not in flags:
        base += " --lr 3"
    flags = f"{base} {flags.replace('FIRST', str(first_stage))}"
    expected = outcome(run(kind, corpus, tmp_path / "whole", flags))

    measures = {"evaluate": evaluation.evaluate, "score": evaluation.score}
    steps = result(tmp_path / "whole")["steps"]
    epochs = len(read_records(tmp_path / "whole", "epoch"))
    evaluations = itertools.count(1)

    def dying(measure):
        def dying_measure(model, source, bptt, name, *more):
            if name == "valid" and next(evaluations) == 2:
                raise Kill
            return measure(model, source, bptt, name, *more)

        return dying_measure

    again = tmp_path / "again"
    before_step(script, steps // epochs + 2, kill)
    with pytest.raises(Kill):
        run(kind, corpus, again, flags)
    for name, measure in measures.items():
        monkeypatch.setattr(f"experiment.experiment.{name}", dying(measure))
    with pytest.raises(Kill):
        script.main(["--resume", "--save", str(again), "--data", str(corpus)])
    for name, measure in measures.items():
        monkeypatch.setattr(f"experiment.experiment.{name}", measure)
    assert script.main(["--resume", "--save", str(again)]) == 0
    resumed = outcome(again)
    assert [name for name in expected if resumed[name] != expected[name]] == []


# --- each flag has its effect ---

EFFECTIVE = [*(f"--optimizer {name} --lr {RATE.get(name, 5)}" for name in SEARCH_OPTIMIZERS[1:]),
             "--init_range 0.01", "--schedule exponential", "--wdecay 0.1", "--clip_value 0.01",
             "--warmup 9"]  # fmt: skip
EFFECTIVE_IN_TRAINING = ["--rdrop 0.7", "--fraternal 0.7", "--n_experts 2"]


@pytest.fixture(scope="module")
def losses(corpus, tmp_path_factory):
    """A function that gives the losses and gradient norms of a run with some flags; it runs each set of flags once."""
    cache = {}

    def get(kind, flags):
        if (kind, flags) not in cache:
            base = "--lr 5 --epochs 1 --dropout 0.2 --dropoutx 0.2 --optimizer sgd"
            folder = run(kind, corpus, tmp_path_factory.mktemp("effective") / "run", f"{base} {flags}")
            cache[kind, flags] = [
                (record["loss"], record.get("norm"), record.get("valid_loss")) for record in read_records(folder)
            ]
        return cache[kind, flags]

    return get


@pytest.mark.parametrize(
    ("kind", "flags"),
    [*(("train", f) for f in EFFECTIVE + EFFECTIVE_IN_TRAINING), *(("search", f) for f in EFFECTIVE[-5:])],
)
def test_each_flag_changes_the_losses(kind, flags, losses):
    """An optimizer is compared with SGD at the same rate."""
    without = re.sub(r"--optimizer \w+ ?", "", flags) if "--optimizer" in flags else ""
    assert losses(kind, flags) != losses(kind, without)


def test_adamw_decays_otherwise_than_adam(losses):
    adam, adamw = (f"--optimizer {name} --lr 0.01 --wdecay 0.1" for name in ("adam", "adamw"))
    assert losses("train", adam) != losses("train", adamw)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_deterministic_run_has_deterministic_algorithms_and_the_same_digits(kind, corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain = outcome(run(kind, corpus, tmp_path / "plain", "--epochs 1 --lr 1"))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        deterministic = outcome(run(kind, corpus, tmp_path / "run", "--epochs 1 --lr 1 --deterministic"))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    for name in plain.keys() - {"last.pt", "best.pt"}:  # a checkpoint contains the flags
        assert deterministic[name] == plain[name], name


def test_checkpoint_minutes_are_minutes(corpus, tmp_path, monkeypatch):
    """The clock goes ten seconds further whenever it is read, which each step does once."""
    clock, saved_at, save_last = itertools.count(0, 10), [], experiment.Experiment.save_last
    monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        experiment.Experiment,
        "save_last",
        lambda self, state: saved_at.append(self.progress.step) or save_last(self, state),
    )
    run("train", corpus, tmp_path / "run", "--checkpoint_minutes 1 --epochs 2 --lr 1 --bptt_std 0")
    assert saved_at[:3] == [0, 6, 12] and len(saved_at) < 8


@pytest.mark.parametrize("kind", SCRIPTS)
def test_schedule_gets_the_validation_loss_of_every_epoch(kind, corpus, tmp_path, monkeypatch):
    received = []
    monkeypatch.setattr(arguments.Schedule, "close_epoch", lambda self, loss: received.append(loss))
    folder = run(kind, corpus, tmp_path / "run", "--lr 1 --epochs 2")
    assert received == [record["valid_loss"] for record in read_records(folder, "epoch")]


def test_momentum_coefficient_changes_the_losses(losses):
    one, other = (f"--optimizer momentum --momentum {m} --lr 0.3" for m in (0.5, 0.6))
    assert losses("train", one) != losses("train", other)


def test_retraining_passes_its_coefficients_and_different_masks_to_the_loss(corpus, tmp_path, monkeypatch):
    seen, MicroBatches = [], train.MicroBatches

    def spy(model, batch, size, **coefficients):
        seen.append((batch, {"micro_batch_size": size, **coefficients}))
        return MicroBatches(model, batch, size, **coefficients)

    monkeypatch.setattr(train, "MicroBatches", spy)
    flags = "--rdrop 0.7 --fraternal 0.3 --alpha 0.2 --beta 0.1 --small_batch_size 2 --dropoute 0.5 --epochs 1 --lr 1"
    run("train", corpus, tmp_path / "run", flags)
    expected = {"rdrop": 0.7, "fraternal": 0.3, "alpha": 0.2, "beta": 0.1, "micro_batch_size": 2}
    assert len(seen) > 3 and all(coefficients == expected for _, coefficients in seen)
    for name in ("word", "embedding", "x", "hidden", "output"):
        assert not all(torch.equal(getattr(b.masks, name), getattr(b.second_masks, name)) for b, _ in seen), name


def test_virtual_step_gets_velocity_and_clipping_limits(corpus, tmp_path, monkeypatch):
    seen = []

    class Spy(train_search.Architect):
        def step(self, train, valid, eta, velocity):
            seen.append((self.update.clip_norm, self.update.clip_value, velocity))
            return super().step(train, valid, eta, velocity)

    monkeypatch.setattr(train_search, "Architect", Spy)
    flags = "--unrolled --optimizer momentum --lr 0.1 --clip_value 0.02 --clip 0.5 --epochs 1"
    run("search", corpus, tmp_path / "run", flags)
    assert {(clip, limit) for clip, limit, _ in seen} == {(0.5, 0.02)}
    assert [velocity is None for _, _, velocity in seen] == [True] + [False] * (len(seen) - 1)


@pytest.mark.parametrize(
    ("flags", "position", "rate"),
    [
        ("--warmup 10 --warmup_start 0.5", 0.05, 15.0),
        ("--warmup 10 --warmup_start 0.25 --warmup_shape exponential", 0.05, 10.0),
        ("--schedule step --step_size 2 --gamma 0.3", 2.5, 6.0),
        ("--schedule exponential --gamma 0.5", 2.0, 5.0),
        ("--schedule cosine --final_lr 4", 2.0, 12.0),
        ("--schedule cosine --cycle 1", 2.5, 10.0),
        ("--schedule polynomial --power 2 --final_lr 4", 2.0, 8.0),
    ],
)
def test_schedule_flags_give_the_expected_rate(flags, position, rate):
    """The run has four epochs of a hundred steps; `position` counts epochs."""
    args = train.build_parser().parse_args([*flags.split(), "--epochs", "4"])
    arguments.complete(args, "train")
    assert arguments.schedule(args).rate(round(100 * position), position) == pytest.approx(rate)


def test_plateau_patience_delays_the_decay():
    args = train.build_parser().parse_args("--schedule plateau --plateau_patience 1 --gamma 0.1".split())
    arguments.complete(args, "train")
    schedule, rates = arguments.schedule(args), []
    for loss in (3, 3, 3, 3):
        schedule.close_epoch(loss)
        rates.append(schedule.rate(5, 1.0))
    assert rates == pytest.approx([20, 20, 2, 2])


def test_patience_counts_an_improvement_below_min_delta_as_none(corpus, tmp_path):
    folder = run("train", corpus, tmp_path / "run", "--patience 2 --min_delta 9 --lr 1 --epochs 9")
    assert result(folder)["epochs"] == 3  # the first loss counts as an improvement; no later one is lower by 9


# --- combinations of strategies ---

ENGINES, PASSES = ("fused", "eager"), ("", "--rdrop 0.5")
WARMUPS, MICRO_BATCHES = ("", "--warmup 15", "--warmup 15 --warmup_shape exponential"), ("", "--small_batch_size 2")
COMBINATIONS = [
    (
        optimizer,
        schedule,
        WARMUPS[(i + j) % 3],
        PASSES[(i + j // 3) % 2],
        MICRO_BATCHES[(i // 3 + j) % 2],
        ENGINES[(i + j) % 2],
    )
    for i, optimizer in enumerate(OPTIMIZERS)
    for j, schedule in enumerate(DECAYS)
]


def test_combinations_cover_every_pair_of_settings():
    choices = (OPTIMIZERS, DECAYS, WARMUPS, PASSES, MICRO_BATCHES, ENGINES)
    for a, b in itertools.combinations(range(6), 2):
        pairs = {(settings[a], settings[b]) for settings in COMBINATIONS}
        assert pairs == set(itertools.product(choices[a], choices[b]))


@pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda settings: " ".join(part for part in settings if part))
def test_combined_strategies_reduce_both_losses(settings, corpus, tmp_path):
    """In two epochs every number is finite, and the losses of training and validation fall."""
    optimizer, schedule, warmup, passes, micro_batches, engine = settings
    flags = (
        f"--optimizer {optimizer} --lr {RATE.get(optimizer, 3) / 10} --schedule {schedule} {warmup} {passes} "
        f"{micro_batches} --engine {engine} --epochs 2 --dropout 0.2 --dropoutx 0.2 --dropouth 0.1 --dropoute 0"
    )
    folder = run("train", corpus, tmp_path / "run", flags)
    one, two = read_records(folder, "epoch")
    assert two["loss"] < one["loss"] < math.log(10)
    assert two["valid_loss"] < one["valid_loss"]
    assert all(math.isfinite(x) for record in read_records(folder) for x in record.values() if isinstance(x, float))
    assert all(record["norm"] > 0 for record in read_records(folder, "interval"))


# --- stopping rules ---


def test_patience_stops_the_run_and_reports_the_best_weights(corpus, tmp_path):
    folder = run("train", corpus, tmp_path / "run", "--patience 2 --lr 20 --epochs 40 --arch DARTS")
    final, losses = result(folder), [record["valid_loss"] for record in read_records(folder, "epoch")]
    assert final["stopped_by"] == "patience"
    assert final["epochs"] == len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert final["valid_ppl"] == pytest.approx(math.exp(min(losses)))


@pytest.mark.parametrize("optimizer", ["sgd", "asgd"])
def test_patience_in_search_reports_the_best_weights_and_their_cell(optimizer, corpus, tmp_path):
    flags = f"--optimizer {optimizer} --patience 1 --lr 20 --epochs 40"
    folder = run("search", corpus, tmp_path / "run", flags)
    final, epochs = result(folder), read_records(folder, "epoch")
    best = min(epochs[2:], key=lambda record: record["valid_loss"])  # The alphas move from the third epoch on.
    assert final["stopped_by"] == "patience"
    assert best["epoch"] == len(epochs) - 1
    assert final["valid_ppl"] == pytest.approx(best["valid_ppl"])
    written = json.loads((folder / "genotype.json").read_text())
    assert written["epoch"] == best["epoch"]
    assert written["genotype"] == final["genotype"] == best["genotype"]


def test_epochs_before_arch_start_have_no_genotype_and_do_not_count(corpus, tmp_path, monkeypatch):
    """The first epoch has the lowest loss, and the first two, in which the alphas rest, the genotype of noise."""
    losses, written = iter([1.0, 2.0, 3.0, 2.5, 4.0]), []
    monkeypatch.setattr(
        "experiment.experiment.evaluate", lambda model, text, bptt, name: next(losses) if name == "valid" else 2.0
    )
    write_genotype = train_search.SearchState.write_genotype
    monkeypatch.setattr(
        train_search.SearchState, "write_genotype", lambda *args: written.append(args[1]) or write_genotype(*args)
    )
    flags = "--patience 1 --arch_start 2 --max_identity 8 --lr 1 --epochs 9"
    folder = run("search", corpus, tmp_path / "run", flags)
    assert (result(folder)["stopped_by"], result(folder)["epochs"]) == ("patience", 5)
    assert json.loads((folder / "genotype.json").read_text())["epoch"] == 4
    assert written == [3, 4, 5, 4]
    assert result(folder)["best_valid_ppl"] == pytest.approx(math.exp(2.5))


@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_cell_with_a_node_that_nothing_reads_is_trained_and_evaluated(engine, corpus, tmp_path, capsys):
    cell = "Genotype(recurrent=[('tanh',0),('relu',0)],concat=[2])"
    folder = run("train", corpus, tmp_path / "run", f"--engine {engine} --arch {cell} --epochs 1 --lr 1")
    assert math.isfinite(result(folder)["valid_ppl"])
    assert evaluate.main([str(folder / "best.pt"), "--dynamic", "rms", "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_search_killed_before_its_alphas_move_has_no_cell(before_step, corpus, tmp_path, capsys):
    """The genotype of the random initial alphas is neither logged nor taken by --arch."""
    before_step(train_search, 11, kill)
    with pytest.raises(Kill):
        run("search", corpus, tmp_path / "run", "--lr 1 --epochs 3 --checkpoint_minutes 0")
    assert [record["step"] for record in read_records(tmp_path / "run", "interval")] == [3, 6, 9]
    assert "Genotype" not in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(SystemExit) as caught:
        run("train", corpus, tmp_path / "trained", f"--arch {tmp_path / 'run'}")
    assert caught.value.code == 2 and "a search that has not moved its alphas yet" in capsys.readouterr().err
    assert train_search.main(["--resume", "--save", str(tmp_path / "run")]) == 0
    assert "Genotype" in (tmp_path / "run" / "log.txt").read_text()


def test_resume_with_a_flag_that_is_fixed_names_that_flag_alone(corpus, tmp_path, capsys):
    folder = run("search", corpus, tmp_path / "run", "--lr 1 --epochs 3")
    for flags, message in (
        ("--emsize 16", "--emsize 16: the run in"),
        ("--epochs 2", "--arch_start 2: the alphas would never move in --epochs 2; take more epochs"),
    ):
        with pytest.raises(SystemExit) as caught:
            train_search.main(["--resume", "--save", str(folder), *flags.split()])
        first, *others = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and message in first and "smaller" not in first
        assert len(others) == (flags == "--epochs 2")  # which has passed


def test_run_whose_text_has_moved_asks_for_its_folder(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "text")
    folder = run("train", tmp_path / "text", tmp_path / "run", "--lr 1 --epochs 1")
    (tmp_path / "text").rename(tmp_path / "moved")
    for script, flags in ((train, ["--resume", "--save"]), (evaluate, [])):
        path = folder if script is train else folder / "best.pt"
        with pytest.raises(SystemExit) as caught:
            script.main([*flags, str(path)])
        assert caught.value.code == 2
        assert "text: no such corpus or folder; name the folder that has its train.txt" in capsys.readouterr().err
        assert script.main([*flags, str(path), "--data", str(tmp_path / "moved")]) == 0
    with pytest.raises(SystemExit):
        evaluate.main([str(folder)])
    assert f"{folder}: not a file; name {folder / 'best.pt'}" in capsys.readouterr().err


def test_retraining_of_a_text_without_a_test_split_is_advised_to_skip_it(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "text")
    (tmp_path / "text" / "test.txt").unlink()
    run("search", tmp_path / "text", tmp_path / "run", "--lr 1 --epochs 3 --test skip")
    [advice] = re.findall(r"retrain it with: python train.py (.*)", capsys.readouterr().out)
    assert train.main([*shlex.split(advice), *SIZES, "--epochs", "1", "--save", str(tmp_path / "trained")]) == 0
    with pytest.raises(SystemExit):
        run("train", tmp_path / "text", tmp_path / "other", "--epochs 1")
    assert "missing; --data needs train.txt, valid.txt and, unless skipped, test.txt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SCRIPTS)
def test_resuming_a_stopped_run_changes_nothing(kind, corpus, tmp_path, capsys):
    start = " --arch_start 0" if kind == "search" else ""
    folder = run(kind, corpus, tmp_path / "run", f"--patience 1 --min_delta 9 --lr 1 --epochs 9{start}")
    before = outcome(folder)
    assert "stopped by patience" in capsys.readouterr().out
    assert SCRIPTS[kind].main(["--resume", "--save", str(folder)]) == 0
    assert outcome(folder) == before
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[kind].main(["--resume", "--save", str(folder), "--epochs", "20"])
    assert caught.value.code == 2
    assert "was stopped by patience; start a new run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"history": []}, {"history": [[1, {"recurrent": [["foo", 0]], "concat": [1]}]]}, {"stopped_by": "lol"},
        {"history": [[7, {"recurrent": [["relu", 0]] * 8, "concat": [1]}]]},
    ],
)  # fmt: skip
def test_resume_refuses_a_checkpoint_with_an_invalid_history(change, corpus, tmp_path, capsys):
    folder = run("search", corpus, tmp_path / "run", "--lr 1 --epochs 1")
    checkpoint.save({**checkpoint.load(folder / "last.pt"), **change}, folder / "last.pt")
    with pytest.raises(SystemExit) as caught:
        train_search.main(["--resume", "--save", str(folder)])
    assert caught.value.code == 2
    assert "not the state of this run" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["shape", "missing", "nan"])
def test_finetune_refuses_weights_that_do_not_fit_the_model(spoil, corpus, first_stage, tmp_path, capsys):
    folder = tmp_path / "first"
    shutil.copytree(first_stage, folder)
    saved = checkpoint.load(folder / "best.pt")
    weight = saved["model"]["bias"]
    if spoil == "missing":
        del saved["model"]
    else:
        saved["model"]["bias"] = weight[:-1] if spoil == "shape" else weight * float("nan")
    checkpoint.save(saved, folder / "best.pt")
    with pytest.raises(SystemExit) as caught:
        train.main(["--finetune", str(folder), "--save", str(tmp_path / "run")])
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"--finetune: {folder}/best.pt has no weights for this model" in line


def test_stop_stable_stops_a_search_with_an_unchanged_genotype(corpus, tmp_path):
    folder = run("search", corpus, tmp_path / "run", "--stop_stable 2 --arch_lr 1e-9 --arch_start 0 --epochs 9 --lr 1")
    assert result(folder)["stopped_by"] == "stable"
    assert result(folder)["epochs"] == 3


def test_alphas_are_constant_until_arch_start(corpus, tmp_path):
    """In the first --arch_start epochs a search updates the weights alone, and no stopping rule reads the genotype."""
    flags = "--arch_start 2 --epochs 4 --stop_stable 1 --max_identity 0 --arch_lr 0.01 --seed 6 --lr 1"
    folder = run("search", corpus, tmp_path / "run", flags)
    probabilities = [record["probabilities"] for record in read_records(folder) if record["epoch"] <= 2]
    assert all(other == probabilities[0] for other in probabilities)
    assert result(folder)["epochs"] > 2 and read_records(folder)[-1]["probabilities"] != probabilities[0]
    torch.manual_seed(6)
    initial = RNNModelSearch(len(load_corpus(str(corpus)).words), 8, DropoutRates(), steps=3).alphas.softmax(-1)
    assert probabilities[0] == [[round(p, 5) for p in edge] for edge in initial.tolist()]
    losses = [record["loss"] for record in read_records(folder) if record["epoch"] <= 2]
    still = run("search", corpus, tmp_path / "still", "--arch_start 2 --epochs 3 --arch_lr 1e-30 --seed 6 --lr 1")
    assert [record["loss"] for record in read_records(still) if record["epoch"] <= 2] == losses


def test_genotype_is_derived_from_the_weighted_mean_of_alphas(corpus, tmp_path):
    """Deriving from the mean does not change the steps of a search. A search that derives from the last alphas records
    their probabilities p_t, and these give the mean: softmax(mean of alpha_t) = softmax(mean of log p_t), because
    alpha_t and log p_t differ by one number for each edge. Step t has the weight t (t + 1) (t + 2)."""
    flags = "--epochs 3 --arch_start 1 --arch_lr 0.3 --lr 1 --log_interval 1"
    last = run("search", corpus, tmp_path / "last", f"{flags} --derive_from last")
    averaged = run("search", corpus, tmp_path / "mean", flags)
    assert [record["loss"] for record in read_records(last)] == [record["loss"] for record in read_records(averaged)]
    unaveraged, of_mean = (
        [torch.tensor(record["probabilities"]) for record in read_records(folder, "interval") if record["epoch"] > 1]
        for folder in (last, averaged)
    )
    weights = torch.tensor([t * (t + 1) * (t + 2.0) for t in range(1, len(unaveraged) + 1)])
    for n, probabilities in enumerate(of_mean, start=1):
        mean = torch.tensordot(weights[:n] / weights[:n].sum(), torch.stack(unaveraged[:n]).log(), dims=1)
        torch.testing.assert_close(probabilities, mean.softmax(-1), atol=5e-5, rtol=0)
    written = json.loads((averaged / "genotype.json").read_text())
    assert written["genotype"] == result(averaged)["genotype"] == read_records(averaged)[-1]["genotype"]
    assert derive(torch.tensor(written["probabilities"])) == from_json(written["genotype"])
    assert max((a - b).abs().max() for a, b in zip(unaveraged, of_mean, strict=True)) > 0.1


def test_arch_batch_size_sets_the_batch_of_the_alphas_alone(corpus, tmp_path, monkeypatch):
    """The batch of the alphas has --arch_batch_size elements, which divide the whole text among them. The batch of the
    weights is the same with and without the flag."""
    batches = []
    monkeypatch.setattr(train_search, "Architect", lambda *args, **kwargs: Watched(batches, Architect(*args, **kwargs)))
    flags = "--epochs 2 --arch_start 0 --bptt 4 --norm layer --lr 1"
    run("search", corpus, tmp_path / "as-many", flags)
    as_many, batches[:] = batches[:], []
    run("search", corpus, tmp_path / "more", f"{flags} --arch_batch_size 12 --small_batch_size 2")
    text = batchify(load_corpus(str(corpus)).valid, 12)
    assert len(batches) == len(as_many) > 4
    for (weights, alphas), (before, _) in zip(batches, as_many, strict=True):
        assert torch.equal(weights.x, before.x) and weights.hidden.shape == before.hidden.shape == (4, 8)
        assert alphas.hidden.shape == (12, 8) and alphas.masks.hidden.shape == (12, 8)
        assert any(torch.equal(alphas.x, text[i : i + len(alphas.x)]) for i in range(len(text)))


class Watched:
    """An architect that records the batches of its steps."""

    def __init__(self, batches, architect):
        self.batches, self.architect = batches, architect

    def __getattr__(self, name):
        return getattr(self.architect, name)

    def step(self, train, valid, **rest):
        self.batches.append((train, valid))
        return self.architect.step(train=train, valid=valid, **rest)


def test_max_identity_reports_the_genotype_before_collapse(corpus, tmp_path, monkeypatch):
    """The genotype of the third epoch has too many identity operations."""
    counted = []

    def identities(genotype):
        counted.append(genotype)
        return 5 if len(counted) == 3 else 4

    monkeypatch.setattr(train_search, "identities", identities)
    folder = run("search", corpus, tmp_path / "run", "--max_identity 4 --arch_lr 0.3 --arch_start 0 --epochs 9 --lr 1")
    second, third = (record["genotype"] for record in read_records(folder, "epoch")[1:])
    assert result(folder)["stopped_by"] == "identity"
    assert second != third
    written = json.loads((folder / "genotype.json").read_text())
    assert (written["epoch"], written["genotype"], result(folder)["genotype"]) == (2, second, second)


def test_finetune_averages_from_the_best_weights_and_stops_by_nonmono(corpus, first_stage, tmp_path):
    folder = run("train", corpus, tmp_path / "run", f"--finetune {first_stage} --nonmono 1 --epochs 60 --lr 3")
    epochs, before = read_records(folder, "epoch"), result(first_stage)
    assert {record["phase"] for record in epochs} == {"asgd"}
    losses = [record["valid_loss"] for record in epochs]
    assert result(folder)["stopped_by"] == "nonmono"
    assert losses[-1] > min(losses[:-2])
    assert not any(losses[n] > min(losses[: n - 1]) for n in range(2, len(losses) - 1))
    assert result(folder)["valid_ppl"] <= before["valid_ppl"] * (1 + 1e-9)
    assert result(folder)["genotype"] == before["genotype"]
    # With a learning rate of practically zero its result is that of the first run.
    still = run("train", corpus, tmp_path / "still", f"--finetune {first_stage} --epochs 1 --lr 1e-30")
    assert result(still)["test_ppl"] == pytest.approx(before["test_ppl"])


def test_fine_tuning_takes_the_documented_flags_of_its_run_and_no_other(corpus, tmp_path):
    taken = {
        "dropout": 0.11, "dropouth": 0.12, "dropoutx": 0.13, "dropouti": 0.14, "dropoute": 0.15, "alpha": 0.3,
        "beta": 0.4, "rdrop": 0.5, "fraternal": 0.6, "wdecay": 1e-5, "clip": 0.7, "clip_value": 0.8, "seed": 9,
        "nonmono": 2, "bptt": 5, "bptt_std": 2.0, "max_seq_len_delta": 3, "small_batch_size": 2, "limit_tokens": 200,
        "lr": 3.0, "n_experts": 2,
    }  # fmt: skip
    flags = " ".join(f"--{name} {value}" for name, value in taken.items())
    first = run("train", corpus, tmp_path / "first", f"{flags} --epochs 1 --warmup 3 --patience 7")
    fine = tmp_path / "fine"
    argv = ["--finetune", str(first), "--save", str(fine), "--epochs", "1", "--device", "cpu"]
    assert train.main(argv) == 0
    old, new = (json.loads((folder / "config.json").read_text())["flags"] for folder in (first, fine))
    same = {*taken, "data", "arch", "emsize", "batch_size", "engine", "precision"}
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert (new["warmup"], new["patience"], new["optimizer"]) == (0, 0, "asgd")


def test_average_after_averages_from_that_epoch_on(corpus, tmp_path):
    """Averaging does not change the weights that it averages, so the training losses are those of plain SGD, and so are
    the validation losses before it begins."""
    flags = "--epochs 4 --lr 3 --bptt_std 0"
    folder = run("train", corpus, tmp_path / "run", f"{flags} --average_after 2")
    plain = run("train", corpus, tmp_path / "plain", f"{flags} --optimizer sgd")
    epochs, raw = read_records(folder, "epoch"), read_records(plain, "epoch")
    assert [record["phase"] for record in epochs] == ["sgd", "sgd", "asgd", "asgd"]
    assert [record["valid_loss"] for record in epochs[:2]] == [record["valid_loss"] for record in raw[:2]]
    assert [record["loss"] for record in epochs] == [record["loss"] for record in raw]
    last = checkpoint.load(folder / "last.pt")
    assert last["optimizer"]["state"][0]["steps"] == epochs[3]["step"] - epochs[1]["step"]
    assert [record["valid_loss"] for record in epochs[2:]] != [record["valid_loss"] for record in raw[2:]]
    assert "averaging the weights from epoch 3 on" in (folder / "log.txt").read_text()


def test_limit_tokens_does_not_change_the_vocabulary(corpus, tmp_path):
    states = []
    for limit in (0, 100):
        folder = run("train", corpus, tmp_path / str(limit), f"--limit_tokens {limit} --epochs 1 --lr 1")
        states.append(checkpoint.load(folder / "best.pt"))
    assert states[0]["words"] == states[1]["words"]
    # With 100 tokens each of the 4 batch elements has 24 tokens to predict.
    assert states[1]["progress"]["step"] < states[0]["progress"]["step"] / 2
    assert "the first 100" in (tmp_path / "100" / "log.txt").read_text()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_overfit_learns_one_batch_or_exits_1(kind, corpus, tmp_path, monkeypatch, capsys):
    run(kind, corpus, tmp_path / "run", "--overfit --lr 5")
    reached = re.search(r"one batch of 24 words: perplexity ([\d.]+) after", capsys.readouterr().out)
    assert 1 <= float(reached[1]) < 1.5
    start = "--init_range 0.04 --norm batch" if kind == "search" else "--init_range 0.04"
    flags = f"--data {corpus} --save {tmp_path / 'other'} --overfit --lr 1e-9 {start}"
    argv = [*SIZES, *flags.split()]
    monkeypatch.setattr("sys.argv", [kind, *argv])
    monkeypatch.setattr("training.overfit.MAX_STEPS", 20)
    assert train.signals.run_script(SCRIPTS[kind].main) == 1
    assert re.search(r"one batch is at perplexity [89]\.", capsys.readouterr().err)


def test_recorded_lr_is_scheduled_rate_times_segment_length(corpus, tmp_path):
    """With --bptt_std 0 a segment has --bptt time steps or half as many, and fewer at the end of the text. The rate is
    multiplied by its length and divided by --bptt."""
    flags = "--warmup 10 --warmup_start 0.2 --lr 2 --bptt_std 0 --log_interval 1 --epochs 2"
    intervals = read_records(run("train", corpus, tmp_path / "run", flags), "interval")
    ends = {record["step"] for record in read_records(tmp_path / "run", "epoch")}
    for record in intervals:
        rate = 2 * (0.2 + 0.8 * min((record["step"] - 1) / 10, 1))
        lengths = range(1, 7) if record["step"] in ends else (3, 6)
        assert any(record["lr"] == pytest.approx(rate * length / 6) for length in lengths)


# --- invalid flags ---

REFUSED = [
    ("train", "--momentum 0.5", "--momentum 0.5: is for --optimizer momentum; add that or leave it out"),
    ("train", "--optimizer adam --nonmono 3", "--nonmono 3: is for --optimizer ntasgd without --average_after, or"),
    ("train", "--average_after 1 --epochs 3 --nonmono 3", "--nonmono 3: is for --optimizer ntasgd without"),
    ("train", "--optimizer sgd --average_after 1 --epochs 3", "--average_after 1: is for --optimizer ntasgd"),
    ("train", "--average_after 3 --epochs 3", "--average_after 3: averaging would never start in --epochs 3"),
    ("train", "--finetune FIRST --average_after 1 --epochs 3", "--average_after 1: --finetune averages from its first"),
    ("train", "--arch FIRST", "--arch: no genotype.json in 'FIRST': it is a run of train.py, or a search that has not"),
    ("train", "--arch FIRST/best.pt", "is not UTF-8; name the directory of the search, not a checkpoint"),
    ("train", "--min_delta 0.1", "--min_delta 0.1: is for --patience"),
    ("train", "--warmup_start 0.5", "--warmup_start 0.5: is for --warmup"),
    ("train", "--warmup_shape exponential", "--warmup_shape exponential: is for --warmup"),
    ("train", "--warmup 5 --warmup_shape exponential --warmup_start 0", "starts above 0"),
    ("train", "--schedule step --power 2", "--power 2.0: is for --schedule polynomial"),
    ("train", "--schedule cosine --gamma 0.1", "--gamma 0.1: is for --schedule step, exponential or plateau"),
    ("train", "--step_size 3", "--step_size 3.0: is for --schedule step"),
    ("train", "--schedule plateau --cycle 2", "--cycle 2: is for --schedule cosine or polynomial"),
    ("train", "--plateau_patience 2", "--plateau_patience 2: is for --schedule plateau"),
    ("train", "--final_lr 0.1", "--final_lr 0.1: is for --schedule cosine or polynomial"),
    ("train", "--schedule cosine --final_lr 30", "--final_lr 30: is above --lr 20"),
    ("train", "--schedule cosine --cycle 9 --epochs 8", "--cycle 9: longer than --epochs 8"),
    ("train", "--rdrop 1 NODROP", "--rdrop: compares two passes"),
    ("train", "--fraternal 1 NODROP", "--fraternal: compares two passes"),
    ("train", "--finetune FIRST --optimizer adam", "--finetune: averages from its first step on"),
    ("train", "--finetune FIRST --emsize 16", "--emsize 16: the weights of --finetune"),
    ("train", "--finetune FIRST --n_experts 2", "--n_experts 2: the weights of --finetune"),
    ("train", "--finetune FIRST --arch DARTS", "the weights of --finetune"),
    ("train", "--finetune=", "--finetune: there is no run in "),
    ("train", "--finetune ADAM", "--lr: give one for averaged SGD; that of --finetune "),
    ("train", "--overfit --rdrop 3", "--rdrop 3.0: has no effect with --overfit"),
    ("train", "--overfit --schedule cosine", "--schedule cosine: has no effect with --overfit"),
    ("search", "--overfit --warmup 3", "--warmup 3: has no effect with --overfit"),
    ("train", "--clip_value 1e300", "--clip_value 1e+300: must be at most 1e+20"),
    ("train", "--finetune NOWHERE", "--finetune: there is no run in NOWHERE"),
    ("train", "--finetune FIRST --data builtin", "not the text that the run in"),
    ("train", "--schedule step --gamma 1", "--gamma 1.0: must be above 0 and below 1"),
    ("train", "--schedule step --step_size 1e-300", "--step_size 1e-300: must be at least 0.01"),
    ("train", "--n_experts 0", "--n_experts 0: must be at least 1"),
    ("train", "--warmup_start 1.5 --warmup 3", "--warmup_start 1.5: must be at least 0 and at most 1"),
    ("train", "--limit_tokens 5", "--limit_tokens 5: 5 tokens for train are too few"),
    ("train", "--optimizer lbfgs", "invalid choice"),
    ("search", "--optimizer ntasgd", "invalid choice"),
    ("search", "--optimizer adam --unrolled", "--unrolled: its virtual step is a step of SGD, unlike those of --opt"),
    ("search", "--rdrop 1", "--rdrop: no such flag; "),
    ("search", "--arch LSTM", "--arch: no such flag; "),
    ("search", "--stop_stable -1", "--stop_stable -1: must be at least 0"),
    ("search", "--arch_start 3 --epochs 3", "--arch_start 3: the alphas would never move in --epochs 3"),
    ("search", "--norm group", "invalid choice"),
    ("search", "--max_seq_len_delta 5", "--max_seq_len_delta 5: is for --bptt_std; add that or leave it out"),
    (
        "search",
        "--search_split train --limit_tokens 60 --arch_batch_size 4",
        "--limit_tokens 60: 6 tokens for the alphas are too few for a batch size of 4 (at least 8); use a larger"
        " one or a smaller --arch_batch_size",
    ),
    ("search", "--arch_batch_size 6", "--arch_batch_size 6: must be a multiple of --small_batch_size 4"),
    ("search", "--arch_batch_size 0", "--arch_batch_size 0: must be at least 1"),
    ("search", "--arch_batch_size 400", "tokens for the alphas are too few for a batch size of 400"),
    ("search", "--norm batch --small_batch_size 1", "--norm batch normalises over the batch"),
    ("train", "--init_range 0", "--init_range 0.0: must be above 0"),
    ("train", "--norm layer", "--norm: no such flag; "),
]


@pytest.mark.parametrize(("kind", "flags", "message"), REFUSED)
def test_invalid_flag_combination_exits_2_with_one_line(kind, flags, message, corpus, first_stage, tmp_path, capsys):
    no_drop = " ".join(f"--{name} 0" for name in ("dropout", "dropouth", "dropoutx", "dropouti", "dropoute"))
    if "ADAM" in flags:
        flags = f"--finetune {run('train', corpus, tmp_path / 'adam', '--optimizer adam --lr 0.01 --epochs 1')}"
        capsys.readouterr()
    flags = flags.replace("FIRST", str(first_stage)).replace("NODROP", no_drop).split()
    message = message.replace("FIRST", str(first_stage))
    sizes = ["--batch_size", "4"] if flags[0].startswith("--finetune") else SIZES
    data = [] if "--data" in flags else ["--data", str(corpus)]
    with pytest.raises(SystemExit) as caught:
        SCRIPTS[kind].main([*sizes, *data, "--save", str(tmp_path / "run"), *flags])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert [line for line in lines if message in line]
    assert len(lines) == 1
    assert not (tmp_path / "run").exists()


def test_default_lr_and_clip_depend_on_the_optimizer():
    for flags, lr, clip in (
        ("", 20, 0.25), ("--optimizer adamw", 1e-3, 0.25), ("--optimizer momentum", 2, 0.25),
        ("--clip_value 0.5", 20, 0), ("--clip_value 0.5 --clip 1", 20, 1), ("--lr 3 --optimizer adam --clip 0", 3, 0),
    ):  # fmt: skip
        parser = train.build_parser()
        args = parser.parse_args(flags.split())
        arguments.complete(args, "train")
        assert (args.lr, args.clip) == (lr, clip)
