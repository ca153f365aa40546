"""The fused engine computes the right mixed second derivative of a loss in the weights and the alphas."""

from functools import partial

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fused import (
    aligned_to,
    alignments,
    assert_equal,
    chunked_by,
    chunks,
    decoder_problem,
    decoder_sizes,
    norms,
    padded,
    paddings,
    problem,
    relative_errors,
    run,
    sizes,
)
from test_reference import oracle_masks

from architect import Architect, WeightUpdate
from engine import Engine, fused, linear_cross_entropy, reference
from engine.dropout import FrozenReLU
from training.losses import MicroBatches, losses

NAMES = ("x", "h0", "W0", "Ws")


def directions(leaves, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(leaves[name].shape, generator=generator, dtype=torch.float64) for name in NAMES]


def mixed_derivative(module, leaves, masks, R, direction, frozen=None, wrt=("alpha", "x", "h0"), norm="batch"):
    """Returns the gradients g of L in x, h0 and the weights, and the gradients of (g . direction) in `wrt`.

    L is not linear in the hidden states.
    """
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    hiddens = run(module, "relaxed", leaves, masks, frozen=frozen, norm=norm)
    total = (R * (hiddens + hiddens.square())).sum()
    first = torch.autograd.grad(total, [leaves[name] for name in NAMES], create_graph=True)
    dot = sum((g * v.to(g)).sum() for g, v in zip(first, direction, strict=True))
    second = torch.autograd.grad(dot, [leaves[name] for name in wrt])
    return [*(g.detach() for g in first), *second]


def by_index(actual, expected):
    return dict(enumerate(actual)), dict(enumerate(expected))


@settings(max_examples=examples(180))
@given(size=sizes, alignment=alignments, norm=norms)
def test_fused_second_derivative_matches_eager_in_float64(size, alignment, norm):
    leaves, masks, R = problem(**size)
    direction = directions(leaves, size["seed"])
    with aligned_to(alignment):
        actual = mixed_derivative(fused, leaves, masks, R, direction, norm=norm)
    assert_equal(*by_index(actual, mixed_derivative(reference, leaves, masks, R, direction, norm=norm)), 1e-9)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(3, 3, 2, 3, 3), (1, 2, 2, 2, 2), (2, 1, 2, 2, 2)])
def test_second_derivative_matches_oracle(size, masked, norm):
    """The expected value is a complex step of the oracle along the direction, differenced centrally in each alpha."""
    leaves, masks, R = problem(*size, seed=3, masked=masked)
    direction = directions(leaves, 3)
    *_, actual = mixed_derivative(fused, leaves, masks, R, direction, wrt=("alpha",), norm=norm)
    arrays = {name: leaf.numpy() for name, leaf in leaves.items()}
    given_masks = oracle_masks(arrays, [None if mask is None else mask.numpy() for mask in masks])
    step = 1e-30
    moved = {name: arrays[name] + 1j * step * v.numpy() for name, v in zip(NAMES, direction, strict=True)}

    def slope(alpha):
        h = oracle.relaxed_sequence(**moved, alpha=alpha, x_mask=given_masks[0], h_mask=given_masks[1], norm=norm)
        return oracle.scalar(h + h * h, R.numpy()).imag / step

    radius, expected = 1e-5, np.zeros_like(arrays["alpha"])
    for place in np.ndindex(expected.shape):
        unit = np.zeros_like(expected)
        unit[place] = radius
        expected[place] = (slope(arrays["alpha"] + unit) - slope(arrays["alpha"] - unit)) / (2 * radius)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-7 * (1 + np.abs(expected).max()))


