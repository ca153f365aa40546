"""Models have the right sizes, initial values and derived genotypes."""

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


def test_parameter_counts_match_the_paper():
    search = RNNModelSearch(10_000, 300, DropoutRates())
    assert count(search.weights()) == 4_810_000
    assert search.alphas.shape == (36, 5)
    assert count(retrain_model(10_000, 850, DropoutRates(), DARTS).weights()) == 22_960_000


@pytest.mark.parametrize("given", [None, 0.3])
def test_initial_weights_are_uniform_in_given_or_default_range(given):
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


def test_default_init_range_matches_the_paper_at_its_width():
    assert default_init_range(850) == 0.04
    assert default_init_range(64) == pytest.approx(0.1458, abs=1e-4)


def test_decoder_shares_the_embedding_weight():
    model = retrain_model(50, 8, DropoutRates(), ENAS)
    assert [tuple(p.shape) for p in model.parameters() if p.size(0) == 50] == [(50, 8), (50,)]


def test_weights_and_alphas_partition_the_parameters():
    model = RNNModelSearch(50, 8, DropoutRates(), steps=3)
    assert {id(p) for p in model.parameters()} == {id(w) for w in model.weights()} | {id(model.alphas)}
    assert all(w is not model.alphas for w in model.weights())


@settings(max_examples=50)
@given(steps=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_derived_cell_matches_oracle(steps, seed):
    alpha = np.random.default_rng(seed).normal(size=(steps * (steps + 1) // 2, len(PRIMITIVES)))
    actual = derive(torch.from_numpy(alpha).softmax(-1))
    validate(actual)
    assert list(actual.recurrent) == oracle.derive(alpha)
    assert actual.concat == tuple(range(1, steps + 1))


def test_derive_never_selects_none():
    alpha = torch.zeros(36, 5)
    alpha[:, 0] = 10
    assert all(op != "none" for op, _ in derive(alpha.softmax(-1)).recurrent)
