"""What a trained model is used for: generate.py lets it write, evaluate.py scores lines and adapts to a text."""

import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SIZES, call, write_corpus

import evaluate
import generate
import train
import train_search
from data import read_split
from experiment.adapted_evaluation import Adapter, Setting, flags_of, grid, training_text
from experiment.evaluation_arguments import (
    DECAY_FACTORS,
    LR_FACTORS,
    SHARE_FACTORS,
    THETA_FACTORS,
    build_parser,
    complete,
)
from experiment.trained_model import load_trained
from genotypes import PRIMITIVES
from training.dynamic_evaluation import DynamicEvaluation

FLAGS = [*SIZES, "--epochs", "1", "--lr", "1", "--engine", "eager"]
RUNS = {
    "cell": (train, "--arch DARTS"),
    "averaged mixture": (train, "--arch LSTM --optimizer asgd --n_experts 2"),
    "GRU": (train, "--arch GRU"),
    "relaxed": (train_search, "--arch_start 0 --norm layer"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Returns the folder of a corpus whose valid and test texts have words that its training text lacks."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), train=40, valid=16, test=16)
    (folder / "train.txt").write_text((folder / "train.txt").read_text() + "<unk> a b\n" * 3)
    for split in ("valid", "test"):
        text = (folder / f"{split}.txt").read_text()
        (folder / f"{split}.txt").write_text(text.replace("h", "horse", 3))
    return folder


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory):
    """A function that returns the path of best.pt of a run by its name; each run is started once, at first use."""
    cache = {}

    def get(name="cell"):
        if name not in cache:
            script, flags = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / "run"
            code, _, err = call(script, *FLAGS, *flags.split(), "--data", corpus, "--save", folder)
            assert code == 0, err
            cache[name] = folder / "best.pt"
        return cache[name]

    return get


def done(script, *flags):
    code, out, err = call(script, *flags, "--device", "cpu")
    assert code == 0, err
    return out


def refused(script, *flags):
    code, out, err = call(script, *flags)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    return err


# --- generate.py ---


@pytest.mark.parametrize("name", RUNS)
def test_words_follow_the_prompt_and_are_the_same_for_the_same_seed(name, checkpoints):
    flags = (checkpoints(name), "--prompt", "a  b c", "--words", 30)
    text = done(generate, *flags)
    assert text.startswith("a b c ")
    ends = text[:-1].count("\n")  # the last one is not sampled
    assert len(text.split()) - 3 + ends == 30
    assert set(text.split()) <= {*"abcdefgh", "<unk>"}
    assert done(generate, *flags) == text != done(generate, *flags, "--seed", 2)


def test_samples_are_printed_one_after_another(checkpoints):
    text = done(generate, checkpoints(), "--samples", 3, "--words", 20, "--prompt", "a")
    assert re.findall("^== (.*)$", text, re.MULTILINE) == ["1", "2", "3"]
    assert len(set(re.split("== .\n", text)[1:])) == 3


def test_most_likely_words_are_the_same_for_every_seed(checkpoints):
    flags = (checkpoints(), "--words", 12, "--temperature", 0)
    assert done(generate, *flags) == done(generate, *flags, "--seed", 2) == done(generate, *flags[:-1], 3, "--top_k", 1)


def test_unknown_words_of_the_prompt_are_named(checkpoints):
    code, out, err = call(generate, checkpoints(), "--prompt", "a horse and a horse", "--words", 3, "--device", "cpu")
    assert code == 0 and out.startswith("a horse and a horse")
    assert err == "note: the model does not know 'horse', 'and', and reads <unk> instead\n"


def test_prompt_of_unknown_words_is_refused_without_unk(corpus, tmp_path):
    other = write_corpus(tmp_path, train=30, valid=16, test=16)
    assert call(train, *FLAGS, "--arch", "DARTS", "--data", other, "--save", tmp_path / "run")[0] == 0
    (tmp_path / "lines.txt").write_text("a horse\n")
    message = "the vocabulary given lacks 1 of its words ('horse') and has no <unk>; leave these out"
    for script, flag, text, name in (
        (generate, "--prompt", "a horse", "--prompt"),
        (evaluate, "--text", tmp_path / "lines.txt", str(tmp_path / "lines.txt")),
    ):
        assert refused(script, tmp_path / "run" / "best.pt", flag, text).endswith(f"error: {name}: {message}\n")


@pytest.mark.parametrize(
    ("prompt", "shown"), [("a b\n\n c", "a b\n\nc "), ("a <eos> b", "a\nb "), ("a\n", "a\n"), ("a\r", "a\n")]
)
def test_prompt_of_several_lines_is_read_with_their_ends(prompt, shown, checkpoints):
    words = load_trained(str(checkpoints())).words
    ids = generate.encode_prompt(prompt, words)
    assert [words[i] for i in ids] == ["<eos>", *shown.replace("\n", " <eos> ").split()]
    text = done(generate, checkpoints(), "--prompt", prompt, "--words", 5, "--temperature", 0)
    assert text.startswith(shown)


def test_sampling_flags_reach_the_sampler(checkpoints):
    """With a tiny --top_p only the most likely word remains, as at temperature 0, and with --no_unk no <unk>."""
    flags = (checkpoints(), "--words", 40)
    certain = done(generate, *flags, "--temperature", 0)
    assert done(generate, *flags, "--top_p", 1e-6) == certain == done(generate, *flags, "--temperature", 1e-308)
    flags = (checkpoints(), "--words", 300, "--temperature", 100)
    assert "<unk>" in done(generate, *flags)
    assert "<unk>" not in done(generate, *flags, "--no_unk")


# --- lines of a text ---


def line_records(*flags):
    return [json.loads(line) for line in done(evaluate, *flags, "--json").splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_line_scores_sum_to_the_evaluation_of_the_split(name, checkpoints, corpus):
    checkpoint = checkpoints(name)
    records = line_records(checkpoint, "--text", corpus / "test.txt")
    line = done(evaluate, checkpoint)
    assert [record["line"] for record in records] == list(range(1, 17))
    tokens = sum(record["tokens"] for record in records)
    assert tokens == 16 * 10 - 1 and f"{tokens + 1} tokens in batches of 1" in line  # the first of all is not predicted
    loss = -sum(record["log_prob"] for record in records) / tokens
    assert loss == pytest.approx(float(re.search("loss ([0-9.]+)", line).group(1)), abs=1e-6)
    text = (corpus / "test.txt").read_text()
    assert sum(record["unknown"] for record in records) == text.split()[1:].count("horse") > 0
    first = records[0]
    assert first["text"] == text.splitlines()[0]
    assert first["perplexity"] == pytest.approx(math.exp(-first["log_prob"] / first["tokens"]))
    for record in records:
        assert len(record["log_probs"]) == record["tokens"]
        assert sum(record["log_probs"]) == pytest.approx(record["log_prob"])


def test_fresh_lines_have_the_same_score_in_any_order_and_all_their_words(checkpoints, tmp_path):
    lines = ["a b c", "", "d d d d", "a b c"]
    for name, order in (("one", lines), ("other", lines[::-1])):
        (tmp_path / name).write_text("\n".join(order) + "\n")
    one, other = (line_records(checkpoints(), "--text", tmp_path / name, "--fresh") for name in ("one", "other"))
    assert [record["tokens"] for record in one] == [4, 1, 5, 4]
    assert one[0]["log_prob"] == one[3]["log_prob"]
    assert [record["log_prob"] for record in one] == [record["log_prob"] for record in other][::-1]


def test_fresh_line_is_scored_as_a_text_that_begins_after_a_line_end(checkpoints, tmp_path):
    """With an empty line before it, the hidden state has read one <eos>, as with --fresh."""
    for name, text in (("alone", "a b c d\n"), ("after", "\na b c d\n")):
        (tmp_path / name).write_text(text)
    (alone,) = line_records(checkpoints(), "--text", tmp_path / "alone", "--fresh")
    _, after = line_records(checkpoints(), "--text", tmp_path / "after")
    assert alone["log_prob"] == pytest.approx(after["log_prob"], rel=1e-6)


def test_table_has_a_row_for_each_line_and_one_for_all(checkpoints, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b horse\nc d\n")))
    head, first, second, total = done(evaluate, checkpoints(), "--text", "-", "--fresh").splitlines()
    assert head.split() == ["line", "tokens", "unknown", "log-prob", "perplexity", "text"]
    assert first.split()[:3] == ["1", "4", "1"] and first.endswith("  a b horse")
    assert second.split()[:3] == ["2", "3", "0"] and total.split()[:3] == ["2", "7", "1"]
    assert total.endswith("  all lines")
    assert float(total.split()[3]) == pytest.approx(float(first.split()[3]) + float(second.split()[3]), abs=2e-3)


# --- a model that adapts ---

ADAPTING = "--dynamic sgd --dynamic_lr 0.5 --cache_size 20 --cache_theta 0.5"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_adapted_evaluation_prints_a_line_without_and_with_the_cache(name, rule, checkpoints):
    checkpoint = checkpoints(name)
    before = hashlib.sha256(checkpoint.read_bytes()).digest()
    out = done(evaluate, checkpoint, "--dynamic", rule, "--cache_size", 20, "--split", "valid")
    dynamic, both = out.splitlines()
    assert f"valid --dynamic {rule} --dynamic_lr " in dynamic and "--cache_size" not in dynamic
    assert "--cache_size 20 --cache_theta " in both
    assert "unknown words, without them perplexity" in dynamic and "160 tokens in batches of 1" in both
    assert hashlib.sha256(checkpoint.read_bytes()).digest() == before


def test_cache_alone_prints_the_plain_perplexity_first(checkpoints):
    plain, with_cache = done(evaluate, checkpoints(), "--cache_size", 20).splitlines()
    assert plain.split(": ")[1] == done(evaluate, checkpoints()).splitlines()[0].split(": ")[1]
    assert "--cache_size 20" in with_cache


def test_tuning_chooses_flags_that_give_the_same_line_again(checkpoints):
    checkpoint = checkpoints()
    flags = ["--dynamic", "sgd", "--dynamic_lr", "0.2", "--cache_size", "20"]
    *_, tuned = done(evaluate, checkpoint, *flags, "--tune", "--tune_tokens", "100").splitlines()
    chosen = tuned.split(": ")[0].split(" test ")[1]
    assert done(evaluate, checkpoint, *chosen.split()).splitlines()[-1] == tuned


def reported_loss(*flags):
    return float(re.search("loss ([0-9.]+)", done(evaluate, *flags).splitlines()[-1]).group(1))


@pytest.mark.parametrize(("flags", "n_rules", "n_mixes"), [
    ("--dynamic sgd --dynamic_lr 0.5 --dynamic_decay 0.02", len(LR_FACTORS) * len(DECAY_FACTORS), 0),
    ("--cache_size 20 --cache_theta 0.1 --cache_lambda 0.2", 1, len(THETA_FACTORS) * len(SHARE_FACTORS)),
])  # fmt: skip
def test_tuning_finds_the_best_of_its_grid_on_valid(flags, n_rules, n_mixes, checkpoints, corpus):
    """Each setting of the grid is evaluated on valid by itself; evaluate.py then reads test with the best one."""
    flags = f"{checkpoints()} {flags}"
    args = build_parser().parse_args(flags.split())
    rules, mixes = grid(Setting.of_flags(args))
    assert (len(rules), len(mixes)) == (n_rules, n_mixes)
    ids, _, _ = read_split(str(corpus), "valid", load_trained(args.checkpoint).words)
    adapter = Adapter(load_trained(args.checkpoint), args)
    perplexities = {
        Setting(*rule, mix): adapter.losses_of(ids, Setting(*rule, mix), "valid")[-1].mean().item()
        for rule in rules
        for mix in mixes or [None]
    }
    best = min(perplexities, key=perplexities.get)
    line = done(evaluate, *flags.split(), "--tune", "--tune_tokens", 0).splitlines()[-1]
    assert line.startswith(f"{corpus} test{''.join(flags_of(best, args))}: ")


def test_dynamic_evaluation_moves_the_weights_of_a_relaxed_model_and_not_its_alphas(checkpoints, monkeypatch):
    shapes = []

    class Spy(DynamicEvaluation):
        def __init__(self, weights, *more):
            weights = list(weights)
            shapes.extend(w.shape for w in weights)
            super().__init__(weights, *more)

    monkeypatch.setattr("experiment.adapted_evaluation.DynamicEvaluation", Spy)
    done(evaluate, checkpoints("relaxed"), "--dynamic", "sgd")
    assert shapes and (36, len(PRIMITIVES)) not in shapes


def test_tuning_reads_as_many_tokens_of_valid_as_its_flag_says(checkpoints, monkeypatch):
    read = []
    monkeypatch.setattr(Adapter, "tune", lambda self, ids, start: read.append(len(ids)) or start)
    for flags in ("", "--tune_tokens 0", "--tune_tokens 120"):
        done(evaluate, checkpoints(), "--cache_size", 20, "--tune", *flags.split())
    assert read == [160, 160, 120]


def test_tuning_compares_settings_by_the_losses_with_the_cache(checkpoints, monkeypatch):
    """One rate is better without the cache and worse with it; the text is read with it."""
    args = build_parser().parse_args([str(checkpoints()), *"--dynamic sgd --dynamic_lr 1 --cache_size 9".split()])
    complete(args)
    adapter = Adapter(load_trained(args.checkpoint), args)

    def losses(self, ids, setting, mixes, name):
        plain, cached = (5.1, 5.02) if setting.lr == 3 else (5.0, 5.3)
        return torch.tensor([plain] + [cached] * len(mixes))[:, None, None]

    monkeypatch.setattr(Adapter, "losses", losses)
    assert adapter.tune(torch.zeros(9), Setting.of_flags(args)).lr == 3


def test_choice_at_the_edge_of_the_grid_is_noted(checkpoints):
    """These rates are all too small, and the best of them is the largest."""
    flags = "--dynamic sgd --dynamic_lr 1e-4 --dynamic_decay 0 --tune".split()
    code, _, err = call(evaluate, checkpoints(), *flags, "--device", "cpu")
    assert code == 0 and "note: --dynamic_lr 0.0003 is the largest that was tried; a --tune about" in err


def test_tuning_for_lines_names_the_chosen_flags(checkpoints, corpus):
    flags = (checkpoints(), "--text", corpus / "test.txt", "--cache_size", 20, "--json", "--device", "cpu")
    code, tuned, err = call(evaluate, *flags, "--tune")
    assert code == 0
    chosen = re.search("note: chosen on valid:(.*)", err).group(1)
    assert call(evaluate, *flags, *chosen.split())[1] == tuned


def test_segment_length_and_training_text_reach_dynamic_evaluation(checkpoints, corpus):
    """`rms` averages over the text that the run trained on, of which a run's --limit_tokens leaves the beginning."""
    flags = (checkpoints(), "--dynamic", "rms", "--split", "valid")
    assert reported_loss(*flags, "--dynamic_bptt", 3) != reported_loss(*flags, "--dynamic_bptt", 11)
    trained = load_trained(str(checkpoints()))
    ids, _, _ = read_split(str(corpus), "train", trained.words)
    assert torch.equal(training_text(trained, None), ids)
    assert torch.equal(training_text(trained._replace(limit_tokens=90), None), ids[:90])


def test_rms_finds_the_training_text_of_a_moved_corpus(corpus, tmp_path):
    folder, run = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(corpus, folder)
    assert call(train, *FLAGS, "--arch", "DARTS", "--data", folder, "--save", run)[0] == 0
    folder.rename(tmp_path / "moved")
    (tmp_path / "text").write_text("a b c\n")
    flags = (run / "best.pt", "--dynamic", "rms", "--text", tmp_path / "text")
    message = f"--dynamic rms: reads the text that the model was trained on, which {folder} does not hold any more"
    assert message in refused(evaluate, *flags)
    assert done(evaluate, *flags, "--data", tmp_path / "moved")
    (tmp_path / "moved" / "train.txt").write_text("another text " * 50)
    assert message in refused(evaluate, *flags, "--data", tmp_path / "moved")


def test_lines_are_scored_by_the_model_that_adapts(checkpoints, corpus):
    flags = ADAPTING.split()
    records = line_records(checkpoints(), "--text", corpus / "test.txt", *flags)
    *_, both = done(evaluate, checkpoints(), *flags).splitlines()
    loss = -sum(record["log_prob"] for record in records) / sum(record["tokens"] for record in records)
    assert loss == pytest.approx(float(re.search("loss ([0-9.]+)", both).group(1)), abs=1e-6)


def test_rate_that_diverges_ends_with_the_flag_to_change(checkpoints):
    code, out, err = call(evaluate, checkpoints(), "--dynamic", "sgd", "--dynamic_lr", "1e20", "--device", "cpu")
    assert (code, out) == (1, "") and "--dynamic_lr 1e+20; take a smaller one" in err


# --- what is refused ---

BAD_FLAGS = [
    (generate, "--words 0", "--words 0: must be at least 1"),
    (generate, "--samples -1", "--samples -1"),
    (generate, "--temperature -1", "--temperature -1.0: must be at least 0"),
    (generate, "--temperature nan", "--temperature nan: must be at least 0, and a finite number"),
    (generate, "--temperature inf", "--temperature inf: must be at least 0, and a finite number"),
    (generate, "--data penn", "--data penn: is for a model.pt of the published code"),
    (evaluate, "--text x --data penn", "--data penn: is for a model.pt of the published code"),
    (evaluate, "--cache_size 9 --tune --tune_tokens 9", "--tune_tokens 9: too few to choose by; take at least 100"),
    (generate, "--top_p 0", "--top_p 0.0: must be above 0 and at most 1"),
    (generate, "--top_k -2", "--top_k -2"),
    (generate, "--device tpu", "--device tpu"),
    (generate, "--colour red", "--colour"),
    (evaluate, "--fresh", "--fresh: is for --text"),
    (evaluate, "--json", "--json: is for --text"),
    (evaluate, "--text nowhere.txt", "nowhere.txt: cannot be read"),
    (evaluate, "--text . ", "cannot be read"),
    (evaluate, "--text x --split valid", "--split valid: has no effect with --text"),
    (evaluate, "--text x --fresh --cache_size 5", "--fresh: begins each line anew"),
    (evaluate, "--dynamic adam", "--dynamic"),
    (evaluate, "--dynamic_lr 1", "--dynamic_lr 1.0: is for --dynamic"),
    (evaluate, "--dynamic sgd --dynamic_lr 0", "--dynamic_lr 0.0: must be above 0"),
    (evaluate, "--dynamic sgd --dynamic_decay 2", "--dynamic_decay 2.0: must be at least 0 and at most 1"),
    (evaluate, "--dynamic sgd --dynamic_bptt 0", "--dynamic_bptt 0"),
    (evaluate, "--cache_theta 2", "--cache_theta 2.0: is for --cache_size"),
    (evaluate, "--cache_size -1", "--cache_size -1"),
    (evaluate, "--cache_size 9 --cache_lambda 1", "--cache_lambda 1.0: must be above 0 and below 1"),
    (evaluate, "--tune", "--tune: is for --dynamic or --cache_size"),
    (evaluate, "--cache_size 9 --tune_tokens 900", "--tune_tokens 900: is for --tune"),
]


@pytest.mark.parametrize(("script", "flags", "message"), BAD_FLAGS)
def test_bad_flag_exits_2_with_one_line(script, flags, message, checkpoints):
    assert message in refused(script, checkpoints(), *flags.split())


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"\n \n", "empty"), (b"a\xff b\n", "not UTF-8"), (b"a\0b\n", "not UTF-8"),
])  # fmt: skip
def test_unreadable_text_exits_2_with_one_line(content, message, checkpoints, tmp_path):
    (tmp_path / "text").write_bytes(content)
    assert message in refused(evaluate, checkpoints(), "--text", tmp_path / "text")