@settings(max_examples=examples(45))
@given(T=st.integers(1, 6), B=st.integers(8, 20), H=st.integers(4, 24), seed=st.integers(0, 10**6), norm=norms)
@example(T=6, B=10, H=11, seed=621070, norm="batch")  # eager is 3 to 19 times nearer here than at the other offsets
def test_fused_fp32_second_derivative_error_is_comparable_to_eager(T, B, H, seed, norm):
    """The bound is 2e-5 or, where a random cell is too steep for fp32 to reach that, 5 times the error of eager.

    The test compares the largest errors over four offsets, since at a single one either engine may be lucky.
    """
    leaves, masks, R = problem(T, B, H, H, 8, seed, masked=True, scale=0.2)
    direction = directions(leaves, seed)
    errors = {reference: [], fused: []}
    for offset in (0, 0.001, 0.002, 0.003):
        shifted = {name: (1 + offset) * leaf for name, leaf in leaves.items()}
        frozen = FrozenReLU()  # takes the active set of float64, since rounding decides near a kink
        exact = mixed_derivative(reference, shifted, masks, R, direction, frozen, norm=norm)
        short = {name: leaf.float() for name, leaf in shifted.items()}, [mask.float() for mask in masks], R.float()
        for module, relu in ((reference, frozen), (fused, padded(frozen))):
            errors[module].append(
                relative_errors(*by_index(mixed_derivative(module, *short, direction, relu, norm=norm), exact))
            )
    eager, actual = ({i: max(e[i] for e in places) for i in places[0]} for places in errors.values())
    assert all(actual[i] <= max(2e-5, 5 * eager[i]) for i in actual), (actual, eager)


def test_second_derivative_with_frozen_relu_matches_eager():
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=2, masked=True)
    direction = directions(leaves, 2)
    elsewhere = {name: leaf + 0.3 for name, leaf in leaves.items()}
    actual = []
    for module in (fused, reference):
        frozen = FrozenReLU()
        run(module, "relaxed", leaves, masks, frozen=frozen)
        actual.append(mixed_derivative(module, elsewhere, masks, R, direction, frozen))
    assert_equal(*by_index(*actual), 1e-9)
    assert not torch.allclose(actual[0][-1], mixed_derivative(fused, elsewhere, masks, R, direction)[-1])


def test_one_graph_can_be_differentiated_along_several_directions():
    """A second graph of the same sizes, alive at the same time, does not change the results."""
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=5, masked=True)
    beside, *rest = problem(3, 4, 3, 4, 4, seed=6, masked=True)
    two_directions = [directions(leaves, seed) for seed in (1, 2)]
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    hiddens = run(fused, "relaxed", leaves, masks)
    first = torch.autograd.grad(
        (R * (hiddens + hiddens.square())).sum(), [leaves[name] for name in NAMES], create_graph=True
    )
    mixed_derivative(fused, beside, *rest, two_directions[0])
    for direction in two_directions:
        [actual] = torch.autograd.grad(first, leaves["alpha"], direction, retain_graph=True)
        assert torch.equal(actual, mixed_derivative(fused, leaves, masks, R, direction)[-3])


def test_unsupported_second_derivatives_are_nan_or_raise():
    leaves, masks, R = problem(2, 3, 3, 4, 3, seed=1, masked=False)
    *_, dW0 = mixed_derivative(fused, leaves, masks, R, directions(leaves, 1), wrt=("W0",))
    assert dW0[3:].isnan().all()
    *_, dWs = mixed_derivative(fused, leaves, masks, R, directions(leaves, 1), wrt=("Ws",))
    assert dWs.isnan().all()
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    total = run(fused, "relaxed", leaves, masks).sum()
    [g] = torch.autograd.grad(total, leaves["alpha"], create_graph=True)
    with pytest.raises(RuntimeError, match="along the alphas; use the eager engine"):
        torch.autograd.grad(g.square().sum(), leaves["alpha"])
    gs = [torch.autograd.grad(total, leaves["Ws"], create_graph=True)[0].sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="one gradient of a pass at a time"):
        torch.autograd.grad(sum(gs), leaves["alpha"], retain_graph=True)
    [g] = torch.autograd.grad(total, leaves["W0"], create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative here; use the eager engine"):
        torch.autograd.grad(g.square().sum(), leaves["alpha"], create_graph=True)


@pytest.mark.parametrize("wanted", NAMES)
def test_linear_loss_along_a_single_weight_matches_eager(wanted):
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=7, masked=True)
    actual = []
    for module in (fused, reference):
        required = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        [first] = torch.autograd.grad(
            (R * run(module, "relaxed", required, masks)).sum(), required[wanted], create_graph=True
        )
        actual.append(torch.autograd.grad(first.sin().sum(), required["alpha"]))
    assert_equal(*by_index(*actual), 1e-9)


# The loss.


