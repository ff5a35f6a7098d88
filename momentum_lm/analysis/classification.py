"""Measures of classification, and paired tests between two classifiers of the same examples. NumPy only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import Interval, bootstrap_difference, t_interval


def accuracy(gold: ArrayLike, predicted: ArrayLike) -> float:
    """Share of examples whose predicted class, (n,), is the gold one, (n,). Raises ValueError for none, or unequal
    lengths."""
    true, guess = _pair(gold, predicted)
    return float((true == guess).mean())


def macro_f1(gold: ArrayLike, predicted: ArrayLike) -> float:
    """Mean, over the classes that occur in ``gold`` (n,), of F1 = 2 TP / (2 TP + FP + FN).

    A class that no example has, but that is predicted, is not averaged in as a zero (scikit-learn's default does that):
    its false alarms already count as misses of the others. Raises ValueError for no examples, or unequal lengths.
    """
    true, guess = _pair(gold, predicted)
    scores = []
    for label in np.unique(true):
        hits = np.count_nonzero((true == label) & (guess == label))
        scores.append(2 * hits / (np.count_nonzero(true == label) + np.count_nonzero(guess == label)))
    return float(np.mean(scores))


def confusion_matrix(gold: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """gold (n,), predicted (n,) -> counts (C, C) of C = ``num_classes``, gold class by row, predicted class by column.

    Raises ValueError for no examples, unequal lengths, or a class that is not within 0..num_classes-1.
    """
    true, guess = _pair(gold, predicted)
    if min(true.min(), guess.min()) < 0 or max(true.max(), guess.max()) >= num_classes:
        raise ValueError(f"classes must be within 0..{num_classes - 1}")
    return np.bincount(true * num_classes + guess, minlength=num_classes**2).reshape(num_classes, num_classes)


def majority_rate(gold: ArrayLike) -> float:
    """Accuracy of always giving the class that is the most frequent in ``gold`` (n,). Raises ValueError for no
    examples."""
    true, _ = _pair(gold, gold)
    return float(np.unique(true, return_counts=True)[1].max() / true.size)


@dataclass(frozen=True)
class McNemar:
    """Examples that one classifier alone gets right, and the exact two-sided p of such a split if both were equally
    good."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """McNemar's test in its exact, binomial form: given ``only_a + only_b`` disagreements, each falls to either side
    with 1/2.

    a, b (n,) bool: whether each classifier is right about each example. Raises ValueError for no examples, or unequal
    lengths.
    """
    first, second = _pair(a, b)
    only_a, only_b = (
        int(np.count_nonzero(x.astype(bool) & ~y.astype(bool))) for x, y in ((first, second), (second, first))
    )
    total = only_a + only_b
    tail, term = 0, 1  # whole numbers: sum of binomial coefficients, no rounding before the last division
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**total))


@dataclass(frozen=True)
class AccuracyDifference:
    """How much more accurate ``a`` is than ``b``, as a fraction, over the same examples and the same draws of
    demonstrations.

    ``over_examples`` speaks of new examples for these draws, ``over_seeds`` of new draws for these examples (None for a
    single seed). ``p_value`` is two-sided: McNemar's where there is one pair of runs, else the bootstrap's over
    examples. ``tests`` has McNemar's test for every pair of runs.
    """

    difference: float
    over_examples: Interval | None
    over_seeds: Interval | None
    p_value: float
    tests: tuple[McNemar, ...]


def compare_accuracy(
    a: ArrayLike,
    b: ArrayLike,
    seeds: Sequence[Hashable],
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    evaluated: ArrayLike | None = None,
) -> AccuracyDifference:
    """Paired comparison of two classifiers in r pairs of runs.

    a, b (r, n) bool: whether each is right about each of the n examples in each run; ``seeds`` (r,) names each pair's
    draw of demonstrations. Runs of one seed (orders of the same demonstrations) are averaged first, then seeds.
    ``over_examples`` is a cluster bootstrap: examples are resampled, each with all of its runs, since its answers
    depend on each other (None for one example). ``over_seeds`` is Student's interval of the seeds' paired differences.
    ``evaluated`` (r, n) bool: which examples each pair of runs was evaluated on, where that is not all of them;
    examples, not places in a run, are resampled then too. Raises ValueError for shapes that do not fit.
    """
    first, second = (np.atleast_2d(np.asarray(x, dtype=bool)) for x in (a, b))
    if first.shape != second.shape or first.ndim != 2 or len(first) != len(seeds) or first.size == 0:
        raise ValueError(
            f"need two arrays (runs, examples) and a seed for each run, got {first.shape}, {second.shape}, {len(seeds)}"
        )
    there = np.ones(first.shape, dtype=bool) if evaluated is None else np.asarray(evaluated, dtype=bool)
    if there.shape != first.shape or not (there.any(axis=0).all() and there.any(axis=1).all()):
        raise ValueError(f"evaluated must be {first.shape}, and have every run and every example, got {there.shape}")
    gaps = np.where(there, first.astype(np.float64) - second, 0.0)
    rows: dict[Hashable, list[int]] = {}
    for row, name in enumerate(seeds):
        rows.setdefault(name, []).append(row)
    # (seeds, n) each
    by_seed, counts = (np.stack([x[chosen].mean(axis=0) for chosen in rows.values()]) for x in (gaps, there))
    gap = by_seed.mean(axis=0)
    if not there.all():  # of the ratio, all differences by all answers, what each example adds
        share = counts.mean(axis=0)
        ratio = gap.sum() / share.sum()
        gap = (gap - ratio * share) / share.mean() + ratio
    tests = tuple(mcnemar(x[one], y[one]) for x, y, one in zip(first, second, there, strict=True))
    over_examples, p_value = bootstrap_difference(gap, n_resamples, seed, confidence) if gap.size > 1 else (None, 1.0)
    means = by_seed.mean(axis=1) if there.all() else by_seed.sum(axis=1) / counts.sum(axis=1)
    return AccuracyDifference(
        difference=float(gap.mean()),
        over_examples=over_examples,
        over_seeds=t_interval(means, confidence) if len(rows) > 1 else None,
        p_value=tests[0].p_value if len(tests) == 1 else p_value,
        tests=tests,
    )


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    one, other = (np.asarray(x).astype(np.int64) for x in (first, second))
    if one.ndim != 1 or one.shape != other.shape or one.size == 0:
        raise ValueError(
            f"need one entry an example and at least one example, got shapes {one.shape} and {other.shape}"
        )
    return one, other
