"""Each figure of the diagnosis of a search matches brute force, and measuring does not change the search."""

import math
from functools import partial

import oracle
import pytest
import tiny
import torch
from helpers import read_records, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

import train_search
from experiment import checkpoint
from architect import Architect, WeightUpdate
from engine.dropout import DropoutRates
from engine.reference import NORMS
from genotypes import Genotype, random_genotype
from model_search import derive
from training.diagnostics import (
    MAX_BATCH_SIZE,
    SEGMENTS,
    Diagnosis,
    Signal,
    cosine,
    dominant_eigenvalue,
    one_hot_alphas,
    sensitivity,
)
from training.losses import MicroBatches

CELL = Genotype((("relu", 0), ("tanh", 1), ("identity", 0)), (1, 2, 3))


def diagnosis(hessian="finite", rates=tiny.RATES, text=None, seed=0, norm="batch"):
    model = tiny.search_model(rates, norm=norm)

    def architect_of(model, micro_batch_size, hessian):
        loss = partial(MicroBatches, model, micro_batch_size=micro_batch_size)
        return Architect(
            model.weights(), model.alphas, loss, loss, update=WeightUpdate(0.25, weight_decay=1e-3), hessian=hessian
        )

    if text is None:
        text = torch.randint(tiny.V, (80, tiny.B), generator=torch.Generator().manual_seed(seed))
    return Diagnosis(model, architect_of, hessian, (text, text.flip(0), text), tiny.B, tiny.T, 3, lambda seed: None)


def test_dominant_eigenvalue_matches_finite_difference_hessian():
    """The expected Hessian is computed by central differences of the gradient, in float64."""
    diagnostics = diagnosis()
    alphas, rng = diagnostics.model.alphas, torch.Generator()
    state = rng.get_state()
    product = diagnostics.hessian_product(rng)
    rng.set_state(state)
    masks = diagnostics.model.sample_masks(tiny.B)._replace(word=None, embedding=None, x=None, hidden=None, output=None)
    batch = diagnostics.batch(diagnostics.alphas_text, rng, diagnostics.batch_size)._replace(masks=masks)

    def gradient(delta):
        with torch.no_grad():
            alphas.add_(delta)
        [loss] = MicroBatches(diagnostics.model, batch, tiny.B)
        actual = torch.autograd.grad(loss.total, alphas)[0]
        with torch.no_grad():
            alphas.sub_(delta)
        return actual.flatten()

    columns = []
    for k in range(alphas.numel()):
        delta = torch.zeros_like(alphas)
        delta.view(-1)[k] = 1e-5
        columns.append((gradient(delta) - gradient(-delta)) / 2e-5)
    hessian = torch.stack(columns)
    for column in (0, 7, 29):
        unit = torch.zeros_like(alphas)
        unit.view(-1)[column] = 1
        torch.testing.assert_close(product(unit).flatten(), hessian[column], atol=1e-6, rtol=1e-4)
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    expected = values[values.abs().argmax()].item()
    torch.manual_seed(1)
    assert dominant_eigenvalue(product, alphas.detach()) == pytest.approx(expected, rel=1e-3)


@settings(max_examples=50)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_dominant_eigenvalue_of_symmetric_matrices(values, seed):
    torch.manual_seed(seed)
    n = len(values)
    vectors, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    matrix = vectors @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ vectors.T
    actual = dominant_eigenvalue(lambda v: matrix @ v, torch.zeros(n, dtype=torch.float64))
    # If two eigenvalues have nearly the same magnitude, such as +1 and -1, rounding decides which one is returned.
    assert abs(actual) == pytest.approx(max(map(abs, values)), rel=1e-6, abs=1e-6)
    assert min(abs(actual - value) for value in values) < 1e-6


def test_dominant_eigenvalue_of_nan_hessian_is_nan():
    assert math.isnan(dominant_eigenvalue(lambda v: v * math.nan, torch.zeros(5)))


@pytest.mark.parametrize("seed", range(5))
def test_one_hot_alphas_derive_the_same_genotype(seed):
    cell = random_genotype(seed)
    p = one_hot_alphas(cell).softmax(-1)
    assert derive(p) == cell
    edge = 0
    for i, (op, predecessor) in enumerate(cell.recurrent, start=1):
        for j in range(i):
            assert p[edge].max() == 1 and p[edge].sort().values[-2] < 1e-20
            assert oracle.PRIMITIVES[int(p[edge].argmax())] == (op if j == predecessor else "none")
            edge += 1


