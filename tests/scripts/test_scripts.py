"""Tests that run train_search.py, train.py and evaluate.py as a user does: whole runs and resumed runs."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, read_records, write_corpus

import genotypes
import train
from experiment import checkpoint, experiment
from experiment.resume import RESUMABLE

SIZES = "--emsize 12 --batch_size 4 --bptt 8 --lr 1 --log_interval 5 --device cpu --engine eager"
TIMINGS = {"seconds"}  # equal runs may differ in these values of a result alone


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with a synthetic corpus of several hundred words."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=60, valid=25, test=20)


def command(script, flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, packages):
    """Runs a script as a user does, in a process of its own, which looks for packages in a folder first."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run(
        command(script, flags), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(script, *flags, code=0):
    """Runs a script in this process, which has imported torch already; for what does not depend on the process."""
    actual, out, err = call(importlib.import_module(script.removesuffix(".py")), *flags)
    assert actual == code, out + err
    return subprocess.CompletedProcess(script, actual, out, err)


def start(corpus, save):
    return ["--data", corpus, "--save", save, *SIZES.split()]


def read(folder, name):
    return json.loads((folder / name).read_text())


def state(path):
    return torch.load(path, weights_only=True)


def differences(a, b, where=""):
    """Returns the paths of all entries that are not bit-identical in two nested states."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - TIMINGS
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    if isinstance(a, list | tuple):
        pairs = [d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in differences(x, y, f"{where}/{i}")]
        return pairs if len(a) == len(b) else [where]
    return [] if a == b else [where]


OTHER_PACKAGES = "matplotlib PIL scipy ray rich tensorboard pandas pyarrow pytest hypothesis selenium".split()


@pytest.fixture(scope="session")
def no_other_packages(tmp_path_factory):
    """A folder of packages that cannot be imported, in the place of those of all requirements files but the first;
    jinja2 is a requirement of torch."""
    folder = tmp_path_factory.mktemp("packages")
    for name in OTHER_PACKAGES:
        (folder / f"{name}.py").write_text("raise ModuleNotFoundError('not in requirements.txt')\n")
    return folder


@pytest.fixture(scope="session")
def searched(corpus, no_other_packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "search"
    flags = [*start(corpus, folder), "--epochs", 2, "--unrolled"]
    return folder, run("train_search.py", *flags, packages=no_other_packages)


@pytest.fixture(scope="session")
def trained(corpus, no_other_packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "train"
    flags = "--arch DARTS_V1 --alpha 0.1 --epochs 6 --nonmono 1 --lr 20".split()
    return folder, run("train.py", *start(corpus, folder), *flags, packages=no_other_packages)


def test_search_writes_all_files_of_the_run_directory(searched):
    folder, done = searched
    files = {"config.json", "log.txt", "metrics.jsonl", "genotype.json", "result.json", "lock"}
    files |= {"last.pt", "previous.pt", "best.pt"}
    assert files == {path.name for path in folder.iterdir()}
    result = read(folder, "result.json")
    assert result["kind"] == "search"
    assert result["epochs"] == 2
    assert result["stopped_by"] == "epochs"
    assert result["steps"] == read_records(folder, "epoch")[-1]["step"]
    genotype = genotypes.from_json(result["genotype"])
    assert genotype == genotypes.resolve(str(folder))
    assert str(genotype) in done.stdout
    probabilities = torch.tensor(read(folder, "genotype.json")["probabilities"])
    assert probabilities.shape == (36, 5)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(36))
    config = read(folder, "config.json")
    assert config["flags"]["unrolled"] is True
    assert config["flags"]["nhid"] == 12
    assert config["versions"]["torch"] == torch.__version__
    assert config["device"] == "cpu"
    assert config["threads"] == torch.get_num_threads()
    corpus = Path(config["flags"]["data"])
    assert config["sha256"] == {
        split: hashlib.sha256((corpus / f"{split}.txt").read_bytes()).hexdigest()
        for split in ("train", "valid", "test")
    }


def test_result_has_the_keys_of_the_contract(searched, trained):
    keys = {"kind", "epochs", "steps", "seconds", "params", "valid_ppl", "test_ppl", "genotype", "stopped_by"}
    for kind, (folder, _) in (("search", searched), ("train", trained)):
        result = read(folder, "result.json")
        assert keys <= result.keys() and result["kind"] == kind
        model = checkpoint.load(folder / "best.pt")["model"]
        assert result["params"] == sum(w.numel() for name, w in model.items() if "alphas" not in name)
        assert 0 < result["seconds"] < 600 and result["steps"] == read_records(folder, "epoch")[-1]["step"]


def test_every_search_interval_record_has_a_genotype(searched):
    folder, _ = searched
    intervals = read_records(folder, "interval")
    assert [record["step"] for record in intervals] == [5 * (i + 1) for i in range(len(intervals))]
    for record in intervals:
        genotypes.from_json(record["genotype"])
        assert record["ppl"] == pytest.approx(math.exp(record["loss"]))
        assert record["tokens_per_s"] > 0


def test_logs_and_pipes_have_no_progress_bar_or_escape_codes(searched, trained):
    for folder, done in (searched, trained):
        for text in ((folder / "log.txt").read_text(), done.stdout, done.stderr):
            assert not re.search(r"[\r\x1b]|it/s|tok/s\]", text)


def test_learning_rate_is_proportional_to_segment_length(trained):
    folder, _ = trained
    rates = {record["lr"] for record in read_records(folder, "interval")}
    assert len(rates) > 1
    assert all(rate * 8 / 20 == pytest.approx(round(rate * 8 / 20)) for rate in rates)
    assert {record["lr"] for record in read_records(folder, "epoch")} == {20.0}


def test_retraining_switches_to_asgd_and_reports_the_best_epoch(trained):
    folder, done = trained
    epochs = read_records(folder, "epoch")
    losses = [record["valid_loss"] for record in epochs]
    # With --nonmono 1 the first loss above the lowest of those before the last one is of the last epoch of SGD.
    last = next(n for n in range(2, len(losses)) if losses[n] > min(losses[: n - 1]))
    assert [record["phase"] for record in epochs] == ["sgd"] * (last + 1) + ["asgd"] * (len(epochs) - last - 1)
    assert epochs[-1]["phase"] == "asgd"
    result = read(folder, "result.json")
    assert result["valid_ppl"] == min(record["valid_ppl"] for record in epochs)
    assert result["known_ppl"]["valid"] == result["valid_ppl"]  # since every word is known
    assert f"test ppl {result['test_ppl']:.2f}" in done.stdout


def test_retraining_segments_have_the_lengths_of_its_flags(corpus, tmp_path):
    """The rate of a step tells its length: 5 time steps at least, and --bptt and --max_seq_len_delta at most."""
    flags = ["--arch", "LSTM", "--epochs", 2, "--max_seq_len_delta", 2, "--log_interval", 1]
    code, _, err = call(train, *start(corpus, tmp_path / "run"), *flags)
    assert code == 0, err
    intervals = read_records(tmp_path / "run", "interval")
    ends = [
        record["step"] for record in read_records(tmp_path / "run", "epoch")
    ]  # what is left of the text may be less
    lengths = [round(8 * record["lr"]) for record in intervals if record["step"] not in ends]
    assert set(lengths) <= set(range(5, 11)) and {5, 10} <= set(lengths)


def perplexity_of(checkpoint, *flags):
    line = run_here("evaluate.py", checkpoint, "--device", "cpu", *flags).stdout
    return float(re.search(r"perplexity ([\d.]+)", line).group(1))


def test_evaluate_reproduces_reported_perplexities(searched, trained):
    (search_folder, _), (train_folder, _) = searched, trained
    for path in (search_folder / "last.pt", train_folder / "best.pt"):
        for split in ("valid", "test"):
            reported = read(path.parent, "result.json")[f"{split}_ppl"]
            assert perplexity_of(path, "--split", split) == pytest.approx(reported, abs=6e-5)
    # In the averaging phase last.pt has raw weights to train further, but evaluate.py must use the averaged ones.
    last = read_records(train_folder, "epoch")[-1]
    assert last["phase"] == "asgd"
    assert perplexity_of(train_folder / "last.pt", "--split", "valid") == pytest.approx(last["valid_ppl"], abs=6e-5)


def test_evaluate_uses_the_checkpoint_vocabulary_on_another_corpus(trained, tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("h h h a b\n" * 20)
    assert perplexity_of(trained[0] / "best.pt", "--data", tmp_path) > 1
    (tmp_path / "test.txt").write_text("a word that it never saw\n" * 20)
    done = run_here("evaluate.py", trained[0] / "best.pt", "--data", tmp_path, code=2)
    assert "vocabulary" in done.stderr


RESUMED = [  # test_crash.py tests runs with other flags, and with compiled kernels, which take long to load
    pytest.param(
        "train_search.py",
        "--unrolled --search_split train --batch_size 8 --small_batch_size 4 --arch_start 1".split(),
        marks=pytest.mark.slow,
    ),
    ("train.py", ["--arch", "ENAS", "--nonmono", 9]),  # no epoch reaches the switch to averaging
]


@pytest.mark.parametrize(("script", "flags"), RESUMED)
def test_run_resumed_after_two_of_four_epochs_is_bit_identical(script, flags, corpus, tmp_path):
    run_here(script, *start(corpus, tmp_path / "whole"), *flags, "--epochs", 4)
    run_here(script, *start(corpus, tmp_path / "parts"), *flags, "--epochs", 2)
    run_here(script, "--resume", "--save", tmp_path / "parts", "--epochs", 4)
    whole, parts = (state(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert {d for d in differences(whole, parts) if not d.startswith("/flags/")} == set()
    results = [read(tmp_path / name, "result.json") for name in ("whole", "parts")]
    assert differences(*results) == []
    whole, parts = (read_records(tmp_path / name, "interval") for name in ("whole", "parts"))
    steps = [[(record["step"], record["loss"]) for record in records] for records in (whole, parts)]
    assert steps[0] == steps[1]


def test_all_four_forms_of_arch_give_the_same_cell(searched, corpus, tmp_path):
    folder, _ = searched
    text = str(genotypes.resolve(str(folder)))
    ends = []
    for i, arch in enumerate((folder, folder / "genotype.json", text)):
        run_here("train.py", *start(corpus, tmp_path / str(i)), "--arch", arch, "--epochs", 1)
        ends.append(state(tmp_path / str(i) / "last.pt")["model"])
    assert differences(ends[0], ends[1]) == differences(ends[0], ends[2]) == []
    run_here("train.py", *start(corpus, tmp_path / "name"), "--arch", "DARTS", "--epochs", 1)
    assert genotypes.from_json(read(tmp_path / "name", "result.json")["genotype"]) == genotypes.DARTS


def test_search_split_train_holds_out_a_tenth_of_the_train_split(corpus):
    import data
    from experiment.search_arguments import search_texts

    loaded = data.load_corpus(str(corpus))
    weights, alphas = search_texts(loaded, "train")
    assert torch.equal(torch.cat([weights, alphas]), loaded.train)
    assert len(alphas) == len(loaded.train) // 10
    assert search_texts(loaded, "valid") == (loaded.train, loaded.valid)
    weights, alphas = search_texts(loaded, "train", limit=9)  # too few for a tenth
    assert (len(weights), len(alphas)) == (9, 0)


def test_help_names_every_flag_and_its_default():
    both = """data emsize nhid nhidlast lr clip epochs batch_size small_batch_size bptt max_seq_len_delta dropout
        dropouth dropoutx dropouti dropoute alpha beta wdecay seed log_interval save resume device""".split()
    for script, more in (
        ("train_search", "unrolled hessian search_split arch_lr arch_wdecay"),
        ("train", "arch nonmono"),
    ):
        parser = importlib.import_module(script).build_parser()
        flags = {action.dest: action for action in parser._actions if action.dest != "help"}
        assert {*both, *more.split()} <= flags.keys()
        text = parser.format_help()
        assert [flag for flag in flags if f"--{flag}" not in text] == [] and "None" not in text
        explained = {flag: parser._get_formatter()._expand_help(action) for flag, action in flags.items()}
        assert [flag for flag, action in flags.items() if type(action.default) in (int, float, str)
                and f"(default: {action.default})" not in explained[flag]] == []  # fmt: skip


def test_run_that_keeps_diverging_exits_1_with_one_line(corpus, tmp_path):
    for script, log_interval in (("train.py", 5), ("train_search.py", 1000)):
        folder = tmp_path / script
        flags = "--lr", 1e20, "--clip", 1e20, "--log_interval", log_interval
        done = run_here(script, *start(corpus, folder), *flags, code=1)
        assert done.stderr.count("\n") == 1
        assert "after 5 rollbacks" in done.stderr
        optimizer = "sgd" if script == "train_search.py" else "ntasgd"
        assert f"start again with an --lr below 3.125e+18, the last that this {optimizer} run tried" in done.stderr
        assert [record["lr"] for record in read_records(folder, "rollback")] == [1e20 * 0.5**n for n in range(1, 6)]
        assert not (folder / "genotype.json").exists()  # no cell is derived from NaN


@pytest.mark.parametrize(("script", "minutes"), [("train_search", 10), ("train", 10), ("train", 0)])
def test_diverged_run_rolls_back_to_last_checkpoint_with_lower_lr(
    script, minutes, corpus, tmp_path, monkeypatch, capsys
):
    """These weights diverge with a learning rate of 1e9, and do not with a hundred-thousandth of it. No checkpoint has
    weights that are not finite, even when the run saves one at every step."""
    folder = tmp_path / "run"
    flags = ["--data", corpus, "--save", folder, *SIZES.split(), "--lr", 1e9, "--clip", 1e9, "--epochs", 3]
    monkeypatch.setattr(experiment, "BACKOFF", 1e-5)
    assert importlib.import_module(script).main([*map(str, flags), "--checkpoint_minutes", str(minutes)]) == 0
    rollbacks = read_records(folder, "rollback")
    assert 1 <= len(rollbacks) <= 3
    assert "back to epoch 1, step 0, with lr" in capsys.readouterr().out
    assert {record["lr"] for record in read_records(folder, "epoch")} == {rollbacks[-1]["lr"]}
    assert torch.isfinite(torch.cat([w.flatten() for w in state(folder / "previous.pt")["model"].values()])).all()
    assert [record["epoch"] for record in read_records(folder, "epoch")] == [1, 2, 3]
    steps = [record["step"] for record in read_records(folder, "interval")]
    assert steps == sorted(set(steps))
    assert math.isfinite(read(folder, "result.json")["valid_ppl"])


# The bar of an epoch: its number, the time that it has taken and will take, and what the last step gave.
BAR = rb"epoch \d+/\d+: [^\r]*\[\d\d:\d\d<\d\d:\d\d, [^\r]*tok/s, loss \d\.\d+, ppl \d+\.\d, lr [\d.]+\]"


def test_progress_bar_is_shown_on_a_terminal_and_not_in_the_log(corpus, tmp_path):
    """The bar shows loss, perplexity, learning rate, speed and the time left, after the first second. A SIGINT then
    ends the run."""
    folder = tmp_path / "run"
    flags = ["--data", corpus, "--save", folder, *SIZES.split(), "--epochs", 10**6, "--log_interval", 10**6]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command("train.py", flags))
    termios.tcsetwinsize(terminal, (40, 200))
    shown, interrupted, limit = b"", False, time.monotonic() + 120
    with contextlib.suppress(OSError):  # a closed terminal raises OSError instead of giving an end of file
        while select.select([terminal], [], [], max(0.0, limit - time.monotonic()))[0]:
            if not (block := os.read(terminal, 4096)):
                break
            shown += block
            if not interrupted and re.search(BAR, shown):
                os.kill(pid, signal.SIGINT)
                interrupted = True
    if not interrupted:
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert interrupted
    assert not re.search(r"[\r\x1b]|tok/s, loss", (folder / "log.txt").read_text())


def test_alpha_step_sees_as_many_time_steps_as_the_weight_step(monkeypatch, corpus, tmp_path):
    """Every alpha step must see a full segment of its text; a segment cut off at the end of the text would leave a few
    tokens for one alpha step in eight."""
    import train_search
    from architect import Architect

    sizes, carried, wraps, hidden = [], [], 0, None
    clipped_gradient = train_search.clipped_gradient

    class Spy(Architect):
        def step(self, train, valid, eta, velocity):
            nonlocal wraps
            sizes.append((train.x.shape, valid.x.shape))
            wraps += not valid.hidden.any()
            assert eta.item() == pytest.approx(len(train.x) / 8)  # lr 1, bptt 8
            # The hidden state is the final one of the weight step before, or zeros in a new epoch.
            if train.hidden.any():
                assert torch.equal(train.hidden, hidden)
                carried.append(len(sizes))
            return super().step(train, valid, eta, velocity)

    def record_hidden(*arguments):
        nonlocal hidden
        nll, hidden, norm = clipped_gradient(*arguments)
        return nll, hidden, norm

    monkeypatch.setattr(train_search, "clipped_gradient", record_hidden)
    monkeypatch.setattr(train_search, "Architect", Spy)
    flags = f"--data {corpus} --save {tmp_path / 'run'} --epochs 3 --arch_start 0 {SIZES}"
    assert train_search.main(flags.split()) == 0
    assert len(sizes) > 40
    assert len(carried) == len(sizes) - 3  # all steps but the first of each epoch
    assert all(a == b for a, b in sizes)
    assert 2 < wraps < len(sizes) / 2  # the hidden state is zeroed only when the text starts again
    assert os.path.exists(tmp_path / "run" / "result.json")


@pytest.mark.parametrize(("script", "kind"), [("train.py", "train"), ("train_search.py", "search")])
def test_run_without_save_has_a_directory_of_its_kind_and_time(script, kind, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here(script, "--data", corpus, *SIZES.split(), "--epochs", 1, *["--arch_start", 0] * (kind == "search"))
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{kind}-\d{{8}}-\d{{6}}", folder.name) and (folder / "result.json").exists()
    run_here(script, "--resume", "--save", folder)
    config = read(folder, "config.json")
    environment = {"versions", "device", "hardware", "threads", "ranks", "git_commit", "started"}
    assert {"script", "flags", "sha256", *environment} <= config.keys()
    assert [set(entry) for entry in config["resumed"]] == [environment]


@pytest.mark.parametrize("script", ["train", "train_search"])
def test_help_of_resume_names_the_flags_that_may_be_given_again(script):
    parser = importlib.import_module(script).build_parser()
    [text] = [action.help for action in parser._actions if action.dest == "resume"]
    assert {*re.findall(r"--(\w+)", text), "resume"} == RESUMABLE


def test_resumed_run_logs_at_the_interval_that_is_given_again(corpus, tmp_path):
    folder = tmp_path / "run"
    run_here("train.py", *start(corpus, folder), "--epochs", 1)
    run_here("train.py", "--resume", "--save", folder, "--epochs", 2, "--log_interval", 1)
    steps = [record["step"] for record in read_records(folder, "interval") if record["epoch"] == 2]
    assert len(steps) > 3 and steps == list(range(steps[0], steps[-1] + 1))


@pytest.mark.parametrize("arch", ["LSTM", "DARTS_V1"])
def test_summary_of_runs_names_the_first_ones_cell(arch, corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "found"
    shutil.copytree(corpus, tmp_path / "text")
    call(train, "--data", tmp_path / "text", "--save", folder, *SIZES.split(), "--arch", arch, "--epochs", 1)
    monkeypatch.setattr("sys.argv", ["summary.py", str(folder), str(folder)])
    main = runpy.run_path(str(ROOT / "scripts" / "summary.py"))["main"]
    assert main() == 0
    assert capsys.readouterr().out.endswith(f"It is\n{genotypes.resolve_cell(arch)}\n")
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "no such corpus or folder" in capsys.readouterr().err.splitlines()[-1]


def test_scripts_need_only_torch_numpy_and_tqdm(searched, trained, no_other_packages):
    """Search, retraining and evaluation run where no other package can be imported."""
    assert [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()] == [
        "torch", "numpy", "tqdm"
    ]  # fmt: skip
    for folder, _ in (searched, trained):
        run("evaluate.py", folder / "best.pt", packages=no_other_packages)
