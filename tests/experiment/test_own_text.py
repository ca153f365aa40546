"""Tests that a text of one's own is counted honestly, and that its vocabulary belongs to the run that read it."""

import json
import math
import random
import shutil

import pytest
import torch
from helpers import SIZES, read_records, write_corpus

import data
import evaluate
import train
import train_search
from experiment import arguments, checkpoint, resume, retrain_arguments, startup
from engine.dropout import DropoutRates
from genotypes import DARTS_V1
from model import retrain_model
from training import evaluation
from training.evaluation import Score, score


@pytest.fixture
def rare(tmp_path):
    """Returns the folder of a corpus in which each split has words of its own, four in a hundred and more."""
    folder, rng = write_corpus(tmp_path, train=40, valid=20, test=20), random.Random(1)
    for split in data.SPLITS:
        lines = (folder / f"{split}.txt").read_text().splitlines()
        lines = [f"{line} {split}{rng.randrange(10**6)}" for line in lines]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(script, folder, save, *flags):
    """Runs a script in this process and returns its exit code."""
    given = ["--data", folder, "--save", save, "--epochs", 1, *SIZES, "--engine", "eager", *flags]
    try:
        return script.main(list(map(str, given)))
    except SystemExit as end:
        return end.code


def resume_run(script, save, *flags):
    try:
        return script.main(["--resume", "--save", str(save), *map(str, flags)])
    except SystemExit as end:
        return end.code


def result(save):
    return json.loads((save / "result.json").read_text())


# --- unknown words ---


def by_hand(model, source, unknown):
    """Returns the losses of all predicted words and of the known ones, from the log-probabilities of one pass."""
    hiddens, _ = model(source[:-1], model.initial_hidden(source.size(1)))
    log_probs = (hiddens @ model.embedding.T + model.bias).log_softmax(-1)
    losses, known = [], []
    for t in range(len(source) - 1):
        for b in range(source.size(1)):
            losses.append(-log_probs[t, b, source[t + 1, b]].item())
            if not unknown[t + 1, b]:
                known.append(losses[-1])
    return sum(losses) / len(losses), sum(known) / len(known), 1 - len(known) / len(losses)


@pytest.mark.parametrize("bptt", [1, 4, 50])
def test_score_without_unknown_words_matches_a_plain_loop(bptt):
    torch.manual_seed(0)
    model = retrain_model(9, 4, DropoutRates(), DARTS_V1).double()
    source = torch.randint(9, (23, 3))
    unknown = torch.rand(23, 3) < 0.3
    with torch.no_grad():
        loss, known, share = by_hand(model, source, unknown)
    assert score(model, source, bptt, unknown=unknown) == pytest.approx((loss, share, known), rel=1e-12)
    assert score(model, source, bptt).loss == pytest.approx(loss, rel=1e-12)
    everything = score(model, source, bptt, unknown=torch.ones_like(unknown))
    assert everything.known_loss is None and everything.unknown_share == 1


def test_unknown_words_are_warned_of_above_one_percent_with_their_effect():
    assert evaluation.unknown_warning("x", Score(3.0, 0.01, 2.0)) == evaluation.unknown_warning("x", None) == []
    for known, effect in ((4.0, "lowers"), (2.0, "raises")):
        [line] = evaluation.unknown_warning("x", Score(3.0, 0.011, known))
        assert effect in line and "1.1% of x" in line and f"{math.exp(known):.2f}" in line
    [line] = evaluation.unknown_warning("x", Score(3.0, 1.0, None))
    assert "says nothing" in line


