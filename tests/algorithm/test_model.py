"""Sizes, initial values and the derivation of a genotype."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.dropout import DropoutRates
from genotypes import DARTS, ENAS, PRIMITIVES, validate
from model import default_init_range, retrain_model
from model_search import RNNModelSearch, derive


def count(parameters):
    return sum(p.numel() for p in parameters)


def test_parameter_counts_are_the_published_ones():
    search = RNNModelSearch(10_000, 300, DropoutRates())
    assert count(search.weights()) == 4_810_000
    assert search.alphas.shape == (36, 5)
    assert count(retrain_model(10_000, 850, DropoutRates(), DARTS).weights()) == 22_960_000


@pytest.mark.parametrize("given", [None, 0.3])
def test_initial_weights_are_uniform_in_the_range_given_or_that_of_the_width(given):
    torch.manual_seed(0)
    bound = given or 0.04 * (850 / 20) ** 0.5
    search = RNNModelSearch(1000, 20, DropoutRates(), init_range=given)
    for model in (search, retrain_model(1000, 20, DropoutRates(), ENAS, 3, given)):
        for name, weight in model.named_parameters():
            if name in ("bias", "mixture.latent_bias"):
                assert not weight.any()
            elif name != "cell.alphas":
                assert weight.abs().max() <= bound
                assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    assert search.alphas.abs().max() < 0.01


def test_the_range_at_the_published_size_is_the_published_one():
    assert default_init_range(850) == 0.04
    assert default_init_range(64) == pytest.approx(0.1458, abs=1e-4)


def test_the_decoder_is_the_embedding():
    model = retrain_model(50, 8, DropoutRates(), ENAS)
    assert [tuple(p.shape) for p in model.parameters() if p.size(0) == 50] == [(50, 8), (50,)]


def test_weights_and_alphas_are_all_parameters_and_disjoint():
    model = RNNModelSearch(50, 8, DropoutRates(), steps=3)
    assert {id(p) for p in model.parameters()} == {id(w) for w in model.weights()} | {id(model.alphas)}
    assert all(w is not model.alphas for w in model.weights())


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_the_derived_cell_is_the_most_likely_one(steps, seed):
    alpha = np.random.default_rng(seed).normal(size=(steps * (steps + 1) // 2, len(PRIMITIVES)))
    found = derive(torch.from_numpy(alpha).softmax(-1))
    validate(found)
    assert list(found.recurrent) == oracle.derive(alpha)
    assert found.concat == tuple(range(1, steps + 1))


def test_none_is_never_derived():
    alpha = torch.zeros(36, 5)
    alpha[:, 0] = 10
    assert all(op != "none" for op, _ in derive(alpha.softmax(-1)).recurrent)
