"""Whether two rankings agree, and whether one sample lies below another: what a study says about its own numbers.

Everything is about validation perplexities, where lower is better. Intervals are percentiles of the bootstrap.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.9  # of an interval


class Estimate(NamedTuple):
    """A number and the interval that it lies in; all NaN where the data say nothing."""

    value: float
    low: float
    high: float


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b; NaN if either is constant."""
    return float(stats.kendalltau(x, y).statistic) if varied(x, y) else math.nan


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho; NaN if either is constant."""
    return float(stats.spearmanr(x, y).statistic) if varied(x, y) else math.nan


def varied(*samples: Sequence[float]) -> bool:
    """Whether each has two different values."""
    return all(len(set(sample)) > 1 for sample in samples)


def agreement(
    statistic: Callable[[Sequence[float], Sequence[float]], float],
    x: Sequence[Sequence[float]],
    y: Sequence[Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """How a rank correlation of the cells' means over seeds is, and what it might as well have been.

    x, y: for each cell its values over seeds. The bootstrap draws the seeds of every cell, then cells; one that is
    drawn twice ties with itself. Draws in which a correlation is not defined are left out.
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
    """The standard deviation between seeds of one cell, pooled over cells; NaN without a second seed."""
    squares = sum(float(np.var(v)) * len(v) for v in values)
    freedom = sum(len(v) - 1 for v in values)
    return math.sqrt(squares / freedom) if freedom else math.nan


def permutation_test(x: Sequence[float], y: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the difference of the means of two samples under permutation, exact where there are few enough
    permutations; NaN if either has fewer than two values."""
    if min(len(x), len(y)) < 2:
        return math.nan
    found = stats.permutation_test(
        (np.asarray(x), np.asarray(y)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)
