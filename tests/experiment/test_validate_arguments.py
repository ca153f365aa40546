"""Tests that every error of a user gives exit code 2 and one line for each, and that no file is overwritten."""

import json

import pytest
import torch

import evaluate
import train
import train_search
from experiment import arguments, checkpoint, validate_arguments

SMALL = "--emsize 8 --batch_size 4 --bptt 6 --epochs 1 --lr 1".split()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("a b c d e f g h\n" * 12)
    return folder


@pytest.fixture
def refused(capsys):
    """A function that runs a script, asserts that it exits with 2 and returns its error lines."""

    def run(script, *flags):
        with pytest.raises(SystemExit) as caught:
            script.main([str(flag) for flag in flags])
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert all("error: " in line for line in lines)
        return lines

    return run


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if ".npz" not in path.name and path.name != "lock"}


BAD_FLAGS = [
    ("--dropout -0.1", "--dropout -0.1"),
    ("--dropouth 1", "--dropouth 1.0"),
    ("--dropoute nan", "--dropoute nan"),
    ("--lr 0", "--lr 0.0"),
    ("--lr inf", "--lr inf"),
    ("--clip -1", "--clip -1.0"),
    ("--epochs 0", "--epochs 0"),
    ("--bptt 0", "--bptt 0"),
    ("--log_interval 0", "--log_interval 0"),
    ("--wdecay -0.001", "--wdecay -0.001"),
    ("--seed -1", "--seed -1"),
    ("--seed 99999999999999999999", "--seed 99999999999999999999"),
    ("--small_batch_size 3", "--small_batch_size 3: must divide --batch_size 4"),
    ("--small_batch_size 8", "--small_batch_size 8: must divide --batch_size 4"),
    ("--nhid 9", "--emsize 8 --nhid 9"),
    ("--nhidlast 9", "--nhidlast 9"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device tpu", "--device tpu"),
    ("--device cuda:x", "--device cuda:x"),
    ("--lr fast", "--lr: invalid float value: 'fast'"),
    ("--colour red", "--colour"),
    ("--resume", "--save DIR"),
]


@pytest.mark.parametrize("script", [train_search, train])
@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_invalid_flag_exits_2_with_one_line(script, flags, message, corpus, refused, tmp_path):
    before = tree(tmp_path)
    (line,) = refused(script, "--data", corpus, *SMALL, *flags.split())
    assert message in line
    assert tree(tmp_path) == before


def test_all_errors_are_reported_at_once(refused, corpus, tmp_path):
    (corpus / "valid.txt").write_text("")
    (corpus / "test.txt").unlink()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    flags = "--emsize 8 --nhid 9 --batch_size 4 --small_batch_size 3 --dropout 2 --lr -1 --arch DRATS --device tpu"
    lines = refused(train, "--data", corpus, *flags.split(), "--save", tmp_path / "taken")
    named = [
        "--dropout",
        "--lr",
        "--nhid 9",
        "--small_batch_size",
        "--device tpu",
        "--save",
        "--arch",
        "valid.txt: empty",
        "test.txt: missing",
    ]
    assert [sum(name in line for line in lines) for name in named] == [1] * len(named)
    assert len(lines) == len(named)


BAD_ARCH = [
    ("DRATS", "did you mean DARTS"),
    ("runs/there-is-none", "unknown genotype"),
    ("cell.json", "cannot read"),
    ("Genotype(recurrent=[('tanh', 0)", "cannot read"),
    ("Genotype(recurrent=[('tanh', 1)], concat=[1])", "node 1: predecessor"),
    ("Genotype(recurrent=[('sine', 0)], concat=[1])", "'sine'"),
    ("Genotype(recurrent=[('none', 0)], concat=[1])", "'none'"),
    ("Genotype(recurrent=[('tanh', 0)], concat=[2])", "concat"),
    ("__import__('os').system('true')", "expected Genotype"),
]


@pytest.mark.parametrize(("arch", "message"), BAD_ARCH)
def test_invalid_arch_exits_2_with_one_line(arch, message, corpus, refused):
    (line,) = refused(train, "--data", corpus, *SMALL, "--arch", arch)
    assert "--arch" in line
    assert message in line


@pytest.mark.parametrize("script", [train_search, train])
def test_unreadable_texts_exit_2_with_one_line_each(script, corpus, refused, tmp_path):
    (corpus / "train.txt").write_bytes(b"caf\xe9 au lait\n" * 50)
    (corpus / "valid.txt").write_text(" \n\n")
    (corpus / "test.txt").unlink()
    lines = refused(script, "--data", corpus, *SMALL)
    assert len(lines) == 3
    assert all(name in line for name, line in zip(("train.txt", "valid.txt", "test.txt"), lines, strict=True))
    assert "UTF-8" in lines[0]
    (line,) = refused(script, "--data", tmp_path / "nowhere", *SMALL)
    assert "--data" in line


@pytest.mark.parametrize("script", [train_search, train])
def test_split_too_short_for_the_batch_exits_2(script, corpus, refused):
    (corpus / "test.txt").write_text("a\n")
    lines = refused(script, "--data", corpus, *SMALL, "--batch_size", 100)
    assert any("too few for a batch size of 100" in line and "--batch_size" in line for line in lines)
    assert all("--batch_size" not in line for line in lines if "for test" in line)


@pytest.mark.parametrize("script", [train_search, train])
def test_save_refuses_a_file_and_a_folder_with_other_files(script, corpus, refused, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    (line,) = refused(script, "--data", corpus, *SMALL, "--save", folder)
    assert "--save" in line
    for file in (folder / "thesis.txt", folder / "thesis.txt" / "run"):
        (line,) = refused(script, "--data", corpus, *SMALL, "--save", file)
        assert "thesis.txt is a file" in line
    assert tree(tmp_path) == before


def finished(script, corpus, folder, *more):
    assert script.main([str(flag) for flag in ("--data", corpus, *SMALL, "--save", folder, *more)]) == 0


def test_run_is_not_overwritten_or_resumed_with_other_settings(corpus, refused, tmp_path, capsys):
    folder = tmp_path / "run"
    finished(train, corpus, folder)
    capsys.readouterr()
    before = tree(tmp_path)
    (line,) = refused(train, "--data", corpus, *SMALL, "--save", folder)
    assert "--resume" in line
    (line,) = refused(train_search, "--resume", "--save", folder)
    assert "train.py" in line
    (line,) = refused(train, "--resume", "--save", folder, "--lr", 3)
    assert "--lr 3.0: the run in" in line
    assert "has 1.0" in line
    (line,) = refused(train, "--resume", "--save", tmp_path / "none")
    assert "no run" in line
    (corpus / "train.txt").write_text("a b c d e f g h i\n" * 12)
    (line,) = refused(train, "--resume", "--save", folder)
    assert "not the text" in line
    assert {p: b for p, b in tree(tmp_path).items() if "corpus" not in str(p)} == {
        p: b for p, b in before.items() if "corpus" not in str(p)
    }
    (folder / "config.json").write_text("{")
    (line,) = refused(train, "--resume", "--save", folder)
    assert "damaged" in line


def test_run_without_a_checkpoint_resumes_from_the_start(corpus, tmp_path):
    finished(train, corpus, tmp_path / "whole")
    finished(train, corpus, tmp_path / "run")
    for name in ("last.pt", "previous.pt", "best.pt", "result.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    assert train.main(["--resume", "--save", str(tmp_path / "run")]) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")]
    assert results[0]["test_ppl"] == results[1]["test_ppl"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_resume_refuses_missing_or_foreign_checkpoints(corpus, refused, tmp_path, capsys):
    folder = tmp_path / "run"
    finished(train, corpus, folder)
    finished(train_search, corpus, tmp_path / "search")
    capsys.readouterr()
    (folder / "previous.pt").unlink()
    before = tree(folder)
    (line,) = refused(train_search, "--resume", "--save", tmp_path / "search", "--arch_lr", 9)
    assert "--arch_lr 9.0" in line
    for name in ("search/last.pt", "corpus/train.txt"):
        (folder / "last.pt").write_bytes((tmp_path / name).read_bytes())
        (line,) = refused(train, "--resume", "--save", folder)
        assert "last.pt" in line
    (folder / "last.pt").unlink()
    (line,) = refused(train, "--resume", "--save", folder)
    assert "last.pt" in line
    (folder / "last.pt").write_bytes(before[folder / "last.pt"])
    assert tree(folder) == before
    (folder / "best.pt").unlink()
    (line,) = refused(train, "--resume", "--save", folder)
    assert "best.pt: missing" in line


def test_resume_refuses_fewer_epochs_than_are_done(corpus, refused, tmp_path, capsys):
    finished(train, corpus, tmp_path / "run")
    assert train.main(["--resume", "--save", str(tmp_path / "run"), "--epochs", "2"]) == 0
    capsys.readouterr()
    (line,) = refused(train, "--resume", "--save", tmp_path / "run", "--epochs", "1")
    assert "--epochs 1" in line


@pytest.mark.parametrize(
    "change", [{"lr": None}, {"lr": [1]}, {"device": 5}, {"emsize": 8.0}, {"arch": 3}, {"colour": 1}]
)
def test_resume_refuses_a_config_with_invalid_values(change, corpus, refused, tmp_path, capsys):
    finished(train, corpus, tmp_path / "run")
    capsys.readouterr()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "flags": {**config["flags"], **change}}))
    (line,) = refused(train, "--resume", "--save", tmp_path / "run")
    assert "damaged" in line
    path.write_text(json.dumps({**config, "flags": {}}))
    (line,) = refused(train, "--resume", "--save", tmp_path / "run")
    assert "damaged" in line


