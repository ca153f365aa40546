"""A language model of a few dozen weights in float64, with random text and masks, for tests of gradients."""

import pytest
import torch

from engine.dropout import DropoutRates
from model import retrain_model
from model_search import RNNModelSearch
from training.losses import Batch

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

V, H, B, T, N = 11, 4, 6, 5, 3
RATES = DropoutRates(dropout=0.3, dropouth=0.25, dropoutx=0.3, dropouti=0.2, dropoute=0.1)


def search_model(rates=RATES, seed=0, norm="batch"):
    torch.manual_seed(seed)
    return spread(RNNModelSearch(V, H, rates, steps=N, norm=norm))


def discrete_model(genotype, rates=RATES, seed=0, n_experts=1):
    torch.manual_seed(seed)
    return spread(retrain_model(V, H, rates, genotype, n_experts))


def spread(model):
    """Weights and alphas of order 1, where every term of a gradient shows."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    return model


def batch(model, seed, rows=B):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(V, (T + 1, rows), generator=generator)
    hidden = torch.randn(rows, H, generator=generator, dtype=torch.float64)
    return Batch(text[:-1], text[1:], hidden, model.sample_masks(rows))
