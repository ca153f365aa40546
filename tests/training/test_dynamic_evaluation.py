"""Dynamic evaluation matches its equations as a plain loop, learns from no word before it has predicted it, and leaves
the model as it was."""

import pytest
import tiny
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from genotypes import DARTS
from training.dynamic_evaluation import DynamicEvaluation, gradient_rms
from training.evaluation import score
from training.neural_cache import Mix, NeuralCache
from training.token_losses import token_losses, total_score

CELLS = [(DARTS, 1), (DARTS, 3), ("LSTM", 1), ("GRU", 2)]
CELL_IDS = ["DARTS", "DARTS, 3 softmaxes", "LSTM", "GRU, 2 softmaxes"]


def random_text(seed, length=23, batch_size=1):
    return torch.randint(tiny.V, (length, batch_size), generator=torch.Generator().manual_seed(seed))


def losses_and_gradient(model, x, y, state):
    """Returns the losses (T, B) of a segment, the gradient of their mean, and the last state."""
    hiddens, state = model(x, state)
    losses = -model.log_probs(hiddens).gather(-1, y[..., None])[..., 0]
    gradient = torch.autograd.grad(losses.mean(), model.weights())
    return losses.detach(), gradient, state.detach()


def expected_losses(model, text, bptt, lr, decay, rms=None):
    """Returns the losses (n - 1, B) of dynamic evaluation, each weight moved by itself, one number at a time."""
    trained, all_losses = [w.detach().clone() for w in model.weights()], []
    state = model.initial_hidden(text.size(1))
    mean = rms and sum(r.sum() for r in rms).item() / sum(r.numel() for r in rms)
    for start in range(0, len(text) - 1, bptt):
        stop = min(start + bptt, len(text) - 1)
        losses, gradient, state = losses_and_gradient(model, text[start:stop], text[start + 1 : stop + 1], state)
        all_losses.append(losses)
        for i, (w, g, w0) in enumerate(zip(model.weights(), gradient, trained, strict=True)):
            w, g, w0 = w.data.view(-1), g.reshape(-1), w0.view(-1)
            for j in range(len(w)):
                if rms is None:
                    w[j] += -lr * g[j] + decay * (w0[j] - w[j])
                else:
                    r = rms[i].view(-1)[j]
                    w[j] += -lr * g[j] / (r + 0.1 * mean) + min(1.0, decay * r / mean) * (w0[j] - w[j])
    return torch.cat(all_losses)


@pytest.mark.parametrize(("cell", "n_experts"), CELLS, ids=CELL_IDS)
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_losses_match_a_plain_loop(cell, n_experts, rule):
    model, text = tiny.model_without_dropout(cell, n_experts), random_text(1, batch_size=2)
    rms = gradient_rms(model, random_text(2, 17, 3), 5) if rule == "rms" else None
    lr, decay = (0.3, 0.2) if rule == "sgd" else (0.05, 0.9)
    dynamic = DynamicEvaluation(model.weights(), lr, decay, rms)
    actual = token_losses(model, text, 4, dynamic=dynamic)
    expected = expected_losses(tiny.model_without_dropout(cell, n_experts), text, 4, lr, decay, rms)
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-12)


def test_gradient_rms_matches_a_plain_loop():
    model, text = tiny.model_without_dropout(), random_text(3, 18, 4)
    actual = gradient_rms(model, text, 5)
    squares, state = [torch.zeros_like(w) for w in model.weights()], model.initial_hidden(4)
    starts = (0, 5, 10, 15)
    for start in starts:
        x = text[start : min(start + 5, 17)]
        _, gradient, state = losses_and_gradient(model, x, text[start + 1 : start + 1 + len(x)], state)
        for square, g in zip(squares, gradient, strict=True):
            square += g**2
    for r, square in zip(actual, squares, strict=True):
        torch.testing.assert_close(r, (square / len(starts)).sqrt())


@settings(max_examples=examples(30))
@given(
    seed=st.integers(0, 999), bptt=st.integers(1, 7), cut=st.integers(1, 21), size=st.integers(0, 8),
    rule=st.sampled_from([None, "sgd", "rms"]),
)  # fmt: skip
def test_a_loss_depends_on_no_later_word(seed, bptt, cut, rule, size):
    """The words after `cut` are replaced, and no loss up to there changes; nor do the weights in the end."""
    model = tiny.model_without_dropout()
    before = [w.detach().clone() for w in model.weights()]
    text, other = random_text(seed), random_text(seed)
    other[cut + 1 :] = random_text(seed + 1000)[cut + 1 :]
    rms = [torch.full_like(w, 0.5) for w in before] if rule == "rms" else None

    def losses(source):
        dynamic = DynamicEvaluation(model.weights(), 0.3, 0.1, rms) if rule else None
        cache = NeuralCache(size, [Mix(0.5, 0.2)]) if size else None
        return token_losses(model, source, bptt, dynamic=dynamic, cache=cache)

    assert torch.equal(losses(text)[:, :cut], losses(other)[:, :cut])
    assert all(torch.equal(*pair) for pair in zip(before, model.weights(), strict=True))


def test_weights_are_restored_after_an_error():
    model = tiny.model_without_dropout()
    before = [w.detach().clone() for w in model.weights()]
    text = random_text(1)
    text[20] = tiny.V  # no word has this id
    with pytest.raises((IndexError, RuntimeError)):
        token_losses(model, text, 4, dynamic=DynamicEvaluation(model.weights(), 0.3, 0.1))
    assert all(torch.equal(*pair) for pair in zip(before, model.weights(), strict=True))


def test_a_repeated_text_becomes_likelier():
    """A period of five words is repeated, of which the trained model knows nothing."""
    model, text = tiny.model_without_dropout(), random_text(4, 5).repeat(40, 1)
    plain = token_losses(model, text, 5)[0]
    dynamic = token_losses(model, text, 5, dynamic=DynamicEvaluation(model.weights(), 0.5, 0.0))[0]
    assert dynamic[-5:].mean() < plain[-5:].mean() - 0.5


@pytest.mark.parametrize(("cell", "n_experts"), CELLS, ids=CELL_IDS)
def test_plain_losses_are_those_of_the_evaluation(cell, n_experts):
    model, text = tiny.model_without_dropout(cell, n_experts), random_text(6, 40, 3)
    marks = torch.rand(text.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    losses = token_losses(model, text, 7)
    expected = score(model, text, 7, unknown=marks)
    assert total_score(losses[0], marks) == pytest.approx(expected, rel=1e-12)
    x, y = text[:-1], text[1:]
    with torch.no_grad():
        all_at_once = model.log_probs(model(x, model.initial_hidden(3))[0])
    torch.testing.assert_close(losses[0].mean(), F.nll_loss(all_at_once.flatten(0, 1), y.flatten()))
