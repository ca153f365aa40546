"""The reference engine matches an oracle written as plain loops of the equations, for both cells."""

import numpy as np
import oracle
import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import reference
from genotypes import PRIMITIVES, random_genotype

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def problem(T, B, E, H, N, seed, masked):
    rng = np.random.default_rng(seed)
    arrays = {
        "x": rng.normal(size=(T, B, E)),
        "h0": rng.normal(size=(B, H)),
        "W0": rng.normal(size=(E + H, 2 * H)) * 0.7,
        "Ws": rng.normal(size=(N, H, 2 * H)) * 0.7,
        "alpha": rng.normal(size=(N * (N + 1) // 2, len(PRIMITIVES))),
    }
    masks = [rng.choice([0.0, 2.0], size=size) if masked else None for size in ((B, E), (B, H))]
    return arrays, masks, rng.normal(size=(T, B, H))


def oracle_masks(arrays, masks):
    ones = np.ones_like(arrays["x"][0]), np.ones_like(arrays["h0"])
    return [one if mask is None else mask for one, mask in zip(ones, masks, strict=True)]


def torch_masks(masks):
    return [None if mask is None else torch.from_numpy(mask) for mask in masks]


def relaxed(arrays, masks, norm):
    def run(x, h0, W0, Ws, alpha):
        return reference.relaxed(x, h0, W0, list(Ws), alpha.softmax(-1), *torch_masks(masks), norm=norm)

    def with_oracle(x, h0, W0, Ws, alpha):
        return oracle.relaxed_sequence(x, h0, W0, Ws, alpha, *oracle_masks(arrays, masks), norm)

    return run, with_oracle


def discrete(arrays, masks, genotype):
    def run(x, h0, W0, Ws):
        return reference.discrete(x, h0, W0, list(Ws), *genotype, *torch_masks(masks))

    def with_oracle(x, h0, W0, Ws):
        return oracle.discrete_sequence(x, h0, W0, Ws, *genotype, *oracle_masks(arrays, masks))

    return run, with_oracle


def gradients(run, arrays, R):
    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()}
    (run(**leaves) * torch.from_numpy(R)).sum().backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


sizes = st.fixed_dictionaries(
    {
        "T": st.integers(1, 4), "B": st.integers(1, 4), "E": st.integers(1, 4), "H": st.integers(1, 4),
        "N": st.integers(1, 8), "seed": st.integers(0, 10**6), "masked": st.booleans(),
    }
)  # fmt: skip


@settings(max_examples=examples(120))
@given(sizes, st.sampled_from(reference.NORMS))
def test_relaxed_cell_matches_oracle(size, norm):
    arrays, masks, _ = problem(**size)
    run, with_oracle = relaxed(arrays, masks, norm)
    actual = run(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    np.testing.assert_allclose(actual.numpy(), with_oracle(**arrays), **TOLERANCE)


@settings(max_examples=examples(40))
@given(sizes)
def test_discrete_cell_matches_oracle(size):
    arrays, masks, _ = problem(**size)
    del arrays["alpha"]
    run, with_oracle = discrete(arrays, masks, random_genotype(size["seed"], size["N"]))
    actual = run(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    np.testing.assert_allclose(actual.numpy(), with_oracle(**arrays), **TOLERANCE)


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(3, 3, 2, 3, 3), (1, 2, 2, 2, 2), (2, 1, 2, 2, 2)])
def test_relaxed_cell_gradients_match_complex_step(size, masked, norm):
    """The gradients of weights, alphas, input and initial hidden state match complex steps through the oracle."""
    arrays, masks, R = problem(*size, seed=1, masked=masked)
    run, with_oracle = relaxed(arrays, masks, norm)
    expected = oracle.complex_step_gradient(lambda **a: oracle.scalar(with_oracle(**a), R), arrays)
    for name, actual in gradients(run, arrays, R).items():
        np.testing.assert_allclose(actual, expected[name], err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_batch_elements_are_independent_without_batch_norm(norm):
    arrays, masks, _ = problem(3, 4, 2, 3, 3, seed=3, masked=True)
    together = relaxed(arrays, masks, norm)[0](**{name: torch.from_numpy(array) for name, array in arrays.items()})
    for b in range(4):
        alone = {**arrays, "x": arrays["x"][:, b : b + 1], "h0": arrays["h0"][b : b + 1]}
        run, _ = relaxed(alone, [mask[b : b + 1] for mask in masks], norm)
        actual = run(**{name: torch.from_numpy(array) for name, array in alone.items()})
        np.testing.assert_allclose(actual[:, 0].numpy(), together[:, b].numpy(), **TOLERANCE)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(3, 3, 2, 3, 4), (1, 2, 2, 2, 2), (2, 1, 2, 2, 2)])
def test_discrete_cell_gradients_match_complex_step(size, masked):
    arrays, masks, R = problem(*size, seed=2, masked=masked)
    del arrays["alpha"]
    run, with_oracle = discrete(arrays, masks, random_genotype(5, size[-1]))
    expected = oracle.complex_step_gradient(lambda **a: oracle.scalar(with_oracle(**a), R), arrays)
    for name, actual in gradients(run, arrays, R).items():
        np.testing.assert_allclose(actual, expected[name], err_msg=name, **TOLERANCE)