def test_batch_norm_refuses_one_batch_element_at_a_time(corpus, refused, tmp_path):
    """Without batch normalisation a batch or micro-batch of one element is permitted."""
    for flags in ("--batch_size 1", "--small_batch_size 1"):
        (line,) = refused(train_search, "--data", corpus, *SMALL, "--norm", "batch", *flags.split())
        assert "at least 2 elements at a time" in line
    for norm, flags in (("layer", "--batch_size 1 --limit_tokens 40"), ("none", "--small_batch_size 1 --unrolled")):
        finished(train_search, corpus, tmp_path / norm, "--norm", norm, *flags.split())
        assert json.loads((tmp_path / norm / "result.json").read_text())["test_ppl"] > 1


def test_evaluate_refuses_a_checkpoint_with_an_unknown_norm(corpus, refused, tmp_path, capsys):
    finished(train_search, corpus, tmp_path / "run", "--norm", "none")
    capsys.readouterr()
    saved = checkpoint.load(tmp_path / "run" / "best.pt")
    for flags in ({**saved["flags"], "norm": "group"}, {**saved["flags"], "norm": ["layer"]}):
        checkpoint.save({**saved, "flags": flags}, tmp_path / "odd.pt")
        (line,) = refused(evaluate, tmp_path / "odd.pt")
        assert "holds no model of this project" in line


