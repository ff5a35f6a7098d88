"""Intervals for the numbers that are reported: NumPy only, vectorised, and the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CELLS = 4_000_000  # resampled indices held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. ``size`` is the number of independent units behind it."""

    estimate: float
    low: float
    high: float
    size: int


@dataclass(frozen=True)
class PairedDifference:
    """How much better (negative) or worse (positive) ``a`` predicts than ``b``, over the same documents.

    ``difference`` is log ppl(a) - log ppl(b) in nats per unit of weight; ``ratio`` = exp(difference) is ppl(a) /
    ppl(b). ``p_value`` is two-sided: the smallest 1 - confidence at which the bootstrap interval leaves out zero, at
    least 2 / (resamples + 1).
    """

    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    p_value: float
    size: int


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    weights: ArrayLike,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Percentile bootstrap, over documents, of the difference in corpus-level negative log-likelihood per token.

    ``a``, ``b`` (n,) are each document's summed NLL (nats) under two models and ``weights`` (n,) its tokens. Documents
    are resampled with replacement and the statistic is the ratio estimator sum(a - b) / sum(weights), so long documents
    count for more, as they do in perplexity. The models share each resample: what both find hard cancels. The interval
    speaks of new documents, not of new training seeds. Raises ValueError for fewer than two documents, unequal lengths,
    non-finite sums or weights that are not positive.
    """
    first, second, weight = (_vector(x, name) for x, name in ((a, "a"), (b, "b"), (weights, "weights")))
    if not first.size == second.size == weight.size:
        raise ValueError(
            f"a, b and weights must have one entry a document, got {first.size}, {second.size}, {weight.size}"
        )
    if first.size < 2:
        raise ValueError("a bootstrap over documents needs at least two of them")
    if not (weight > 0).all():
        raise ValueError("weights must be positive")
    gap = first - second
    estimate = float(gap.sum() / weight.sum())
    draws = bootstrap_ratios(gap, weight, n_resamples, seed)
    low, high = percentiles(draws, confidence)
    ratio, ratio_low, ratio_high = map(math.exp, (estimate, low, high))
    return PairedDifference(estimate, low, high, ratio, ratio_low, ratio_high, _two_sided(draws), gap.size)


def bootstrap_difference(
    differences: ArrayLike, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[Interval, float]:
    """Percentile bootstrap interval of the mean of paired differences, and its two-sided p, at least 2 / (resamples +
    1).

    differences (n,), one for each unit. Made for few distinct values, as between right and wrong answers: a resample is
    drawn as their counts, which costs as much for a million units as for ten. Raises ValueError for fewer than two
    units.
    """
    gap = _vector(differences, "differences")
    if gap.size < 2:
        raise ValueError("a bootstrap needs at least two units")
    values, counts = np.unique(gap, return_counts=True)
    draws = bootstrap_ratios(values, np.ones_like(values), n_resamples, seed, counts)
    draws[np.abs(draws) < 1e-12] = 0.0  # thirds do not add up to nothing exactly
    low, high = percentiles(draws, confidence)
    return Interval(float(gap.mean()), low, high, gap.size), _two_sided(draws)


def bootstrap_mean_ci(
    values: ArrayLike,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    weights: ArrayLike | None = None,
) -> Interval:
    """Percentile bootstrap interval of mean(values), or of sum(values) / sum(weights) when weights are given.

    values, weights (n,). Raises ValueError for fewer than two values.
    """
    sample = _vector(values, "values")
    weight = np.ones_like(sample) if weights is None else _vector(weights, "weights")
    if sample.size < 2 or weight.size != sample.size:
        raise ValueError(f"need at least two values and as many weights, got {sample.size} and {weight.size}")
    low, high = percentiles(bootstrap_ratios(sample, weight, n_resamples, seed), confidence)
    return Interval(float(sample.sum() / weight.sum()), low, high, sample.size)


def bootstrap_ratios(
    above: NDArray[Any], below: NDArray[Any], n_resamples: int, seed: int, kinds: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """sum(above) / sum(below) in each of ``n_resamples`` resamples of n units, NaN for 0 / 0: (n,) or (n, c) ->
    (n_resamples, ...).

    With ``kinds`` (k,), how many units of each of k kinds there are, ``above`` and ``below`` are (k,), one entry for a
    unit of each kind: a resample then costs as much for a million units as for ten. Memory is bounded.
    """
    rng, n = np.random.default_rng(seed), len(above) if kinds is None else int(kinds.sum())
    draws = np.empty((n_resamples, *above.shape[1:]))
    step = max(1, _CELLS // max(len(above), 1))
    for start in range(0, n_resamples if n else 0, step):
        some = min(step, n_resamples - start)
        if kinds is None:
            rows = rng.integers(n, size=(some, n)) + n * np.arange(some)[:, None]
            counts = np.bincount(rows.ravel(), minlength=rows.size).reshape(some, n).astype(np.float64)
        else:
            counts = rng.multinomial(n, kinds / n, size=some).astype(np.float64)
        # of one column row by row: BLAS would round by how many resamples go through it at once
        sums = [counts @ x if x.ndim > 1 else (counts * x).sum(axis=1) for x in (above, below)]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws[start : start + some] = sums[0] / sums[1]
    return draws if n else np.full_like(draws, np.nan)


def percentiles(draws: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Ends of the percentile interval of resamples, (r,)."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion: stays within [0, 1] and is not empty at 0 or ``total`` successes.

    Raises ValueError unless 0 <= successes <= total and total > 0.
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"need 0 <= successes <= total and total > 0, got {successes} of {total}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / total
    scale = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / scale
    # at the ends the formula is exact but its rounding is not
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Interval(rate, low, high, total)


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean of a few independent runs (seeds), or of their paired differences.

    values (n,). Raises ValueError for n < 2: one run says nothing about its spread.
    """
    sample = _vector(values, "values")
    if sample.size < 2:
        raise ValueError("an interval over runs needs at least two of them")
    mean = float(sample.mean())
    half = t_quantile(0.5 + confidence / 2, sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return Interval(mean, mean - half, mean + half, sample.size)


def t_test(values: ArrayLike) -> float:
    """Student's two-sided p-value for a mean of zero, of a few independent runs or of their paired differences.

    values (n,). Raises ValueError for n < 2, and for values that are not finite.
    """
    sample = _vector(values, "values")
    if sample.size < 2:
        raise ValueError("a test over runs needs at least two of them")
    sample = sample / (np.abs(sample).max() or 1.0)  # squares of tiny values would vanish
    deviation = float(sample.std(ddof=1))
    if not deviation:
        return 0.0 if sample[0] else 1.0
    angle = math.atan(abs(float(sample.mean())) / deviation * math.sqrt(sample.size / (sample.size - 1)))
    return max(0.0, 1 - _central_mass(angle, sample.size - 1))


def holm(p_values: Sequence[float], tests: int | None = None) -> list[float]:
    """p-values corrected for being several, in the order given (Holm, Scandinavian Journal of Statistics 6, 1979).

    ``tests``: how many were planned, if not all have been made yet. Raises ValueError if that is fewer than given,
    and for a p-value outside 0 to 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must be from 0 to 1, got {list(p_values)}")
    planned = len(p_values) if tests is None else tests
    if planned < len(p_values):
        raise ValueError(f"{len(p_values)} p-values of {planned} planned tests")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (planned - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval for sum(numerators) / sum(denominators) over a few independent runs, in each of which both may
    vary: of the ratio's linearisation (Cochran, Sampling Techniques, chapter 6).

    numerators, denominators (n,). Raises ValueError for n < 2, unequal lengths, negative denominators or none that is
    positive.
    """
    return t_interval(_linearised(numerators, denominators), confidence)


def ratio_difference_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    other_numerators: ArrayLike,
    other_denominators: ArrayLike,
    confidence: float = 0.95,
) -> Interval:
    """Student's interval for the difference of two such ratios of the same runs, whose ups and downs they share. All
    (n,)."""
    first, second = _linearised(numerators, denominators), _linearised(other_numerators, other_denominators)
    return t_interval(first - second, confidence)


