"""Rank correlations, bootstrap intervals and permutation tests match their written-out definitions."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study import stats

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8)


def tau_b(x, y):
    """Returns (concordant - discordant) / sqrt(pairs untied in x * pairs untied in y), after Kendall (1945)."""
    score = untied_x = untied_y = 0
    for i, j in combinations(range(len(x)), 2):
        a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
        score, untied_x, untied_y = score + a * b, untied_x + abs(a), untied_y + abs(b)
    return score / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan


def rho(x, y):
    """Returns Pearson's correlation of the mean ranks."""

    def ranks(values):
        return [sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values]

    a, b = (np.array(ranks(values)) - (len(values) + 1) / 2 for values in (x, y))
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()) if a.any() and b.any() else math.nan


@given(PAIRS)
@settings(max_examples=60)
def test_rank_correlations_match_their_definitions(pairs):
    x, y = zip(*pairs, strict=True)
    assert stats.kendall(x, y) == pytest.approx(tau_b(x, y), nan_ok=True)
    assert stats.spearman(x, y) == pytest.approx(rho(x, y), nan_ok=True)


def test_bootstrap_interval_widens_with_the_noise_between_seeds():
    rng = np.random.default_rng(0)
    quality = np.arange(12.0)
    alike = quality + 0.01 * rng.normal(size=12)
    estimate = stats.agreement(stats.kendall, alike, quality, resamples=200)
    assert estimate == pytest.approx((1.0, 1.0, 1.0))  # A cell that is sampled twice ties with itself.

    noisy = quality + 20 * rng.normal(size=12)
    value, low, high = stats.agreement(stats.kendall, noisy, quality, resamples=200)
    assert low < value < high
    assert high - low > 0.4


def test_agreement_of_equal_cells_is_nan():
    assert all(math.isnan(v) for v in stats.agreement(stats.kendall, [1.0, 1.0], [2.0, 3.0], resamples=50))


@given(st.lists(st.lists(st.floats(-9, 9), min_size=1, max_size=4), min_size=1, max_size=4))
@settings(max_examples=40)
def test_seed_spread_is_the_pooled_standard_deviation(values):
    squares = sum((v - sum(cell) / len(cell)) ** 2 for cell in values for v in cell)
    freedom = sum(len(cell) - 1 for cell in values)
    expected = math.sqrt(squares / freedom) if freedom else math.nan
    assert stats.seed_spread(values) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(st.lists(st.integers(0, 30), min_size=4, max_size=8, unique=True), st.integers(2, 6))
@settings(max_examples=30)
def test_permutation_test_matches_enumeration_of_all_splits(values, n):
    """The p-value is two-sided as in SciPy: twice the smaller tail, and at most 1."""
    n = min(n, len(values) - 2)
    x, y = values[:n], values[n:]

    def difference(chosen):
        a = [values[i] for i in chosen]
        return sum(a) / n - (sum(values) - sum(a)) / (len(values) - n)

    differences = [difference(chosen) for chosen in combinations(range(len(values)), n)]
    observed = difference(range(n))
    below, above = (sum(s * d <= s * observed + 1e-9 for d in differences) / len(differences) for s in (1, -1))
    assert stats.permutation_test(x, y) == pytest.approx(min(1.0, 2 * min(below, above)))


def test_permutation_test_of_a_single_value_is_nan():
    assert math.isnan(stats.permutation_test([1.0], [2.0, 3.0]))


def test_bootstrap_interval_covers_the_mean_about_as_often_as_its_level():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(100):
        sample = rng.normal(size=12)
        _, low, high = stats.agreement(lambda x, y: float(np.mean(x)), sample, sample, seed, resamples=100)
        hits += low <= 0 <= high
    assert 75 <= hits <= 99


@given(st.lists(st.floats(0, 1), max_size=6))
@settings(max_examples=60)
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A hypothesis is as credible as the most credible of all intersections with it, each tested by Bonferroni."""
    tests = range(len(p_values))
    subsets = [s for size in tests for s in combinations(tests, size + 1)]
    expected = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in tests]
    assert stats.holm(p_values) == pytest.approx(expected)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=7), st.integers(1, 9), st.floats(0, 1))
@settings(max_examples=60)
def test_expected_best_is_the_mean_minimum_over_all_subsets(sample, draws, part):
    def of(k):
        return np.mean([min(chosen) for chosen in combinations(sample, min(k, len(sample)))])

    assert stats.expected_best(sample, draws) == pytest.approx(of(draws))
    between = (1 - part) * of(draws) + part * of(draws + 1)
    assert stats.expected_best(sample, draws + part) == pytest.approx(between)


def test_share_below_counts_equal_values_half():
    assert stats.share_below(2.0, [1.0, 2.0, 3.0, 4.0]) == 0.375


def test_difference_from_the_rival_has_an_interval_that_excludes_0_only_for_a_better_method():
    rng = np.random.default_rng(3)
    drawn, better = rng.normal(10, 1, 16), rng.normal(7, 1, 8)
    difference = stats.minus_best(better.tolist(), drawn.tolist(), 2.0)
    assert difference.value == pytest.approx(better.mean() - stats.expected_best(drawn.tolist(), 2.0))
    assert difference.low < difference.value < difference.high < 0
    same = stats.minus_best(drawn[:8].tolist(), drawn.tolist(), 1.0)
    assert same.low < 0 < same.high


def test_interval_of_the_difference_from_the_rival_covers_it_about_as_often_as_its_level():
    """The mean of 8 normal values minus the expected smaller one of two, over samples of 16, which is 1 / sqrt(pi)."""
    rng, hits = np.random.default_rng(2), 0
    for seed in range(100):
        searched, drawn = rng.normal(size=8).tolist(), rng.normal(size=16).tolist()
        _, low, high = stats.minus_best(searched, drawn, 2.0, seed, resamples=200)
        hits += low <= 1 / math.sqrt(math.pi) <= high
    assert 84 <= hits <= 98


def test_interval_of_a_correlation_narrows_with_the_sample_and_contains_it():
    rng = np.random.default_rng(5)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    few, many = (stats.correlation(x[:n].tolist(), y[:n].tolist()) for n in (12, 200))
    assert many.value == stats.spearman(x, y)
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert math.isnan(stats.correlation([1.0] * 5, list(range(5))).low)