def test_evaluate_exits_2_with_one_line_for_invalid_input(corpus, refused, tmp_path, capsys):
    torch.save({"format": 1}, tmp_path / "odd.pt")
    for path in (tmp_path / "none.pt", tmp_path / "odd.pt", corpus / "train.txt", tmp_path):
        (line,) = refused(evaluate, path)
        assert str(path) in line
    finished(train, corpus, tmp_path / "run")
    capsys.readouterr()
    (line,) = refused(evaluate, tmp_path / "run" / "best.pt", "--data", tmp_path / "nowhere")
    assert "--data" in line
    (line,) = refused(evaluate, tmp_path / "run" / "best.pt", "--device", "cuda:99")
    assert "--device" in line


@pytest.mark.parametrize("script", [train, train_search])
def test_precision_unsupported_by_engine_or_device_exits_2(script, refused, corpus, tmp_path):
    save = ("--data", corpus, *SMALL, "--save", tmp_path / "run")
    [line] = refused(script, *save, "--engine", "eager", "--precision", "bf16")
    assert "--precision bf16" in line
    [line] = refused(script, *save, "--device", "cpu", "--precision", "tf32")
    assert "--precision tf32" in line
    assert not (tmp_path / "run").exists()


# --- people who come from the published code ---

PUBLISHED_FLAGS = [
    (train, "--cuda", "use --device cpu"),
    (train, "--gpu 0", "use --device cuda:N"),
    (train, "--gpu=1", "use --device cuda:N"),
    (train_search, "--single_gpu", "use torchrun (docs/distributed.md)"),
    (train_search, "--continue_train", "use --resume"),
    (train, "--w_lr 0.1", "use --lr"),
    (train_search, "--arch_learning_rate 0.1", "use --arch_lr"),
    (train, "--log-interval 3", "use --log_interval"),
    (train, "--batch-size 3", "use --batch_size"),
    (train, "--Max-Seq-Len-Delta 3", "use --max_seq_len_delta"),
    (train, "--dropuot 0.1", "did you mean --dropout?"),
    (train, "--arch_lr 0.1", "it is for train_search.py"),
    (train_search, "--arch DARTS", "use train.py --arch"),
    (train_search, "--nonmono 5", "leave it out"),
    (evaluate, "--model_path ptb_model.pt", "without a flag, to evaluate.py"),
    (evaluate, "model.pt --emsize 850", "the checkpoint has it; leave it out"),
    (evaluate, "model.pt --colour red", "see --help"),  # There is none to advise.
    (evaluate, "model.pt --w_lr 1", "see --help"),  # This script has no --lr.
]


