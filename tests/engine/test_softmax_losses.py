"""R-Drop, fraternal dropout and the mixture of softmaxes match loops and direct formulas in float64."""

import math
from functools import partial

import pytest
import tiny
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from architect import WeightUpdate
from engine import Engine, softmax_losses
from engine.dropout import DropoutRates
from genotypes import DARTS_V1
from model import retrain_model
from training.losses import Batch, MicroBatches, clipped_gradient, losses


def softmax(scores):
    top = max(scores)
    e = [math.exp(s - top) for s in scores]
    return [part / sum(e) for part in e]


def mixture_probabilities(model, output):
    """Returns the word probabilities for one output (H,), computed from the equation with scalars."""
    o, head = output.tolist(), model.mixture
    H, K = head.prior.shape
    prior, latent, bias = head.prior.tolist(), head.latent.tolist(), head.latent_bias.tolist()
    words, b = model.embedding.tolist(), model.bias.tolist()
    pi = softmax([sum(o[h] * prior[h][k] for h in range(H)) for k in range(K)])
    p = [0.0] * len(words)
    for k in range(K):
        context = [math.tanh(sum(o[h] * latent[h][k * H + i] for h in range(H)) + bias[k * H + i]) for i in range(H)]
        scores = [sum(c * w for c, w in zip(context, word, strict=True)) for word in words]
        expert = softmax([score + bias for score, bias in zip(scores, b, strict=True)])
        p = [a + pi[k] * q for a, q in zip(p, expert, strict=True)]
    return p


def mixture_model(experts=3, rates=tiny.RATES):
    torch.manual_seed(0)
    return tiny.randomize(retrain_model(tiny.V, tiny.H, rates, DARTS_V1, experts))


def two_pass_batch(model, seed=3):
    return tiny.batch(model, seed)._replace(second_masks=model.sample_masks(tiny.B))


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_mixture_matches_scalar_equation(experts):
    model = mixture_model(experts)
    batch = tiny.batch(model, 1)
    hiddens, _ = model(batch.x, batch.hidden, batch.masks)
    outputs = (hiddens * batch.masks.output).detach().flatten(0, 1)  # (TB, H)
    actual = softmax_losses.mixed(outputs, model.embedding, model.bias, *model.mixture.parameters())
    expected = [mixture_probabilities(model, output) for output in outputs]
    torch.testing.assert_close(actual.exp(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    nll = -sum(math.log(p[y]) for p, y in zip(expected, batch.y.flatten().tolist(), strict=True)) / len(expected)
    assert model.nll(hiddens, batch.y, batch.masks).item() == pytest.approx(nll, rel=1e-12)


@settings(max_examples=examples(40))
@given(
    seed=st.integers(0, 10**6), experts=st.integers(1, 6), hidden=st.integers(1, 6), words=st.integers(1, 30),
    scale=st.floats(0.01, 50),
)  # fmt: skip
def test_mixture_probabilities_sum_to_one(seed, experts, hidden, words, scale):
    torch.manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, dtype=torch.float64)

    log_probs = softmax_losses.mixed(
        normal(7, hidden), normal(words, hidden), normal(words), normal(hidden, experts),
        normal(hidden, experts * hidden), normal(experts * hidden),
    )  # fmt: skip
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-10)


def test_mixture_parameter_count():
    def count(experts):
        return sum(w.numel() for w in retrain_model(50, 8, DropoutRates(), DARTS_V1, experts).weights())

    assert retrain_model(50, 8, DropoutRates(), DARTS_V1, 1).mixture is None
    assert count(4) - count(1) == 8 * 4 + 8 * 32 + 32


def plain_kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("build", [partial(tiny.discrete_model, DARTS_V1), mixture_model])
def test_two_pass_loss_matches_equations(build):
    model = build()
    batch = two_pass_batch(model)
    passes, hiddens = [], []
    for masks in (batch.masks, batch.second_masks):
        hiddens.append(model(batch.x, batch.hidden, masks)[0].detach())
        passes.append(hiddens[-1] * masks.output)

    def word_probabilities(output):
        if model.mixture is not None:
            return mixture_probabilities(model, output)
        return softmax((model.embedding @ output + model.bias).tolist())

    P, Q = ([word_probabilities(output) for output in outputs.flatten(0, 1)] for outputs in passes)
    y, n = batch.y.flatten().tolist(), batch.y.numel()
    nll = sum(-math.log(p[v]) - math.log(q[v]) for p, q, v in zip(P, Q, y, strict=True)) / (2 * n)
    kl = sum((plain_kl(p, q) + plain_kl(q, p)) / 2 for p, q in zip(P, Q, strict=True)) / n
    apart = sum((a - b) ** 2 for a, b in zip(*(o.flatten().tolist() for o in passes), strict=True)) / passes[0].numel()
    ar = sum((o**2).mean().item() for o in passes) / 2
    tar = sum(((h[1:] - h[:-1]) ** 2).mean().item() for h in hiddens) / 2
    actual = losses(model, batch, alpha=0.3, beta=0.7, rdrop=0.9, fraternal=1.7)
    assert actual.nll.item() == pytest.approx(nll, rel=1e-12)
    assert actual.total.item() == pytest.approx(nll + 0.3 * ar + 0.7 * tar + 0.9 * kl + 1.7 * apart, rel=1e-12)
    assert kl > 1e-3
    assert apart > 1e-3
    assert torch.equal(actual.hidden, hiddens[0][-1])  # the state of the first pass


