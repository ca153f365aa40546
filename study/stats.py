"""Computes the statistics of a study: whether two rankings agree, and whether the means of two samples differ.

All values are validation perplexities, where lower is better. Intervals are percentiles of the bootstrap.
"""

import math
from collections.abc import Callable, Sequence
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
    statistic: Callable[[Sequence[float], Sequence[float]], float], x: Sequence[Sequence[float]],
    y: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES,
) -> Estimate:  # fmt: skip
    """Returns a rank correlation of the cells' means over seeds, with its bootstrap interval.

    The bootstrap resamples the seeds of every cell, and then the cells; a cell that is sampled twice ties with itself.
    Resamples for which the correlation is undefined are left out.

    Args:
        statistic: `kendall` or `spearman`.
        x, y: for each cell, its values over seeds.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        cells = rng.integers(len(x), size=len(x))
        means = [[np.mean(rng.choice(values, size=len(values))) for values in side] for side in (x, y)]
        found.append(statistic(*([side[i] for i in cells] for side in means)))
    found = [value for value in found if not math.isnan(value)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if found else (math.nan, math.nan)
    return Estimate(statistic([np.mean(v) for v in x], [np.mean(v) for v in y]), float(low), float(high))


def seed_spread(values: Sequence[Sequence[float]]) -> float:
    """Returns the standard deviation between seeds of one cell, pooled over cells, or NaN if no cell has two seeds."""
    squares = sum(float(np.var(v)) * len(v) for v in values)
    freedom = sum(len(v) - 1 for v in values)
    return math.sqrt(squares / freedom) if freedom else math.nan


def permutation_test(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the two-sided p-value of a permutation test of the difference of the means of two samples. The test is
    exact if there are few enough permutations. Returns NaN if either sample has fewer than two values."""
    if min(len(x), len(y)) < 2:
        return math.nan
    found = stats.permutation_test(
        (np.asarray(x), np.asarray(y)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
