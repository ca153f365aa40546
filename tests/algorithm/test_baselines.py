"""The baseline cells, torch's LSTM and GRU, match their equations as plain loops, with every kind of dropout."""

import numpy as np
import pytest
import tiny
import torch

from architect import WeightUpdate
from engine import Engine
from engine.dropout import DropoutRates
from genotypes import GenotypeError, cell_from_json, cell_to_json, resolve, resolve_cell
from model import retrain_model
from training.evaluation import evaluate
from training.losses import MicroBatches, clipped_gradient

NAMES = ("LSTM", "GRU")


def baseline(name, rates=tiny.RATES):
    torch.manual_seed(0)
    return tiny.randomize(retrain_model(tiny.V, tiny.H, rates, name))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(W_x, W_h, b, x, h, c):
    """Returns the output and cell state of one step of one batch element (Hochreiter & Schmidhuber 1997).

    The order of the gates is torch's.
    """
    i, f, g, o = np.split(W_x @ x + W_h @ h + b[0] + b[1], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(W_x, W_h, b, x, h):
    """Returns the output of one step of one batch element (Cho et al. 2014).

    The reset gate is applied after the matrix product, as in torch.
    """
    (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(W_x @ x + b[0], 3), np.split(W_h @ h + b[1], 3)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
    return (1 - z) * np.tanh(x_n + r * h_n) + z * h


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropped", [True, False])
def test_baseline_hidden_states_match_equations(name, dropped):
    model = baseline(name, tiny.RATES if dropped else DropoutRates())
    batch, rnn = tiny.batch(model, 1), model.cell.rnn
    masks = batch.masks
    state = torch.randn(tiny.B, model.cell.state_size, dtype=torch.float64)
    actual, last = model(batch.x, state, masks)

    def array(tensor):
        return None if tensor is None else tensor.detach().numpy()

    embedding = array(model.embedding) * (array(masks.word) if dropped else 1)
    W_x, W_h, biases = array(rnn.weight_ih_l0), array(rnn.weight_hh_l0), (array(rnn.bias_ih_l0), array(rnn.bias_hh_l0))
    if dropped:
        assert masks.hidden is None
        W_h = W_h * array(masks.connections)
    for b in range(tiny.B):
        parts = np.split(array(state)[b], model.cell.state_size // tiny.H)
        for t in range(tiny.T):
            x = embedding[batch.x[t, b]]
            if dropped:
                x = x * array(masks.embedding)[b] * array(masks.x)[b]
            parts = lstm(W_x, W_h, biases, x, *parts) if name == "LSTM" else [gru(W_x, W_h, biases, x, *parts)]
            np.testing.assert_allclose(array(actual)[t, b], parts[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(array(last)[b], np.concatenate(parts), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("small", [1, 2, 3])
def test_baseline_micro_batches_match_whole_batch(name, small):
    """Every micro-batch drops the same connections as the whole batch."""
    model = baseline(name)
    batch, results = tiny.batch(model, 4), []
    batch = batch._replace(hidden=torch.randn(tiny.B, model.cell.state_size, dtype=torch.float64))
    for size in (tiny.B, small):
        model.zero_grad()
        parts = MicroBatches(model, batch, size, alpha=0.5, beta=0.5)
        nll, hidden, _ = clipped_gradient(parts, model.weights(), WeightUpdate())
        results.append([nll, hidden, *(w.grad for w in model.weights())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_baseline_evaluation_carries_the_whole_state(name):
    model = baseline(name)
    source = torch.randint(tiny.V, (23, 3), generator=torch.Generator().manual_seed(0))
    whole = evaluate(model, source, 100)
    assert [evaluate(model, source, bptt) for bptt in (1, 5, 7)] == pytest.approx([whole] * 3, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_dropouth_masks_connections_and_not_hidden_states(name):
    masks = baseline(name, DropoutRates(dropouth=0.5)).sample_masks(3)
    gates = {"LSTM": 4, "GRU": 3}[name]
    assert masks.connections.shape == (gates * tiny.H, tiny.H)
    assert set(masks.connections.unique().tolist()) == {0.0, 2.0}
    assert masks.hidden is None
    assert masks.batch_slice(1, 2).connections is masks.connections


@pytest.mark.parametrize("name", NAMES)
def test_baseline_loss_matches_between_engines(name):
    model = baseline(name).float()
    batch = tiny.batch(model, 1)
    hidden, actual = model.initial_hidden(tiny.B), []
    for engine in ("eager", "fused"):
        chosen = model.with_engine(Engine(engine))
        actual.append(chosen.nll(chosen(batch.x, hidden)[0], batch.y).item())
    assert actual[0] == pytest.approx(actual[1], rel=1e-5)


def test_baseline_names_resolve_like_genotypes():
    for text in ("LSTM", "lstm"):
        assert resolve_cell(text) == "LSTM"
    assert cell_from_json(cell_to_json("GRU")) == "GRU"
    genotype = resolve("random:3")
    assert resolve_cell("random:3") == genotype == cell_from_json(cell_to_json(genotype))
    for wrong in ("RNN", 3, None):
        with pytest.raises(GenotypeError):
            cell_from_json(wrong)
    with pytest.raises(GenotypeError):  # an LSTM is not a genotype
        resolve("LSTM")