def oracle_discrete_loss(model, genotype, text):
    """Returns nats per word of the discrete cell, normalised like the relaxed one and without dropout, by loops."""
    W0, Ws = model.cell.W0.detach().numpy(), [W.detach().numpy() for W in model.cell.Ws]
    table, bias = model.embedding.detach(), model.bias.detach()
    ones, state = 1.0, torch.zeros(text.size(1), tiny.H, dtype=torch.float64).numpy()
    losses = []
    for t in range(len(text) - 1):
        s = [oracle.batch_norm(oracle.cell_input(table[text[t]].numpy(), state, W0, ones, ones))]
        for i, (op, j) in enumerate(genotype.recurrent, start=1):
            c, h = oracle.split(s[j] @ Ws[i - 1])
            s.append(oracle.batch_norm(s[j] + oracle.sigmoid(c) * (oracle.ACTIVATION[op](h) - s[j])))
        state = sum(s[1:]) / len(genotype.recurrent)
        scores = torch.log_softmax(torch.from_numpy(state) @ table.T + bias, -1)
        losses += [-scores[b, text[t + 1, b]].item() for b in range(text.size(1))]
    return sum(losses) / len(losses)


def derived(model):
    return derive(model.alphas.detach().softmax(-1))


def test_relaxed_and_discrete_loss_match_the_oracle():
    diagnostics = diagnosis()
    before = diagnostics.model.alphas.detach().clone()
    relaxed, discrete = diagnostics.relaxed_and_discrete_loss(derived(diagnostics.model))
    assert torch.equal(diagnostics.model.alphas, before)
    text = diagnostics.valid[: SEGMENTS * tiny.T + 1]
    assert discrete == pytest.approx(
        oracle_discrete_loss(diagnostics.model, derived(diagnostics.model), text), rel=1e-9
    )
    with torch.no_grad():  # the mixture now equals its genotype
        diagnostics.model.alphas.copy_(one_hot_alphas(CELL))
    one, other = diagnostics.relaxed_and_discrete_loss(derived(diagnostics.model))
    assert one == other != relaxed


