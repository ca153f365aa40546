"""The training loss, dropout masks, gradients over micro-batches, learning-rate scaling and evaluation are correct."""

import math

import pytest
import tiny
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from architect import WeightUpdate
from engine import Engine, reference
from engine.dropout import DropoutRates, Masks, sample_mask
from genotypes import DARTS_V1
from training.evaluation import evaluate
from training.losses import MicroBatches, clipped_gradient, losses
from training.optimizers import scaled_lr


def plain_nll(model, outputs, y):
    """Returns the mean of -log softmax over all target words, computed one word at a time."""
    total = 0.0
    for t in range(y.size(0)):
        for b in range(y.size(1)):
            scores = [(outputs[t, b] @ model.embedding[v] + model.bias[v]).item() for v in range(len(model.embedding))]
            total -= scores[y[t, b]] - math.log(sum(math.exp(s) for s in scores))
    return total / y.numel()


def test_loss_is_nll_plus_activation_regularization():
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    hiddens, _ = model(batch.x, batch.hidden, batch.masks)
    outputs = hiddens * batch.masks.output
    actual = losses(model, batch, alpha=0.7, beta=1.3)
    nll = plain_nll(model, outputs, batch.y)
    ar = sum(value**2 for value in outputs.flatten().tolist()) / outputs.numel()
    differences = [
        (a - b) ** 2 for t in range(1, tiny.T) for a, b in zip(*hiddens[t - 1 : t + 1].flatten(1).tolist(), strict=True)
    ]
    assert actual.nll.item() == pytest.approx(nll, rel=1e-12)
    assert actual.total.item() == pytest.approx(nll + 0.7 * ar + 1.3 * sum(differences) / len(differences), rel=1e-12)
    assert torch.equal(actual.hidden, hiddens[-1])


def test_single_time_step_has_no_temporal_term():
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    batch = batch._replace(x=batch.x[:1], y=batch.y[:1])
    actual = losses(model, batch, beta=1.0)
    assert actual.total.item() == pytest.approx(actual.nll.item())


@pytest.mark.parametrize(
    ("rate", "mask"),
    [("dropout", "output"), ("dropouth", "hidden"), ("dropoutx", "x"), ("dropouti", "embedding"), ("dropoute", "word")],
)
def test_each_dropout_rate_samples_its_own_mask(rate, mask):
    masks = tiny.discrete_model(DARTS_V1, DropoutRates(**{rate: 0.5})).sample_masks(4)
    assert {name for name, value in masks._asdict().items() if value is not None} == {mask}
    assert all(value is None for value in tiny.discrete_model(DARTS_V1, DropoutRates()).sample_masks(4))


def test_each_mask_is_applied_where_it_belongs():
    """The word and embedding masks act on the embedding, two masks in the cell, and the output mask on its outputs."""
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


def test_word_mask_drops_every_occurrence_of_a_word():
    model = tiny.discrete_model(DARTS_V1, DropoutRates())
    x = torch.tensor([[1, 2], [2, 1]])
    word = torch.ones(tiny.V, 1, dtype=torch.float64)
    word[2] = 0
    with torch.no_grad():
        actual, _ = model(x, model.initial_hidden(2), Masks(word=word))
        model.embedding[2] = 0
        expected, _ = model(x, model.initial_hidden(2))
    assert torch.equal(actual, expected)


@settings(max_examples=examples(30))
@given(p=st.floats(0.01, 0.95), seed=st.integers(0, 10**6))
def test_mask_elements_are_zero_or_inverse_keep_probability(p, seed):
    torch.manual_seed(seed)
    mask = sample_mask(200, 200, p, torch.zeros((), dtype=torch.float64))
    nonzero = mask != 0
    torch.testing.assert_close(mask[nonzero], torch.full_like(mask[nonzero], 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(nonzero.double().mean().item() - (1 - p)) < 6 * deviation


@pytest.mark.parametrize("small", [1, 2, 3, 4])
@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("cell", ["discrete", "layer", "none"])
def test_micro_batches_match_whole_batch_for_independent_elements(cell, engine, small):
    """Batch elements are independent in a discrete cell and in a relaxed one without batch normalisation.

    Every kind of dropout is on. The micro-batches share the masks of the whole batch, so loss, gradient and hidden
    state are equal.
    """
    model = tiny.discrete_model(DARTS_V1) if cell == "discrete" else tiny.search_model(norm=cell)
    model = model.with_engine(Engine(engine))
    batch = tiny.batch(model, 4)
    results = []
    for size in (tiny.B, small):
        model.zero_grad()
        inputs = list(model.parameters())
        parts = MicroBatches(model, batch, size, alpha=0.5, beta=0.5)
        nll, hidden, _ = clipped_gradient(parts, inputs, WeightUpdate())
        results.append([nll, hidden, *(w.grad for w in inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_micro_batches_match_whole_batch_with_equal_batch_statistics():
    """The large batch is four copies of a small one without dropout, so that both have the same batch statistics."""
    model = tiny.search_model(DropoutRates())
    small = tiny.batch(model, 5, batch_size=3)
    large = small._replace(x=small.x.repeat(1, 4), y=small.y.repeat(1, 4), hidden=small.hidden.repeat(4, 1))
    results = []
    for size in (12, 3):
        model.zero_grad()
        inputs = [*model.weights(), model.alphas]
        parts = MicroBatches(model, large, size, alpha=0.5, beta=0.5)
        nll, _, _ = clipped_gradient(parts, inputs, WeightUpdate())
        results.append([nll, *(p.grad for p in inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)


def test_weight_step_gives_alphas_no_gradient():
    model = tiny.search_model()
    clipped_gradient(MicroBatches(model, tiny.batch(model, 1), 3), model.weights(), WeightUpdate())
    assert model.alphas.grad is None
    assert all(w.grad is not None for w in model.weights())


def test_scaled_lr_is_restored_after_an_error():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=20.0)
    with pytest.raises(ZeroDivisionError), scaled_lr(optimizer, 17 / 35) as eta:
        assert eta == optimizer.param_groups[0]["lr"] == 20.0 * 17 / 35
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["lr"] == 20.0


@pytest.mark.parametrize("bptt", [1, 3, 7, 100])
def test_evaluation_loss_is_the_mean_over_all_words(bptt):
    """Evaluation in segments of any length carries the state, uses no dropout, and equals one pass over the text."""
    model = tiny.discrete_model(DARTS_V1, DropoutRates(0.5, 0.5, 0.5, 0.5, 0.5))
    source = torch.randint(tiny.V, (23, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, _ = model(source[:-1], model.initial_hidden(3))
        expected = plain_nll(model, outputs, source[1:])
    assert evaluate(model, source, bptt) == pytest.approx(expected, rel=1e-12)
