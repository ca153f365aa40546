"""Computes the statistics of a study: whether two rankings agree, and whether the means of two samples differ.

All values are validation perplexities, where lower is better. Intervals are percentiles of the bootstrap.
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.9  # Intervals have this coverage.


class Estimate(NamedTuple):
    """An estimate has a value and the bounds of its interval; each is NaN where the data do not determine it."""

    value: float
    low: float
    high: float


def estimate(value: float, resampled: Sequence[float] | np.ndarray) -> Estimate:
    """Returns a value with the interval of its bootstrap; resamples for which it is NaN are left out."""
    values = np.asarray(resampled, dtype=float)
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(values) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Kendall's tau-b of two samples, or NaN if either is constant."""
    return float(stats.kendalltau(x, y).statistic) if varied(x, y) else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Spearman's rho of two samples, or NaN if either is constant."""
    return float(stats.spearmanr(x, y).statistic) if varied(x, y) else math.nan


def varied(*samples: Sequence[float]) -> bool:
    """Returns whether each sample has at least two different values."""
    return all(len(set(sample)) > 1 for sample in samples)


def agreement(
    statistic: Callable[[Sequence[float], Sequence[float]], float], x: Sequence[float], y: Sequence[float],
    seed: int = 0, resamples: int = RESAMPLES,
) -> Estimate:  # fmt: skip
    """Returns a rank correlation, `kendall` or `spearman`, of the cells' values `x` and `y`, with its bootstrap
    interval.

    The bootstrap resamples the cells, whose values contain the noise between seeds already; a cell that is sampled
    twice ties with itself. Resamples for which the correlation is undefined are left out.
    """
    samples = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    return estimate(statistic(x, y), [statistic([x[i] for i in cells], [y[i] for i in cells]) for cells in samples])


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values of several tests, corrected by Holm's method: the share of studies without any difference in
    which at least one corrected value is at most q is at most q."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = list(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def share_below(value: float, sample: Sequence[float]) -> float:
    """Returns which share of the sample is below the value; equal ones count half."""
    return mean((x < value) + 0.5 * (x == value) for x in sample)


def expected_best(sample: Sequence[float], draws: float) -> float:
    """Returns the expected minimum of `draws` values of the sample, drawn without replacement.

    A number of draws that is not whole stands for a draw more with a probability of its fraction; more draws than there
    are values stand for all of them. The i-th smallest of n values is the minimum of k in C(n - i, k - 1) of the
    C(n, k) draws.
    """
    n, ordered = len(sample), sorted(sample)

    def of(k: int) -> float:
        return sum(x * math.comb(n - i, k - 1) for i, x in enumerate(ordered, start=1)) / math.comb(n, k)

    draws = min(max(draws, 1.0), float(n))
    low = math.floor(draws)
    part = draws - low
    return of(low) if part == 0 else (1 - part) * of(low) + part * of(low + 1)


def minus_best(
    searched: Sequence[float], drawn: Sequence[float], draws: float, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Returns the mean of `searched` minus the expected minimum of `draws` values of `drawn`, with the interval of a
    bootstrap that resamples both. Values below 0 mean that `searched` is better.

    A sample that is drawn with replacement has repeated values, hence a larger expected minimum, and varies less than a
    new sample of its size would: the resampled values are shifted to have the estimates as their means, and their
    deviations are scaled by sqrt(n / (n - 1)).
    """
    rng = np.random.default_rng(seed)
    difference, spread = mean(searched) - expected_best(drawn, draws), np.zeros(resamples)
    statistics: tuple[Callable[[list[float]], float], ...] = (mean, lambda sample: -expected_best(sample, draws))
    for sample, statistic in zip((searched, drawn), statistics, strict=True):
        resampled = np.array([statistic(rng.choice(sample, len(sample)).tolist()) for _ in range(resamples)])
        spread += (resampled - resampled.mean()) * math.sqrt(len(sample) / max(1, len(sample) - 1))
    return estimate(difference, difference + spread)


def correlation(x: Sequence[float], y: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Returns Spearman's rho of two samples, with the interval of a bootstrap over their pairs."""
    pairs = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    ranks = [stats.rankdata(np.asarray(side)[pairs], axis=1) for side in (x, y)]  # (resamples, len(x)) each
    a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return estimate(spearman(x, y), (a * b).sum(axis=1) / np.where(scale > 0, scale, np.nan))


def seed_spread(values: Sequence[Sequence[float]]) -> float:
    """Returns the standard deviation between seeds of one cell, pooled over cells, or NaN if no cell has two seeds."""
    squares = sum(float(np.var(v)) * len(v) for v in values)
    freedom = sum(len(v) - 1 for v in values)
    return math.sqrt(squares / freedom) if freedom else math.nan


def permutation_test(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the two-sided p-value, twice the smaller tail, of a permutation test of the difference of the means of
    two samples. The test is exact if there are few enough permutations. Returns NaN if either sample has fewer than
    two values."""
    if min(len(x), len(y)) < 2:
        return math.nan
    test = stats.permutation_test(
        (np.asarray(x), np.asarray(y)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        vectorized=True,
        n_resamples=99_999,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
