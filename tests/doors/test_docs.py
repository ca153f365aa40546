"""The Python code on the pages of docs/ runs, and does what the page says."""

import re

import pytest
import torch
from helpers import ROOT, SIZES, call, write_corpus

import train
from experiment.trained_model import load_trained

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CELLS = {
    "genotype": ["--arch", "ENAS"],
    "averaged": ["--arch", "DARTS", "--optimizer", "asgd"],
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
    monkeypatch.chdir(tmp_path / "run")
    found = run_page("export.md")
    model = load_trained("best.pt").model
    eos = torch.tensor([[found["words"].index("<eos>")]])
    with torch.no_grad():
        hiddens, state = model(eos, model.initial_hidden(1))
    torch.testing.assert_close(found["log_probs"], model.log_probs(hiddens)[0])
    torch.testing.assert_close(found["state"], state)
    hiddens, _ = found["cell"].module()(found["x"], model.initial_hidden(2))
    torch.testing.assert_close(
        hiddens, model.cell(found["x"], model.initial_hidden(2), found["NO_MASKS"], model.engine)[0]
    )
    assert "9 words, 8 hidden units" in capsys.readouterr().out