@pytest.mark.parametrize(("script", "flags", "message"), PUBLISHED_FLAGS)
def test_flag_of_the_published_code_ends_with_the_one_to_use(script, flags, message, refused):
    (line,) = refused(script, *flags.split())
    [flag] = [word.split("=")[0] for word in flags.split() if word.startswith("--")]
    assert f"error: {flag}: no such flag; " in line and line.endswith(message)


def test_every_unknown_flag_is_reported_at_once(refused):
    lines = refused(train, *"--gpu 0 --cuda --epochs 3 --log-interval 9".split())
    assert [line.split()[2] for line in lines] == ["--gpu:", "--cuda:", "--log-interval:"]


def test_published_flags_of_both_scripts_are_known_or_advised_on(refused):
    """The names in the parsers of rnn/train_search.py and rnn/train.py of the published code."""
    both = (
        "data emsize nhid nhidlast lr clip epochs batch_size bptt dropout dropouth dropoutx dropouti dropoute seed"
        " nonmono cuda log-interval save alpha beta wdecay continue_train small_batch_size max_seq_len_delta"
        " single_gpu gpu"
    ).split()
    for script, names in ((train_search, [*both, "unrolled", "arch_wdecay", "arch_lr"]), (train, [*both, "arch"])):
        known = script.build_parser()._option_string_actions
        missing = [f"--{name}" for name in names if f"--{name}" not in known]
        lines = refused(script, *missing)
        assert len(lines) == len(missing) and not any(line.endswith("see --help") for line in lines)


def test_minus_one_is_the_default_as_in_the_published_code():
    flags = "--emsize 24 --batch_size 6 --nhidlast -1 --small_batch_size -1".split()
    for script, kind in ((train_search, "search"), (train, "train")):
        args = script.build_parser().parse_args(flags)
        arguments.complete(args, kind)
        assert (args.nhidlast, args.small_batch_size) == (24, 6)
        assert validate_arguments.number_faults(args) == validate_arguments.size_faults(args) == []


def test_arch_from_a_log_with_two_genotypes_prints_one_note_and_trains_the_last(corpus, tmp_path, capsys):
    text = "Genotype(recurrent=[('tanh', 0), ('relu', 1)], concat=range(1, 3))"
    (tmp_path / "log.txt").write_text(f"01/02 03:04:05 PM Genotype([('relu', 0)], [1])\n01/02 03:04:06 PM {text}\n")
    flags = ["--arch", tmp_path / "log.txt", "--engine", "eager", "--save", tmp_path / "run"]
    assert train.main([str(flag) for flag in ("--data", corpus, *SMALL, *flags)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert lines == [f"train.py: '{tmp_path}/log.txt' holds 2 genotypes; the last is taken, of line 2"]
    genotype = json.loads((tmp_path / "run" / "result.json").read_text())["genotype"]
    assert genotype == {"recurrent": [["tanh", 0], ["relu", 1]], "concat": [1, 2]}
