"""Uncertainty of scores: bootstrap intervals over pictures, paired differences, spread over seeds.

Regions of one picture are not independent, so whole pictures are drawn, never single regions. A score is a ratio of
sums (correct regions over regions), and every resample is such a ratio: means of means never appear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Scores of several seeds: mean, sample standard deviation (None for a single one), count."""

    mean: float
    std: float | None
    num_seeds: int


def bootstrap(
    sums: Sequence[float], counts: Sequence[float], *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Interval of sum(sums) / sum(counts), drawing pictures with replacement.

    sums[i], counts[i]: total score and number of scored regions of picture i.
    """
    return _percentiles(_ratios([sums], counts, seed=seed, resamples=resamples)[:, 0], level)


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    counts: Sequence[float],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[Interval, Interval, Interval]:
    """Intervals of two scores of the SAME pictures and of their difference; all three see the same resamples."""
    ratios = _ratios([ours, theirs], counts, seed=seed, resamples=resamples)
    first, second = ratios[:, 0], ratios[:, 1]
    return _percentiles(first, level), _percentiles(second, level), _percentiles(first - second, level)


def across_seeds(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one score over runs that differ in their seed only."""
    if not values:
        raise ValueError("no scores to average; pass one value per seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def _ratios(columns: Sequence[Sequence[float]], counts: Sequence[float], *, seed: int, resamples: int) -> np.ndarray:
    """float64[resamples, columns]; a resample of pictures is a vector of multiplicities."""
    totals = np.asarray(counts, np.float64)
    sums = np.asarray(columns, np.float64).T
    if len(totals) == 0 or totals.sum() <= 0 or len(sums) != len(totals):
        raise ValueError(f"{len(sums)} sums and {len(totals)} counts; need one of each per picture, not all zero")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=resamples).astype(np.float64)
    denominators = weights @ totals
    is_drawn = denominators > 0  # a resample may hit only pictures without a scored region
    return np.asarray((weights @ sums)[is_drawn] / denominators[is_drawn, None])


def _percentiles(values: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))
