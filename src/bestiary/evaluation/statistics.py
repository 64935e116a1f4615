"""Uncertainty of scores: bootstrap intervals over pictures, paired differences.

Regions of one picture are not independent, so whole pictures are drawn, never single regions. A score is a ratio of
sums (correct regions over regions), and every resample is such a ratio: means of means never appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95

Totals = tuple[Sequence[float], Sequence[float]]
"""Numerator and denominator of a ratio, one of each a picture."""
Strata = Sequence[Sequence[float]]
"""Values of pictures in groups that are drawn apart."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float


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


def ratio_bootstrap(
    ours: Totals, theirs: Totals, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[Interval, Interval, Interval]:
    """Intervals of two ratios over the same pictures, each with its own denominator, and of their difference."""
    rng = np.random.default_rng(seed)
    drawn = _draws(len(ours[0]), rng, resamples)
    sums = drawn @ np.asarray([*ours, *theirs], np.float64).T
    is_drawn = (sums[:, 1] > 0) & (sums[:, 3] > 0)
    first, second = sums[is_drawn, 0] / sums[is_drawn, 1], sums[is_drawn, 2] / sums[is_drawn, 3]
    return _percentiles(first, level), _percentiles(second, level), _percentiles(first - second, level)


def total_bootstrap(
    ours: Strata, theirs: Strata | None, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[Interval, Interval | None, Interval | None]:
    """Intervals of a sum of group means, of another one of the same pictures, and of their difference.

    Every group keeps its number of pictures in every resample.
    """
    rng = np.random.default_rng(seed)
    columns = [ours] if theirs is None else [ours, theirs]
    totals = np.zeros((resamples, len(columns)))
    for group in zip(*columns, strict=True):
        values = np.asarray(group, np.float64).T
        totals += _draws(len(values), rng, resamples) @ values / len(values)
    first = _percentiles(totals[:, 0], level)
    if theirs is None:
        return first, None, None
    return first, _percentiles(totals[:, 1], level), _percentiles(totals[:, 0] - totals[:, 1], level)


def _ratios(columns: Sequence[Sequence[float]], counts: Sequence[float], *, seed: int, resamples: int) -> np.ndarray:
    """float64[resamples, columns]; a resample of pictures is a vector of multiplicities."""
    totals = np.asarray(counts, np.float64)
    sums = np.asarray(columns, np.float64).T
    if len(totals) == 0 or totals.sum() <= 0 or len(sums) != len(totals):
        raise ValueError(f"{len(sums)} sums and {len(totals)} counts; need one of each per picture, not all zero")
    weights = _draws(len(totals), np.random.default_rng(seed), resamples)
    denominators = weights @ totals
    is_drawn = denominators > 0  # a resample may hit only pictures without a scored region
    return np.asarray((weights @ sums)[is_drawn] / denominators[is_drawn, None])


def _draws(num_pictures: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """float64[resamples, pictures]: how often each picture was drawn."""
    shares = np.full(num_pictures, 1 / num_pictures)
    return rng.multinomial(num_pictures, shares, size=resamples).astype(np.float64)


def _percentiles(values: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high))
