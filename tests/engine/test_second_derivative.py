"""The mixed second derivative of the fused engine: how the alphas' gradient changes as the weights go somewhere."""

from functools import partial

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_fused import (
    assert_equal,
    chunks,
    decoder_problem,
    decoder_sizes,
    fillings,
    in_pieces,
    in_rows_of,
    norms,
    problem,
    relative_errors,
    rows,
    run,
    sizes,
    widened,
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


def mixed(module, leaves, masks, R, along, held=None, asked=("alpha", "x", "h0"), norm="batch"):
    """Gradient of (gradient of L in x, h0 and the weights) . along; L is not linear in the hidden states."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    hiddens = run(module, "relaxed", leaves, masks, held=held, norm=norm)
    total = (R * (hiddens + hiddens.square())).sum()
    first = torch.autograd.grad(total, [leaves[name] for name in NAMES], create_graph=True)
    dot = sum((g * v.to(g)).sum() for g, v in zip(first, along, strict=True))
    second = torch.autograd.grad(dot, [leaves[name] for name in asked])
    return [*(g.detach() for g in first), *second]


def numbered(found, expected):
    return dict(enumerate(found)), dict(enumerate(expected))


@settings(max_examples=180, deadline=None)
@given(size=sizes, row=rows, norm=norms)
def test_fused_is_eager_in_float64(size, row, norm):
    leaves, masks, R = problem(**size)
    along = directions(leaves, size["seed"])
    with in_rows_of(row):
        found = mixed(fused, leaves, masks, R, along, norm=norm)
    assert_equal(*numbered(found, mixed(reference, leaves, masks, R, along, norm=norm)), 1e-9)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(3, 3, 2, 3, 3), (1, 2, 2, 2, 2), (2, 1, 2, 2, 2)])
def test_it_is_the_derivative_of_the_equations_by_loops(size, masked, norm):
    """Along the direction by a complex step, in each alpha by a central difference of that."""
    leaves, masks, R = problem(*size, seed=3, masked=masked)
    along = directions(leaves, 3)
    *_, found = mixed(fused, leaves, masks, R, along, asked=("alpha",), norm=norm)
    arrays = {name: leaf.numpy() for name, leaf in leaves.items()}
    given_masks = oracle_masks(arrays, [None if mask is None else mask.numpy() for mask in masks])
    step = 1e-30
    moved = {name: arrays[name] + 1j * step * v.numpy() for name, v in zip(NAMES, along, strict=True)}

    def slope(alpha):
        h = oracle.relaxed_sequence(**moved, alpha=alpha, x_mask=given_masks[0], h_mask=given_masks[1], norm=norm)
        return oracle.scalar(h + h * h, R.numpy()).imag / step

    radius, expected = 1e-5, np.zeros_like(arrays["alpha"])
    for place in np.ndindex(expected.shape):
        unit = np.zeros_like(expected)
        unit[place] = radius
        expected[place] = (slope(arrays["alpha"] + unit) - slope(arrays["alpha"] - unit)) / (2 * radius)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7 * (1 + np.abs(expected).max()))


@settings(max_examples=45, deadline=None)
@given(T=st.integers(1, 6), B=st.integers(8, 20), H=st.integers(4, 24), seed=st.integers(0, 10**6), norm=norms)
@example(T=6, B=10, H=11, seed=621070, norm="batch")  # where eager is 3 to 19 times nearer than at the other places
def test_in_fp32_fused_is_as_near_to_float64_as_eager_is(T, B, H, seed, norm):
    """To 2e-5; where a random cell is so steep that fp32 does not carry that far, to 5 times eager's own error. The
    largest of either over four places counts, since at one alone either may be lucky."""
    leaves, masks, R = problem(T, B, H, H, 8, seed, masked=True, scale=0.2)
    along = directions(leaves, seed)
    errors = {reference: [], fused: []}
    for away in (0, 0.001, 0.002, 0.003):
        there = {name: (1 + away) * leaf for name, leaf in leaves.items()}
        held = FrozenReLU()  # as in float64: at a kink the last digit decides
        exact = mixed(reference, there, masks, R, along, held, norm=norm)
        short = {name: leaf.float() for name, leaf in there.items()}, [mask.float() for mask in masks], R.float()
        for module, relu in ((reference, held), (fused, widened(held))):
            errors[module].append(relative_errors(*numbered(mixed(module, *short, along, relu, norm=norm), exact)))
    eager, found = ({i: max(e[i] for e in places) for i in places[0]} for places in errors.values())
    assert all(found[i] <= max(2e-5, 5 * eager[i]) for i in found), (found, eager)


def test_relu_is_held_where_eager_holds_it():
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=2, masked=True)
    along = directions(leaves, 2)
    elsewhere = {name: leaf + 0.3 for name, leaf in leaves.items()}
    found = []
    for module in (fused, reference):
        held = FrozenReLU()
        run(module, "relaxed", leaves, masks, held=held)
        found.append(mixed(module, elsewhere, masks, R, along, held))
    assert_equal(*numbered(*found), 1e-9)
    assert not torch.allclose(found[0][-1], mixed(fused, elsewhere, masks, R, along)[-1])


def test_one_graph_serves_several_directions():
    """And another graph of the same sizes that lives beside it does not get in its way."""
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=5, masked=True)
    beside, *rest = problem(3, 4, 3, 4, 4, seed=6, masked=True)
    all_along = [directions(leaves, seed) for seed in (1, 2)]
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    hiddens = run(fused, "relaxed", leaves, masks)
    first = torch.autograd.grad(
        (R * (hiddens + hiddens.square())).sum(), [leaves[name] for name in NAMES], create_graph=True
    )
    mixed(fused, beside, *rest, all_along[0])
    for along in all_along:
        [found] = torch.autograd.grad(first, leaves["alpha"], along, retain_graph=True)
        assert torch.equal(found, mixed(fused, leaves, masks, R, along)[-3])


def test_what_is_not_formed_is_no_number_or_refused():
    leaves, masks, R = problem(2, 3, 3, 4, 3, seed=1, masked=False)
    *_, dW0 = mixed(fused, leaves, masks, R, directions(leaves, 1), asked=("W0",))
    assert dW0[3:].isnan().all()
    with pytest.raises(RuntimeError, match="not have been used"):
        mixed(fused, leaves, masks, R, directions(leaves, 1), asked=("Ws",))
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
def test_of_a_loss_that_is_linear_in_the_hidden_states_along_one_weight_alone(wanted):
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=7, masked=True)
    found = []
    for module in (fused, reference):
        here = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        [first] = torch.autograd.grad((R * run(module, "relaxed", here, masks)).sum(), here[wanted], create_graph=True)
        found.append(torch.autograd.grad(first.sin().sum(), here["alpha"]))
    assert_equal(*numbered(*found), 1e-9)


# The loss.


def of_the_loss(engine, hiddens, mask, embedding, bias, y, seed):
    """Gradients of what is not linear in the loss, and that of those along random directions in the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [leaf.clone().requires_grad_() for leaf in (hiddens, embedding, bias)]
    along = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
    loss = engine.nll(leaves[0], mask, *leaves[1:], y)
    first = torch.autograd.grad(3 * loss + loss.square(), leaves, create_graph=True)
    return [*(g.detach() for g in first), *torch.autograd.grad(first, leaves[0], along)]


@settings(max_examples=60, deadline=None)
@given(size=decoder_sizes, chunk=chunks, more=fillings)
def test_that_of_the_loss_is_that_of_cross_entropy(size, chunk, more):
    """With columns skipped (much is dropped) and not, in one chunk or many, with zeros behind and without."""
    arguments = *decoder_problem(**size), size["seed"]
    with in_pieces(chunk, more):
        found = of_the_loss(Engine("fused"), *arguments)
    for one, other in zip(found, of_the_loss(Engine(), *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# The model.


def product(model, batch, along, **options):
    part = losses(model, batch, 0.3, 0.7, **options)
    first = torch.autograd.grad(part.total, model.weights(), create_graph=True)
    return torch.autograd.grad(first, model.alphas, along)[0]


@pytest.mark.parametrize("fraternal", [0.0, 0.4])
def test_a_model_behind_either_engine_has_the_same_product(fraternal):
    """AR, TAR, every dropout, words that come twice; and two passes over one batch."""
    model = tiny.search_model()
    batch = tiny.batch(model, 1)
    if fraternal:
        batch = batch._replace(second_masks=model.sample_masks(tiny.B))
    along = [torch.randn_like(w) for w in model.weights()]
    found, expected = (
        product(model.with_engine(Engine(name)), batch, along, fraternal=fraternal) for name in ("fused", "eager")
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("copied", [True, False])
def test_bf16_is_within_its_rounding_of_fp32(monkeypatch, copied, norm):
    """And not equal to it; however the decoder lies. (With weights under which no norm makes the model steep.)"""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: copied)
    monkeypatch.setattr(linear_cross_entropy, "COPY_FROM", 1)
    model = tiny.search_model(seed=7, norm=norm).float()
    batch = tiny.batch(model, 1)
    batch = batch._replace(hidden=batch.hidden.float())
    along = [torch.randn_like(w) for w in model.weights()]
    narrow, wide = (
        product(model.with_engine(Engine("fused", precision)), batch, along) for precision in ("bf16", "fp32")
    )
    assert 1e-5 < ((narrow - wide).norm() / wide.norm()).item() < 0.05


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("small", [6, 3, 2])
def test_an_architect_finds_the_same_gradient_with_either_engine(small, norm):
    """In one part, whose graph is kept from the first pass, and in parts that are passed over again."""
    model = tiny.search_model(norm=norm)
    train, valid = tiny.batch(model, 1), tiny.batch(model, 2)
    before = [w.detach().clone() for w in model.weights()]
    found, passes = {}, []

    class Counted(MicroBatches):
        def part(self, start):
            passes.append(start)
            return super().part(start)

    for name in ("fused", "eager"):
        behind = model.with_engine(Engine(name))
        architect = Architect(
            model.weights(), model.alphas, partial(Counted, behind, small_batch_size=small, beta=0.7),
            partial(MicroBatches, behind, small_batch_size=small), update=WeightUpdate(0.25, weight_decay=1e-2),
            hessian="exact",
        )  # fmt: skip
        found[name] = architect.gradient(train, valid, eta=0.7)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert passes == 2 * {6: [0], 3: 2 * [0, 3], 2: 2 * [0, 2, 4]}[small]
    assert all(torch.equal(w, old) for w, old in zip(model.weights(), before, strict=True))
