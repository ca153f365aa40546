"""The neural cache matches its definition as a plain loop, however its text is cut into segments."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.neural_cache import Mix, NeuralCache

V, H = 5, 3


def problem(seed, length, batch_size):
    """Returns states (T, B, H), the words (T, B) after them and log-probabilities (T, B, V) of a model."""
    rng = np.random.default_rng(seed)
    return (
        torch.from_numpy(rng.normal(size=(length, batch_size, H))),
        torch.from_numpy(rng.integers(V, size=(length, batch_size))),
        torch.from_numpy(rng.normal(size=(length, batch_size, V))).log_softmax(-1),
    )


def expected_log_prob(states, words, log_probs, t, b, word, size, mix):
    """Returns the log-probability of `word` at time step t of batch element b (Grave et al. 2017, eq. 2 to 4)."""
    pairs = [(states[i, b], words[i, b]) for i in range(max(0, t - size), t)]
    own = math.exp(log_probs[t, b, word])
    if not pairs:
        return math.log(own)
    powers = [math.exp(mix.theta * float(states[t, b] @ state)) for state, _ in pairs]
    hits = sum(power for power, (_, next_word) in zip(powers, pairs, strict=True) if next_word == word)
    return math.log((1 - mix.share) * own + mix.share * hits / sum(powers))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch_size=st.integers(1, 3),
    size=st.integers(1, 9),
    mixes=st.lists(
        st.builds(Mix, st.sampled_from([0.0, 0.4, 2.0]), st.sampled_from([0.05, 0.5, 0.9])), min_size=1, max_size=3
    ),
)  # fmt: skip
def test_log_probs_match_a_plain_loop_over_the_pairs(seed, cuts, batch_size, size, mixes):
    states, words, log_probs = problem(seed, sum(cuts), batch_size)
    own = log_probs.gather(-1, words[..., None])[..., 0]
    cache = NeuralCache(size, mixes)
    parts = zip(own.split(cuts), states.split(cuts), words.split(cuts), strict=True)
    actual = torch.cat([cache.log_probs(*part) for part in parts], dim=1)  # (M, T, B)
    for m, mix in enumerate(mixes):
        for t in range(sum(cuts)):
            for b in range(batch_size):
                expected = expected_log_prob(states, words, log_probs, t, b, words[t, b], size, mix)
                assert actual[m, t, b].item() == pytest.approx(expected, abs=1e-10)


def test_probabilities_of_all_words_sum_to_one():
    """The last word of a text is each of the vocabulary in turn."""
    mixes = [Mix(0.7, 0.3), Mix(0.0, 0.99)]
    for length in (1, 2, 7):  # of the first word there is no pair before
        states, words, log_probs = problem(length, length, 2)
        total = torch.zeros(len(mixes), 2, dtype=torch.float64)
        for word in range(V):
            words[-1] = word
            own = log_probs.gather(-1, words[..., None])[..., 0]
            total += NeuralCache(4, mixes).log_probs(own, states, words)[:, -1].exp()
        torch.testing.assert_close(total, torch.ones_like(total))


def test_memory_is_bounded_by_the_size_of_the_cache():
    cache = NeuralCache(6, [Mix(0.5, 0.1)])
    for seed in range(5):
        states, words, log_probs = problem(seed, 4, 2)
        cache.log_probs(log_probs[..., 0], states, words)
    assert cache.states.shape == (6, 2, H) and cache.words.shape == (6, 2)