def _linearised(numerators: ArrayLike, denominators: ArrayLike) -> NDArray[np.float64]:
    """A value a run, whose mean is the ratio of the sums and whose spread is the ratio's, to first order."""
    above, below = _vector(numerators, "numerators"), _vector(denominators, "denominators")
    if above.size < 2 or above.size != below.size:
        raise ValueError(f"need at least two runs, and both numbers of each, got {above.size} and {below.size}")
    if (below < 0).any() or not below.any():
        raise ValueError("denominators must be positive, or some of them zero")
    ratio = above.sum() / below.sum()
    return np.asarray(ratio + (above - ratio * below) / below.mean())


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for a whole number of degrees of freedom, by bisection of its closed-form
    distribution.

    Raises ValueError unless 0 < probability < 1 and degrees >= 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"need 0 < probability < 1 and degrees >= 1, got {probability} and {degrees}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    wanted = 2 * probability - 1  # mass within +-t
    low, high = 0.0, math.pi / 2  # bisect the angle atan(t / sqrt(degrees)), which is bounded
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_mass(middle, degrees) < wanted else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central_mass(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)), Abramowitz & Stegun 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine, cosine if degrees > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be one finite number a unit, got shape {array.shape}")
    return array


def _two_sided(draws: NDArray[np.float64]) -> float:
    """The smallest 1 - confidence at which the percentile interval of the draws leaves out zero."""
    tail = int(min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0)))
    return min(1.0, 2 * (tail + 1) / (draws.size + 1))