def test_run_and_evaluate_say_the_share_of_unknown_words(rare, tmp_path, capsys):
    save = tmp_path / "run"
    assert run(train, rare, save, "--min_count", 2) == 0
    log, record = capsys.readouterr().out, result(save)
    corpus = data.load_corpus(str(rare), min_count=2)
    assert f"{corpus.unknown_share('valid'):.1%} of valid" in log  # of the text
    assert f", {record['unknown_share']['valid']:.1%} unknown words |" in log  # of the words that are predicted
    *warnings, last = log.rstrip().split("\n")[-3:]
    assert "unknown words, without them ppl" in last and all("warning: " in line for line in warnings)
    for split in ("valid", "test"):
        assert record["bits_per_token"][split] == pytest.approx(math.log2(record[f"{split}_ppl"]), rel=1e-6)
        assert f"{record['bits_per_token'][split]:.2f} bits per token" in last
        assert evaluate.main([str(save / "best.pt"), "--split", split, "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert f"{record['unknown_share'][split]:.1%} unknown words" in out
        assert f"without them perplexity {record['known_ppl'][split]:.4f}" in out
        assert f"bits per token {record['bits_per_token'][split]:.4f}" in out
        assert "warning: " in err


def test_text_without_unknown_words_has_no_warning(corpus, tmp_path, capsys):
    assert run(train, corpus, tmp_path / "run") == 0
    assert evaluate.main([str(tmp_path / "run" / "best.pt"), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "unknown words" not in out and "warning" not in out
    assert set(result(tmp_path / "run")["unknown_share"].values()) == {0.0}


def test_evaluate_on_a_foreign_text_warns(rare, tmp_path, capsys):
    save = tmp_path / "run"
    assert run(train, rare, save, "--min_count", 2) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "test.txt").write_text("kein Wort ist hier bekannt\n" * 20)
    capsys.readouterr()
    assert evaluate.main([str(save / "best.pt"), "--data", str(other), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "83.2% unknown words" in out  # 99 of 119 predicted tokens
    assert "warning: 83.2% of" in err and err.count("\n") == 1


# --- the vocabulary ---


def test_untrained_unk_is_warned_of_with_its_share_and_a_remedy(rare, tmp_path):
    args = arguments_of(rare)
    [line] = startup.notes(startup.load_corpus(args), args)
    share = f"{data.load_corpus(str(rare)).unknown_share('valid'):.1%} of valid"
    assert share in line and "--min_count 2" in line and "--vocab_size" in line
    args.min_count = 2
    assert startup.notes(startup.load_corpus(args), args) == []


def arguments_of(folder, *flags):
    args = retrain_arguments.build_parser().parse_args(["--data", str(folder), *flags])
    arguments.complete(args, "train")
    return args


@pytest.mark.parametrize("script", [train, train_search])
def test_run_resumes_with_its_vocabulary(script, rare, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ["--vocab_size", 9, *(["--arch_start", 0] if script is train_search else [])]
    assert run(script, rare, whole, *flags, "--epochs", 2) == 0
    assert run(script, rare, parts, *flags) == 0
    assert resume_run(script, parts, "--epochs", 2) == 0
    states = [checkpoint.load(save / "last.pt") for save in (whole, parts)]
    assert len(states[0]["words"]) == 9 and states[0]["words"] == states[1]["words"]
    assert all(states[0]["model"][name].equal(states[1]["model"][name]) for name in states[0]["model"])


@pytest.mark.parametrize(("flag", "value"), [("min_count", 3), ("vocab_size", 8)])
def test_other_vocabulary_is_refused_in_resuming_and_fine_tuning(flag, value, rare, tmp_path, capsys):
    save = tmp_path / "run"
    assert run(train, rare, save, "--min_count", 2) == 0
    capsys.readouterr()
    assert resume_run(train, save, f"--{flag}", value, "--epochs", 2) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"--{flag} {value}" in line
    assert train.main(["--finetune", str(save), "--save", str(tmp_path / "fine"), "--epochs", "1", "--lr", "1"]) == 0
    assert checkpoint.load(tmp_path / "fine" / "last.pt")["flags"]["min_count"] == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(["--finetune", str(save), "--save", str(tmp_path / "no"), "--lr", "1", f"--{flag}", str(value)])
    [line] = capsys.readouterr().err.splitlines()
    assert f"--{flag} {value}" in line


def test_checkpoint_with_other_words_is_refused(rare, tmp_path, capsys):
    """Such a one is that of a version which read the text otherwise."""
    save = tmp_path / "run"
    assert run(train, rare, save, "--min_count", 2) == 0
    saved = checkpoint.load(save / "last.pt")
    saved["words"] = ["\ufeff" + saved["words"][0], *saved["words"][1:]]
    checkpoint.save(saved, save / "last.pt")
    capsys.readouterr()
    assert resume_run(train, save, "--epochs", 2) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "vocabulary" in line


@pytest.mark.parametrize("script", [train, train_search])
def test_run_from_before_these_flags_resumes(script, corpus, tmp_path):
    save = tmp_path / "run"
    assert run(script, corpus, save) == 0
    config = json.loads((save / "config.json").read_text())
    saved = {name: checkpoint.load(save / name) for name in ("last.pt", "best.pt")}
    for flags in (config["flags"], *(state["flags"] for state in saved.values())):
        for name in resume.YOUNGER.keys() & flags.keys():
            del flags[name]
    (save / "config.json").write_text(json.dumps(config))
    for name, state in saved.items():
        checkpoint.save(state, save / name)
    assert resume_run(script, save, "--epochs", 2) == 0
    assert len(read_records(save, "epoch")) == 2


def test_vocab_size_needs_a_place_for_a_word(rare, tmp_path, capsys):
    assert run(train, rare, tmp_path / "run", "--vocab_size", 2) == 2
    assert "--vocab_size 2: has no place" in capsys.readouterr().err


def test_large_vocabulary_prints_a_note_on_its_memory(rare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(startup, "MANY_WORDS", 10)
    assert run(train, rare, tmp_path / "run") == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "GB of memory" in line and "--vocab_size 10 needs" in line


@pytest.mark.parametrize(("flags", "words", "gigabytes"), [
    ("--engine fused --emsize 32", 300_000, 0.5), ("--engine fused --emsize 64", 300_000, 0.62),
    ("--engine eager --emsize 32 --bptt_std 0 --bptt 36", 300_000, 15.0),
])  # fmt: skip
def test_predicted_memory_is_near_the_measured(flags, words, gigabytes):
    """Measured is the peak of resident memory with a batch of 64 less 0.45 GB, that of a run with few words."""
    args = arguments_of("builtin", "--optimizer", "sgd", *flags.split())
    assert startup.vocabulary_memory(args, words) / 1e9 == pytest.approx(gigabytes, rel=0.15)


# --- odd texts ---


def test_eos_in_the_text_and_a_copied_split_are_noted(tmp_path):
    folder = write_corpus(tmp_path, train=20, valid=9, test=9)
    (folder / "train.txt").write_text("a b <eos>\na <eos> x<eos>\n")
    (folder / "valid.txt").write_text("a b <eos>\na <eos> x<eos>\n")
    (folder / "test.txt").write_text("a b\n")
    args = arguments_of(folder)
    eos, twin = startup.notes(startup.load_corpus(args), args)
    assert "2 times in train and 2 times in valid" in eos
    assert "valid.txt is train.txt itself" in twin


def test_test_skip_needs_no_test_text_and_reads_it_later(rare, tmp_path, capsys):
    save, test = tmp_path / "run", rare / "test.txt"
    kept = test.read_text()
    test.unlink()
    assert run(train, rare, tmp_path / "read") == 2
    assert "test.txt: missing" in capsys.readouterr().err
    assert run(train, rare, save, "--test", "skip", "--min_count", 2) == 0
    assert result(save)["test_ppl"] is None
    assert resume_run(train, save, "--epochs", 2) == 0
    assert resume_run(train, save, "--test", "read") == 2
    test.write_text(kept)
    assert resume_run(train, save, "--test", "read") == 0
    assert result(save)["test_ppl"] > 1
    test.write_text(kept + "a\n")
    assert resume_run(train, save, "--test", "read") == 2
    assert "not the text" in capsys.readouterr().err


# --- places ---


def test_relative_folder_is_found_from_another_working_directory(rare, tmp_path, monkeypatch, capsys):
    save, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(rare.parent)
    assert run(train, rare.name, save) == 0
    monkeypatch.chdir(elsewhere)
    assert resume_run(train, save, "--epochs", 2) == 0
    assert evaluate.main([str(save / "best.pt"), "--device", "cpu"]) == 0
    assert "note: " not in capsys.readouterr().err


def test_named_corpora_lie_in_the_repository_whatever_the_working_directory(tmp_path, monkeypatch):
    before = data.is_available("penn")
    monkeypatch.chdir(tmp_path)
    assert data.ROOT.is_absolute() and data.is_available("penn") == before


def test_checkpoint_stays_readable_after_its_text_has_moved(rare, tmp_path):
    assert run(train, rare, tmp_path / "run") == 0
    shutil.copytree(rare, tmp_path / "copy", ignore=lambda *_: {"run"})
    assert resume_run(train, tmp_path / "run", "--data", tmp_path / "copy", "--epochs", 2) == 0


def test_test_text_whose_unknown_words_have_no_id_in_the_run_is_named(tmp_path, capsys):
    """No word of train and valid is unknown, so that the vocabulary of a run without a test text has no `<unk>`."""
    folder, save = write_corpus(tmp_path, train=40, valid=20, test=20), tmp_path / "run"
    test = (folder / "test.txt").read_text()
    (folder / "test.txt").unlink()
    assert run(train, folder, save, "--test", "skip") == 0
    (folder / "test.txt").write_text(test + "new\n")
    assert resume_run(train, save, "--epochs", 2) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "its vocabulary has no <unk>, which words of a test.txt that was added later would become" in line


def test_split_that_is_too_short_to_evaluate_is_named(tmp_path, capsys):
    folder = write_corpus(tmp_path, train=40, valid=20, test=20)
    assert run(train, folder, tmp_path / "run") == 0
    (folder / "valid.txt").write_text("a b\n")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "run/best.pt"), "--split", "valid", "--device", "cpu"])
    assert f"{folder} valid: 3 tokens are too few for a batch size of 10" in capsys.readouterr().err