@pytest.mark.parametrize("norm", NORMS)
def test_sensitivity_matches_finite_difference_jacobian_norm(norm):
    """The Jacobian of the last state (BH,) in the initial one is computed by differences; its norm is over sqrt(BH)."""
    model = tiny.search_model(DropoutRates(), norm=norm)
    batch = tiny.batch(model, 3)
    columns = []
    with torch.no_grad():
        for place in range(batch.hidden.numel()):
            ends = []
            for sign in (1, -1):
                delta = batch.hidden.clone()
                delta.view(-1)[place] += sign * 1e-6
                ends.append(model(batch.x, delta)[1])
            columns.append((ends[0] - ends[1]).flatten() / 2e-6)
    size = batch.hidden.numel()
    expected = torch.stack(columns).square().sum().div(size).sqrt().item()
    torch.manual_seed(2)
    assert sensitivity(model, batch, probes=1000) == pytest.approx(expected, rel=0.1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_identity_recurrence_has_sensitivity_one():
    model = tiny.search_model(DropoutRates(), norm="none")
    batch = tiny.batch(model, 3)
    model.forward = lambda x, hidden: (hidden[None].expand(len(x), -1, -1), hidden)
    torch.manual_seed(1)
    assert sensitivity(model, batch, probes=500) == pytest.approx(1, abs=0.05)


def test_agreement_is_one_for_identical_batches_only():
    repeated = torch.arange(tiny.B).expand(80, tiny.B)  # each batch element repeats one word
    alike, other = diagnosis(rates=DropoutRates(), text=repeated), diagnosis(rates=DropoutRates())
    # The state soon stops changing, and then all segments are identical.
    alike.train = alike.alphas_text = repeated
    actual = [measured.agreement(torch.Generator().manual_seed(4), 0.1, None) for measured in (alike, other)]
    assert actual[0][:3] == pytest.approx([1, 1, 1], abs=1e-2)
    assert all(cosine < 0.99 for cosine in actual[1][:3])


def test_agreement_is_computed_from_architect_gradients():
    diagnostics = diagnosis()
    given = [(torch.tensor([1.0, 0]), torch.tensor([0.0, 2])), (torch.tensor([0.0, 1]), torch.tensor([0.0, 1])),
             (torch.tensor([1.0, 1]), torch.tensor([3.0, 0]))]  # fmt: skip
    queue = iter(given)
    diagnostics.architect.gradient = lambda *_: (*next(queue), None)
    half = math.sqrt(0.5)
    direct, implicit, whole, ratio = diagnostics.agreement(torch.Generator(), 0.1, None)
    assert direct == pytest.approx((0 + half + half) / 3)
    assert implicit == pytest.approx((1 + 0 + 0) / 3)
    # The whole gradients are (1, -2), (0, 0) and (-2, 1).
    assert whole == pytest.approx((0 + -4 / 5 + 0) / 3)
    assert ratio == pytest.approx((2 + 1 + 3 / math.sqrt(2)) / 3)
    assert cosine([torch.eye(2), torch.eye(2)]) == pytest.approx(1)


def test_product_cosine_compares_finite_with_exact():
    diagnostics = diagnosis()
    assert diagnostics.product_cosine(torch.Generator().manual_seed(1), 0.1, None) == pytest.approx(1, abs=1e-6)
    diagnostics.architect_by_hvp["finite"].radius = 10.0  # far outside the region where the loss is nearly linear
    assert diagnostics.product_cosine(torch.Generator().manual_seed(1), 0.1, None) < 0.99


def test_first_order_signal_has_no_implicit_part():
    signal = diagnosis(hessian=None).measure(4, CELL, 0.1)
    assert signal.cosine_implicit is signal.norm_ratio is signal.product_cosine is None
    assert signal.cosine_direct == signal.cosine_whole is not None
    assert "implicit" not in str(signal) and "cosine direct" in str(signal)


def test_measurement_is_reproducible_and_nan_becomes_none():
    diagnostics = diagnosis()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    first = diagnostics.measure(4, CELL, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert diagnostics.measure(4, CELL, 0.1) == first != diagnostics.measure(5, CELL, 0.1)
    with torch.no_grad():
        diagnostics.model.alphas.fill_(math.nan)
    assert diagnostics.measure(4, CELL, 0.1) == Signal(*[None] * 9)


@pytest.mark.parametrize("length", [2, 3, 5, 9, 12])
def test_batches_from_texts_of_any_length(length):
    diagnostics = diagnosis()
    for seed in range(5):
        batch = diagnostics.batch(diagnostics.train[:length], torch.Generator().manual_seed(seed), 3)
        assert 1 <= len(batch.x) <= tiny.T and batch.x.size(1) == len(batch.hidden) == 3
        assert torch.equal(batch.x[1:], batch.y[:-1])


WIDE = (
    f"--batch_size {MAX_BATCH_SIZE + 8} --small_batch_size {MAX_BATCH_SIZE // 2 + 4} --bptt_std 2 --limit_tokens 1000"
)


@pytest.mark.parametrize("flags", ["", "--unrolled --optimizer momentum --engine eager", f"--unrolled {WIDE}"])
def test_diagnosis_leaves_search_steps_bit_identical(flags, tmp_path):
    corpus = write_corpus(tmp_path, train=120 if WIDE in flags else 30, valid=120 if WIDE in flags else 16, test=16)
    common = f"--data {corpus} --emsize 8 --batch_size 4 --bptt 6 --lr 1 --epochs 1 --log_interval 3 {flags}".split()
    for name, more in (("plain", []), ("measured", ["--diagnose_every", "4"])):
        assert train_search.main([*common, "--save", str(tmp_path / name), *more]) == 0
    plain, measured = (tmp_path / name for name in ("plain", "measured"))
    assert (plain / "genotype.json").read_bytes() == (measured / "genotype.json").read_bytes()
    timed = {"seconds", "tokens_per_s"}
    steps, also = (
        [{k: v for k, v in record.items() if k not in timed} for record in read_records(f)] for f in (plain, measured)
    )
    assert [record for record in also if record["kind"] != "diagnosis"] == steps
    weights, others = (checkpoint.load(folder / "last.pt")["model"] for folder in (plain, measured))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    actual = [record for record in also if record["kind"] == "diagnosis"]
    assert actual
    assert [record["step"] for record in actual] == list(range(4, steps[-1]["step"] + 1, 4))
    assert actual[0].keys() == {"kind", "epoch", "step", *Signal._fields}
