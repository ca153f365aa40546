"""Sampled words have the probabilities that the model gives them, cut and sharpened as the flags say."""

import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from engine.dropout import DropoutRates
from genotypes import DARTS, ENAS
from training.sampling import generate, next_word_probs

CELLS = [(DARTS, 1), (ENAS, 3), ("LSTM", 1), ("GRU", 2)]
CELL_IDS = ["DARTS", "ENAS, 3 softmaxes", "LSTM", "GRU, 2 softmaxes"]
PROMPT = torch.tensor([3, 1, 4])


def expected_probs(log_probs, temperature, top_k, top_p):
    """Returns what `next_word_probs` should, for one sample, as a plain loop over the words by rank."""
    if temperature == 0:
        best = max(range(len(log_probs)), key=lambda i: (log_probs[i], -i))
        return [float(i == best) for i in range(len(log_probs))]
    ranked = sorted(range(len(log_probs)), key=lambda i: (-log_probs[i], i))[: top_k or None]
    powers = {i: math.exp((log_probs[i] - max(log_probs)) / temperature) for i in ranked}
    total, before, kept = sum(powers.values()), 0.0, []
    for i in ranked:
        if top_p < 1 and before >= top_p * total:
            break
        before += powers[i]
        kept.append(i)
    return [powers[i] / before if i in kept else 0.0 for i in range(len(log_probs))]


@settings(max_examples=200)
@given(
    scores=st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]), top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.05, 0.4, 0.77, 0.9, 1.0]),
)  # fmt: skip
def test_next_word_probs_match_a_plain_loop_over_the_ranked_words(scores, temperature, top_k, top_p):
    log_probs = torch.tensor([scores], dtype=torch.float64).log_softmax(-1)
    expected = expected_probs(log_probs[0].tolist(), temperature, top_k, top_p)
    np.testing.assert_allclose(next_word_probs(log_probs, temperature, top_k, top_p)[0], expected, atol=1e-12)


def test_low_temperature_approaches_the_most_likely_word():
    ranks = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(seed)) for seed in range(50)])
    log_probs = (ranks.double() / 10).log_softmax(-1)  # no two words are nearly as likely
    cold = next_word_probs(log_probs, temperature=1e-3)
    torch.testing.assert_close(cold, next_word_probs(log_probs, temperature=0), atol=1e-9, rtol=0)
    assert torch.equal(cold.argmax(-1), log_probs.argmax(-1))


@pytest.mark.parametrize(("cell", "n_experts"), CELLS, ids=CELL_IDS)
def test_sampled_frequencies_match_the_probabilities_of_the_model(cell, n_experts):
    """Chi-squared test of 20,000 samples of the second word after a prompt, given the first."""
    model, samples = tiny.model_without_dropout(cell, n_experts), 20_000
    first, second = generate(model, PROMPT, 2, samples, torch.Generator().manual_seed(5))
    word = first.bincount().argmax().item()
    seen = second[first == word].bincount(minlength=tiny.V)
    with torch.no_grad():  # The prompt and the first word are read at once.
        text = torch.cat([PROMPT, torch.tensor([word])])[:, None]
        hiddens, _ = model(text, model.initial_hidden(1))
        expected = model.log_probs(hiddens[-1:])[0, 0].exp() * seen.sum()
    assert seen.sum() > samples / tiny.V
    statistic = ((seen - expected).square() / expected).sum().item()
    assert chi2.sf(statistic, tiny.V - 1) > 0.001


@pytest.mark.parametrize(("cell", "n_experts"), CELLS, ids=CELL_IDS)
def test_most_likely_words_are_those_of_a_model_that_reads_the_whole_text_anew(cell, n_experts):
    model, text = tiny.model_without_dropout(cell, n_experts), PROMPT
    words = [ids.item() for ids in generate(model, PROMPT, 12, 1, torch.Generator(), temperature=0)]
    for word in words:
        with torch.no_grad():
            hiddens, _ = model(text[:, None], model.initial_hidden(1))
        assert word == model.log_probs(hiddens)[-1, 0].argmax()
        text = torch.cat([text, torch.tensor([word])])


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_relaxed_model_generates(norm):
    model = tiny.search_model(DropoutRates(), norm=norm)
    alone = [ids.item() for ids in generate(model, PROMPT, 6, 1, torch.Generator(), temperature=0)]
    several = list(generate(model, PROMPT, 6, 3, torch.Generator(), temperature=0))
    assert [ids.tolist() for ids in several] == [[word] * 3 for word in alone]


def test_words_depend_on_the_seed_alone():
    model = tiny.model_without_dropout(DARTS)

    def sample(seed):
        return torch.stack(list(generate(model, PROMPT, 20, 4, torch.Generator().manual_seed(seed)))).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert len({tuple(text) for text in zip(*sample(1), strict=True)}) == 4  # the samples differ