@pytest.mark.parametrize("build", [partial(tiny.discrete_model, DARTS_V1), mixture_model])
def test_chunked_two_pass_gradient_matches_autograd(build):
    """The expected gradient is autograd's, through all log-probabilities at once."""
    model = build()
    batch = two_pass_batch(model)
    weights = model.weights()
    actual = torch.autograd.grad(losses(model, batch, 0.3, 0.7, 0.9, 1.7).total, weights)

    head = [] if model.mixture is None else list(model.mixture.parameters())
    log_probs = softmax_losses.mixed if head else softmax_losses.tied
    hiddens = [model(batch.x, batch.hidden, masks)[0] for masks in (batch.masks, batch.second_masks)]
    outputs = [h * masks.output for h, masks in zip(hiddens, (batch.masks, batch.second_masks), strict=True)]
    p, q = (log_probs(o.flatten(0, 1), model.embedding, model.bias, *head) for o in outputs)
    nll = sum(torch.nn.functional.nll_loss(part, batch.y.flatten()) for part in (p, q)) / 2
    kl = torch.nn.functional.kl_div
    both = (kl(p, q, log_target=True, reduction="batchmean") + kl(q, p, log_target=True, reduction="batchmean")) / 2
    total = nll + 0.9 * both + 1.7 * (outputs[0] - outputs[1]).square().mean()
    for o, h in zip(outputs, hiddens, strict=True):
        total = total + 0.15 * o.square().mean() + 0.35 * (h[1:] - h[:-1]).square().mean()
    torch.testing.assert_close(list(actual), list(torch.autograd.grad(total, weights)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("small", [1, 2, 3, 4])
@pytest.mark.parametrize("build", [partial(tiny.discrete_model, DARTS_V1), mixture_model])
def test_micro_batches_match_whole_batch_with_two_passes(build, small):
    model = build()
    batch, results = two_pass_batch(model), []
    for size in (tiny.B, small):
        model.zero_grad()
        parts = MicroBatches(model, batch, size, alpha=0.3, beta=0.7, rdrop=0.9, fraternal=1.7)
        nll, hidden, _ = clipped_gradient(parts, model.weights(), WeightUpdate())
        results.append([nll, hidden, *(w.grad for w in model.weights())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_second_derivative_of_a_mixture_raises():
    model = mixture_model()
    weights = model.weights()
    total = losses(model, two_pass_batch(model)).total
    with pytest.raises(RuntimeError, match="mixtures of softmaxes and R-Drop have no second derivative"):
        torch.autograd.grad(total, weights, create_graph=True)


def test_two_pass_penalties_vanish_for_equal_masks():
    model = tiny.discrete_model(DARTS_V1)
    batch = tiny.batch(model, 3)
    one, two = (
        losses(model, batch, 0.3, 0.7),
        losses(model, batch._replace(second_masks=batch.masks), 0.3, 0.7, 5.0, 5.0),
    )
    assert two.total.item() == pytest.approx(one.total.item(), rel=1e-12)


def peak(compute):
    """Returns the peak memory of the tensors that a call allocates, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    current = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return most


@pytest.mark.parametrize("engine", ["eager", "fused"])
@pytest.mark.parametrize("small", [8, 2])
def test_two_passes_peak_memory_is_within_two_logit_tensors_of_one(engine, small):
    V, H, T, B = 2000, 8, 20, 8
    torch.manual_seed(0)
    model = retrain_model(V, H, tiny.RATES, DARTS_V1).with_engine(Engine(engine))
    text = torch.randint(V, (T + 1, B))
    batch = Batch(text[:-1], text[1:], model.initial_hidden(B), model.sample_masks(B))
    second_masks = batch._replace(second_masks=model.sample_masks(B))

    def step(batch, **more):
        parts = MicroBatches(model, batch, small, beta=1e-3, **more)
        clipped_gradient(parts, model.weights(), WeightUpdate())

    eager = retrain_model(V, H, tiny.RATES, DARTS_V1)

    def plain():
        clipped_gradient(MicroBatches(eager, batch, small, beta=1e-3), eager.weights(), WeightUpdate())

    for warm in (plain, lambda: step(batch), lambda: step(second_masks, rdrop=1.0, fraternal=1.0)):
        warm()
    assert peak(lambda: step(second_masks, rdrop=1.0, fraternal=1.0)) < peak(plain) + 2 * 4 * T * small * V
