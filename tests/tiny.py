"""Language models of a few dozen weights in float64, with random text and masks, for tests of gradients."""

import pytest
import torch

from engine.dropout import DropoutRates
from genotypes import DARTS
from model import retrain_model
from model_search import RNNModelSearch
from training.losses import Batch

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

V, H, B, T, N = 11, 4, 6, 5, 3
RATES = DropoutRates(dropout=0.3, dropouth=0.25, dropoutx=0.3, dropouti=0.2, dropoute=0.1)


def search_model(rates=RATES, seed=0, norm="batch"):
    torch.manual_seed(seed)
    return randomize(RNNModelSearch(V, H, rates, steps=N, norm=norm))


def discrete_model(genotype, rates=RATES, seed=0, n_experts=1):
    torch.manual_seed(seed)
    return randomize(retrain_model(V, H, rates, genotype, n_experts))


def model_without_dropout(cell=DARTS, n_experts=1):
    return discrete_model(cell, DropoutRates(), n_experts=n_experts)


def randomize(model):
    """Sets weights and alphas to random values of order 1, at which every term of a gradient matters."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    return model


def batch(model, seed, batch_size=B):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (T + 1, batch_size), generator=generator)
    hidden = torch.randn(batch_size, H, generator=generator, dtype=torch.float64)
    return Batch(text[:-1], text[1:], hidden, model.sample_masks(batch_size))
