"""The published unrolled gradient, written again from its steps, equals ours once five of them are changed.

Without dropout; docs/from-darts.md tells what the five are. Each is shown to matter by leaving it alone unchanged.
"""

from functools import partial

import pytest
import tiny
import torch

from architect import Architect, WeightUpdate, perturbed
from engine.dropout import DropoutRates
from training.losses import MicroBatches, losses

ETA, WDECAY, TAR = 0.7, 1e-3, 0.5
CHANGES = ("the embedding moves", "the coefficient is at most 1", "TAR is in", "v is as it is", "the radius is small")
CLIPS = (0.05, 0.25, 5.0)
SEEDS = range(6)


def no_dropout_case(seed):
    model = tiny.search_model(DropoutRates(), seed)
    return model, tiny.batch(model, 2 * seed + 1), tiny.batch(model, 2 * seed + 2)


def derivatives(model, batch, inputs, beta=0.0):
    return torch.autograd.grad(losses(model, batch, 0.0, beta).total, inputs)


def norm_of(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


def published_gradient(model, train, valid, clip, changes=()):
    """Returns the unrolled gradient of the alphas as the published code computes it, but for the `changes`."""
    weights, beta = model.weights(), TAR if "TAR is in" in changes else 0.0
    g = derivatives(model, train, weights, beta)
    factor = clip / (norm_of(g) + 1e-6)  # It scales the implicit term, whatever its size.
    step = [-ETA * (min(1.0, factor) * g_i + WDECAY * w.detach()) for g_i, w in zip(g, weights, strict=True)]
    if "the embedding moves" not in changes:
        step = [0 * s if w is model.embedding else s for s, w in zip(step, weights, strict=True)]
    with perturbed(weights, step):
        direct, *v = derivatives(model, valid, [model.alphas, *weights])
    if "v is as it is" not in changes:
        v = [min(1.0, clip / (norm_of(v) + 1e-6)) * v_i for v_i in v]
    radius = (1e-5 if "the radius is small" in changes else 1e-2) / norm_of(v)
    ends = []
    for sign in (1, -1):
        with perturbed(weights, [sign * radius * v_i for v_i in v]):
            ends += derivatives(model, train, [model.alphas], beta)
    if "the coefficient is at most 1" in changes:
        factor = min(1.0, factor)
    return direct - ETA * factor * (ends[0] - ends[1]) / (2 * radius)


def our_gradient(model, train, valid, clip):
    direct, implicit, _ = Architect(
        model.weights(), model.alphas, partial(MicroBatches, model, micro_batch_size=tiny.B, beta=TAR),
        partial(MicroBatches, model, micro_batch_size=tiny.B), update=WeightUpdate(clip, weight_decay=WDECAY),
        hessian="exact",
    ).gradient(train, valid, ETA)  # fmt: skip
    return direct - implicit


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_published_gradient_with_five_changes_equals_ours(seed, clip):
    case = no_dropout_case(seed)
    assert distance(published_gradient(*case, clip, CHANGES), our_gradient(*case, clip)) < 1e-7


@pytest.mark.parametrize("left_out", CHANGES)
def test_each_of_the_five_changes_matters(left_out):
    changes = [change for change in CHANGES if change != left_out]
    case = no_dropout_case(seed=1)
    distances = [distance(published_gradient(*case, clip, changes), our_gradient(*case, clip)) for clip in CLIPS]
    assert max(distances) > 0.05


def test_published_gradient_has_a_negative_cosine_to_the_exact_one_in_some_case():
    """Prints its cosine to ours over these models and bounds: pytest -s."""
    cosines = []
    for seed in SEEDS:
        for clip in CLIPS:
            case = no_dropout_case(seed)
            ours, theirs = our_gradient(*case, clip), published_gradient(*case, clip)
            cosines.append(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0).item())
    print(f"cosine from {min(cosines):.2f} to {max(cosines):.2f}, median {sorted(cosines)[len(cosines) // 2]:.2f}")
    assert min(cosines) < 0