def loss_derivatives(engine, hiddens, mask, embedding, bias, y, seed):
    """Returns the gradients g of a nonlinear function of the loss, and the gradient of (g . direction) in the hidden
    states, for a random direction."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [leaf.clone().requires_grad_() for leaf in (hiddens, embedding, bias)]
    direction = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
    loss = engine.nll(leaves[0], mask, *leaves[1:], y)
    first = torch.autograd.grad(3 * loss + loss.square(), leaves, create_graph=True)
    return [*(g.detach() for g in first), *torch.autograd.grad(first, leaves[0], direction)]


@settings(max_examples=examples(60))
@given(size=decoder_sizes, chunk=chunks, more=paddings)
def test_fused_loss_second_derivative_matches_eager(size, chunk, more):
    """The cases cover skipped columns (where much is dropped), one and several chunks, and padded outputs."""
    arguments = *decoder_problem(**size), size["seed"]
    with chunked_by(chunk, more):
        actual = loss_derivatives(Engine("fused"), *arguments)
    for one, other in zip(actual, loss_derivatives(Engine(), *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_unsupported_second_derivatives_of_the_loss_are_nan():
    """A penalty contains the weights too: its term alone must not pass for the whole derivative."""
    *leaves, y = decoder_problem(2, 3, 4, 5, 0, 0.5)
    hiddens, mask, embedding, bias = leaves
    inputs = [leaf.clone().requires_grad_() for leaf in (hiddens, embedding, bias)]
    loss = Engine("fused").nll(inputs[0], mask, *inputs[1:], y) + sum(leaf.square().sum() for leaf in inputs)
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    along_hiddens, *others = torch.autograd.grad(gradients, inputs, [torch.ones_like(g) for g in gradients])
    assert along_hiddens.isfinite().all()
    assert all(derivative.isnan().all() for derivative in others)


# The model.


def hvp(model, batch, direction, **options):
    part = losses(model, batch, 0.3, 0.7, **options)
    first = torch.autograd.grad(part.total, model.weights(), create_graph=True)
    return torch.autograd.grad(first, model.alphas, direction)[0]


@pytest.mark.parametrize("fraternal", [0.0, 0.4])
def test_model_hessian_product_matches_between_engines(fraternal):
    """The loss includes AR, TAR, every kind of dropout, repeated words and, with `fraternal`, two passes."""
    model = tiny.search_model()
    batch = tiny.batch(model, 1)
    if fraternal:
        batch = batch._replace(second_masks=model.sample_masks(tiny.B))
    direction = [torch.randn_like(w) for w in model.weights()]
    actual, expected = (
        hvp(model.with_engine(Engine(name)), batch, direction, fraternal=fraternal) for name in ("fused", "eager")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("copied", [True, False])
def test_bf16_hessian_product_is_within_rounding_error_of_fp32(monkeypatch, copied, norm):
    """The error is above zero, with the decoder copied or strided. The weights of seed 7 are steep under no norm."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: copied)
    monkeypatch.setattr(linear_cross_entropy, "COPY_FROM", 1)
    model = tiny.search_model(seed=7, norm=norm).float()
    batch = tiny.batch(model, 1)
    batch = batch._replace(hidden=batch.hidden.float())
    direction = [torch.randn_like(w) for w in model.weights()]
    narrow, wide = (
        hvp(model.with_engine(Engine("fused", precision)), batch, direction) for precision in ("bf16", "fp32")
    )
    assert 1e-5 < ((narrow - wide).norm() / wide.norm()).item() < 0.05


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("small", [6, 3, 2])
def test_architect_gradient_matches_between_engines(small, norm):
    """A single part keeps the graph of its first pass; several parts are each passed through a second time."""
    model = tiny.search_model(norm=norm)
    train, valid = tiny.batch(model, 1), tiny.batch(model, 2)
    before = [w.detach().clone() for w in model.weights()]
    actual, passes = {}, []

    class Counted(MicroBatches):
        def part(self, start):
            passes.append(start)
            return super().part(start)

    for name in ("fused", "eager"):
        behind = model.with_engine(Engine(name))
        architect = Architect(
            model.weights(), model.alphas, partial(Counted, behind, micro_batch_size=small, beta=0.7),
            partial(MicroBatches, behind, micro_batch_size=small), update=WeightUpdate(0.25, weight_decay=1e-2),
            hessian="exact",
        )  # fmt: skip
        actual[name] = architect.gradient(train, valid, eta=0.7)
    for one, other in zip(*actual.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert passes == 2 * {6: [0], 3: 2 * [0, 3], 2: 2 * [0, 2, 4]}[small]
    assert all(torch.equal(w, old) for w, old in zip(model.weights(), before, strict=True))