def test_closed_standard_input_exits_2_with_one_line(checkpoints, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in refused(evaluate, checkpoints(), "--text", "-")


@pytest.mark.parametrize("script", [generate, evaluate])
def test_file_that_is_no_checkpoint_exits_2_with_one_line(script, tmp_path):
    (tmp_path / "file.pt").write_bytes(b"no checkpoint")
    assert "file.pt" in refused(script, tmp_path / "file.pt")
    assert "nowhere.pt" in refused(script, tmp_path / "nowhere.pt")


def test_relaxed_model_with_batch_norm_reads_no_single_text(corpus, tmp_path):
    code, _, err = call(
        train_search, *FLAGS, "--arch_start", "0", "--norm", "batch", "--data", corpus, "--save", tmp_path / "run"
    )
    assert code == 0, err
    (tmp_path / "text").write_text("a b\n")
    checkpoint = tmp_path / "run" / "best.pt"
    message = f"{checkpoint}: the model of a search with batch normalisation"
    assert message in refused(generate, checkpoint)
    assert message in refused(evaluate, checkpoint, "--text", tmp_path / "text")
    assert "in batches of 10" in done(evaluate, checkpoint, "--dynamic", "sgd")


def test_words_are_printed_as_they_are_sampled_and_a_closed_pipe_ends_quietly(checkpoints):
    with subprocess.Popen(
        [sys.executable, ROOT / "generate.py", checkpoints(), "--words", "1000000", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.read(20)  # long before the last word
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""
