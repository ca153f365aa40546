"""The Python code on the pages of docs/ runs, and does what the page says; the commands there have flags that exist."""

import os
import re
import shlex
import subprocess

import pytest
import torch
from helpers import ROOT, SIZES, call, copy_scripts, write_corpus

import generate
import train
import train_search
import trials
import visualize
from experiment import arguments, evaluation_arguments, validate_arguments
from experiment.trained_model import load_trained

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CELLS = {
    "genotype": ["--arch", "ENAS"],
    "averaged": ["--arch", "DARTS", "--optimizer", "asgd"],
    "fine-tuned, no better": ["--arch", "DARTS", "--optimizer", "sgd"],
}


def run_page(page):
    """Runs the Python blocks of a page one after another, in one namespace, and returns that."""
    blocks = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("name", CELLS)
def test_code_of_the_export_page_gives_the_log_probabilities_of_the_model(name, tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path, train=30, valid=16, test=16)
    flags = [*SIZES, "--epochs", "2", "--lr", "1", "--engine", "eager", *CELLS[name]]
    code, _, err = call(train, *flags, "--data", tmp_path, "--save", tmp_path / "run")
    assert code == 0, err
    if name == "fine-tuned, no better":
        flags = ["--epochs", "1", "--lr", "200", "--finetune", tmp_path / "run", "--save", tmp_path / "tuned"]
        code, _, err = call(train, *flags, "--data", tmp_path)
        assert code == 0, err
        (tmp_path / "run").rename(tmp_path / "begun")
        (tmp_path / "tuned").rename(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    names = run_page("export.md")
    model = load_trained("best.pt").model
    eos = torch.tensor([[names["words"].index("<eos>")]])
    with torch.no_grad():
        hiddens, state = model(eos, model.initial_hidden(1))
    torch.testing.assert_close(names["log_probs"], model.log_probs(hiddens)[0])
    torch.testing.assert_close(names["state"], state)
    hiddens, _ = names["cell"].module()(names["x"], model.initial_hidden(2))
    torch.testing.assert_close(
        hiddens, model.cell(names["x"], model.initial_hidden(2), names["NO_MASKS"], model.engine)[0]
    )
    assert "9 words, 8 hidden units" in capsys.readouterr().out


PARSERS = {
    "train_search.py": train_search.build_parser, "train.py": train.build_parser, "generate.py": generate.build_parser,
    "evaluate.py": evaluation_arguments.build_parser, "trials.py": trials.build_parser,
    "visualize.py": lambda: visualize.build_parser()[0],
}  # fmt: skip
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands():
    """Yields (page, script, flags) of each command of the README and docs/ that runs one of the scripts."""
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        for block in SHELL.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:^|\| |python |node \d )(\w+\.py) ([^|]*)", line):
                    yield page.name, match[1], shlex.split(match[2], comments=True)


def assert_go_together(script, flags, where):
    """Asserts that a script would take the flags, as far as that can be said without its files and a GPU."""
    parser = PARSERS[script]()
    try:
        args = parser.parse_args(flags)
    except SystemExit:
        pytest.fail(f"{where}: {script} {shlex.join(flags)}")
    if script in ("train_search.py", "train.py") and not (args.resume or "--finetune" in flags):
        kind = "train" if script == "train.py" else "search"
        arguments.complete(args, kind)
        faults = validate_arguments.validate(kind, args, parser.get_default)
        assert [fault for fault in faults if "CUDA" not in fault] == [], f"{where}: {script} {shlex.join(flags)}"


def test_commands_of_the_pages_have_flags_that_go_together():
    documented = [command for command in commands() if command[1] in PARSERS]
    assert len(documented) > 30 and {script for _, script, _ in documented} == PARSERS.keys()
    for page, script, flags in documented:
        assert_go_together(script, flags, page)


RECIPES = {"quickstart.sh": ["1", "out"], "search_recommended.sh": [], "train_small.sh": ["run"]}


@pytest.mark.parametrize("name", RECIPES)
def test_commands_of_the_small_recipes_have_flags_that_go_together(name, tmp_path):
    """A copy of the script, whose .venv has a program in the place of Python that writes down what it is asked."""
    calls = tmp_path / "calls"
    record = f'printf "%s\\t" "$@" >>{calls}; echo >>{calls}'
    copy_scripts(tmp_path, f'case "$1" in -c) echo 1;; -m) ;; *) {record};; esac', "requirements-plots.txt")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "OMP_NUM_THREADS")}
    command = ["bash", tmp_path / "scripts" / name, *RECIPES[name]]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    asked = [line.split("\t")[:-1] for line in calls.read_text().splitlines()]
    assert {script for script, *_ in asked} & {"train.py", "train_search.py"}
    for script, *flags in asked:
        if script in PARSERS:
            assert_go_together(script, flags, name)
