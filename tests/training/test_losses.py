"""The training loss, its gradient in small batches, the scaled learning rate and the evaluation."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Engine, reference
from engine.dropout import DropoutRates, Masks, sample_mask
from genotypes import DARTS_V1
from training.evaluation import evaluate
from training.gradients import accumulate_gradients, scaled_lr
from training.losses import MicroBatches, losses


def plain_nll(model, outputs, y):
    """Mean over all positions of -log softmax, one position at a time."""
    total = 0.0
    for t in range(y.size(0)):
        for b in range(y.size(1)):
            scores = [(outputs[t, b] @ model.embedding[v] + model.bias[v]).item() for v in range(model.ntoken)]
            total -= scores[y[t, b]] - math.log(sum(math.exp(s) for s in scores))
    return total / y.numel()


def test_the_loss_is_nll_and_both_activation_terms():
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    hiddens, _ = model(batch.x, batch.hidden, batch.masks)
    outputs = hiddens * batch.masks.output
    found = losses(model, batch, alpha=0.7, beta=1.3)
    nll = plain_nll(model, outputs, batch.y)
    ar = sum(value**2 for value in outputs.flatten().tolist()) / outputs.numel()
    steps = [
        (a - b) ** 2 for t in range(1, tiny.T) for a, b in zip(*hiddens[t - 1 : t + 1].flatten(1).tolist(), strict=True)
    ]
    assert found.nll.item() == pytest.approx(nll, rel=1e-12)
    assert found.total.item() == pytest.approx(nll + 0.7 * ar + 1.3 * sum(steps) / len(steps), rel=1e-12)
    assert torch.equal(found.hidden, hiddens[-1])


def test_a_single_time_step_has_no_temporal_term():
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    batch = batch._replace(x=batch.x[:1], y=batch.y[:1])
    found = losses(model, batch, beta=1.0)
    assert found.total.item() == pytest.approx(found.nll.item())


@pytest.mark.parametrize(
    ("rate", "mask"),
    [("dropout", "output"), ("dropouth", "hidden"), ("dropoutx", "x"), ("dropouti", "embedding"), ("dropoute", "word")],
)
def test_each_rate_draws_its_own_mask(rate, mask):
    masks = tiny.discrete_model(DARTS_V1, DropoutRates(**{rate: 0.5})).sample_masks(4)
    assert {name for name, value in masks._asdict().items() if value is not None} == {mask}
    assert all(value is None for value in tiny.discrete_model(DARTS_V1, DropoutRates()).sample_masks(4))


def test_every_mask_acts_at_its_place():
    """The model is: embed, drop words, drop elements, cell with both of its masks; then the outputs are dropped."""
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    masks = batch.masks
    embedded = (model.embedding * masks.word)[batch.x] * masks.embedding
    cell = model.cell
    expected = reference.discrete(embedded, batch.hidden, cell.W0, cell.Ws, *DARTS_V1, masks.x, masks.hidden)
    hiddens, last = model(batch.x, batch.hidden, masks)
    assert torch.equal(last, hiddens[-1])
    torch.testing.assert_close(hiddens, expected)
    nll = model.nll(expected * masks.output, batch.y)
    torch.testing.assert_close(model.nll(hiddens, batch.y, masks), nll)


def test_a_dropped_word_type_is_dropped_wherever_it_stands():
    model = tiny.discrete_model(DARTS_V1, DropoutRates())
    x = torch.tensor([[1, 2], [2, 1]])
    word = torch.ones(tiny.V, 1, dtype=torch.float64)
    word[2] = 0
    with torch.no_grad():
        found, _ = model(x, model.initial_hidden(2), Masks(word=word))
        model.embedding[2] = 0
        expected, _ = model(x, model.initial_hidden(2))
    assert torch.equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.01, 0.95), seed=st.integers(0, 10**6))
def test_a_mask_is_zero_or_the_inverse_of_what_is_kept(p, seed):
    torch.manual_seed(seed)
    mask = sample_mask(200, 200, p, torch.zeros((), dtype=torch.float64))
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(kept.double().mean().item() - (1 - p)) < 6 * deviation


@pytest.mark.parametrize("small", [1, 2, 3, 6])
@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("cell", ["discrete", "layer", "none"])
def test_small_batches_of_a_cell_whose_rows_are_independent_are_the_whole_batch(cell, engine, small):
    """A discrete cell, and a relaxed one without batch normalisation. Every dropout on: the masks are the whole
    batch's, so loss, gradient and hidden state are the same."""
    model = tiny.discrete_model(DARTS_V1) if cell == "discrete" else tiny.search_model(norm=cell)
    model = model.with_engine(Engine(engine))
    batch = tiny.batch(model, 4)
    results = []
    for size in (tiny.B, small):
        model.zero_grad()
        inputs = list(model.parameters())
        nll, hidden = accumulate_gradients(MicroBatches(model, batch, size, alpha=0.5, beta=0.5), inputs)
        results.append([nll, hidden, *(w.grad for w in inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_four_small_batches_of_a_relaxed_cell_are_one_large_one():
    """Dropout off; the large batch is four copies of a small one, so that both have the same statistics."""
    model = tiny.search_model(DropoutRates())
    small = tiny.batch(model, 5, rows=3)
    large = small._replace(x=small.x.repeat(1, 4), y=small.y.repeat(1, 4), hidden=small.hidden.repeat(4, 1))
    results = []
    for size in (12, 3):
        model.zero_grad()
        inputs = [*model.weights(), model.alphas]
        nll, _ = accumulate_gradients(MicroBatches(model, large, size, alpha=0.5, beta=0.5), inputs)
        results.append([nll, *(p.grad for p in inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_the_weight_step_leaves_the_alphas_alone():
    model = tiny.search_model()
    accumulate_gradients(MicroBatches(model, tiny.batch(model, 1), 3), model.weights())
    assert model.alphas.grad is None
    assert all(w.grad is not None for w in model.weights())


def test_the_learning_rate_is_scaled_inside_and_restored_after_an_error():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=20.0)
    with pytest.raises(ZeroDivisionError), scaled_lr(optimizer, 17 / 35) as eta:
        assert eta == optimizer.param_groups[0]["lr"] == 20.0 * 17 / 35
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["lr"] == 20.0


@pytest.mark.parametrize("bptt", [1, 3, 7, 100])
def test_evaluation_is_the_mean_over_every_predicted_word(bptt):
    """Carried state and any cut into segments: the same as one pass over the whole text, and no dropout."""
    model = tiny.discrete_model(DARTS_V1, DropoutRates(0.5, 0.5, 0.5, 0.5, 0.5))
    source = torch.randint(tiny.V, (23, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, _ = model(source[:-1], model.initial_hidden(3))
        expected = plain_nll(model, outputs, source[1:])
    assert evaluate(model, source, bptt) == pytest.approx(expected, rel=1e-12)
