"""Measures by hand; tests against enumeration, tables and simulation."""

import itertools
import math

import numpy as np
import pytest

from momentum_lm.analysis import classification as c
from momentum_lm.analysis.statistics import bootstrap_difference, paired_bootstrap

GOLD = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
PREDICTED = [0, 0, 1, 2, 1, 0, 2, 2, 2, 3]


def test_measures_by_hand():
    assert c.accuracy(GOLD, PREDICTED) == 0.6
    assert c.majority_rate(GOLD) == 0.4
    np.testing.assert_array_equal(
        c.confusion_matrix(GOLD, PREDICTED, 4), [[2, 1, 1, 0], [1, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 0]]
    )
    # precision and recall: class 0: 2/3, 2/4; class 1: 1/2, 1/2; class 2: 3/4, 3/4; class 3 has no example
    by_class = [2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2), 1 / 2, 3 / 4]
    assert c.macro_f1(GOLD, PREDICTED) == pytest.approx(sum(by_class) / 3, rel=1e-14)


def test_macro_f1_like_scikit_learn_on_the_gold_classes():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        gold, predicted = rng.integers(0, 5, 40), rng.integers(0, 7, 40)
        expected = metrics.f1_score(gold, predicted, labels=np.unique(gold), average="macro", zero_division=0)
        assert c.macro_f1(gold, predicted) == pytest.approx(expected, rel=1e-12)


def test_always_the_same_class():
    gold, predicted = [0] * 6 + [1] * 4, [0] * 10
    assert c.accuracy(gold, predicted) == c.majority_rate(gold) == 0.6
    assert c.macro_f1(gold, predicted) == pytest.approx((2 * 6 / (2 * 6 + 4)) / 2)


@pytest.mark.parametrize("function", [c.accuracy, c.macro_f1, lambda g, p: c.confusion_matrix(g, p, 3), c.mcnemar])
def test_lengths_must_agree(function):
    for gold, predicted in (([], []), ([0, 1], [0]), ([[0]], [[0]])):
        with pytest.raises(ValueError, match="one entry an example"):
            function(gold, predicted)
    for classes in ([3, 0], [-1, 0]):
        with pytest.raises(ValueError, match=r"within 0\.\.2"):
            c.confusion_matrix([0, 0], classes, 3)


def split(only_a, only_b, both=3):
    a = np.array([True] * only_a + [False] * only_b + [True] * both)
    b = np.array([False] * only_a + [True] * only_b + [True] * both)
    return a, b


def test_mcnemar_against_enumeration():
    """All ways in which n disagreements can fall; those at least as uneven as the one seen."""
    for only_a, only_b in ((0, 0), (1, 0), (2, 3), (1, 6), (7, 0), (5, 5)):
        total = only_a + only_b
        outcomes = [sum(side) for side in itertools.product((0, 1), repeat=total)]
        extreme = sum(abs(2 * k - total) >= abs(only_a - only_b) for k in outcomes) / len(outcomes)
        test = c.mcnemar(*split(only_a, only_b))
        assert (test.only_a, test.only_b) == (only_a, only_b)
        assert test.p_value == pytest.approx(extreme, rel=1e-14)
        assert test.p_value == c.mcnemar(*reversed(split(only_a, only_b))).p_value


def test_mcnemar_of_many_disagreements():
    assert c.mcnemar(*split(1000, 0)).p_value == 2.0**-999  # no underflow on the way
    near_normal = c.mcnemar(*split(5150, 4850)).p_value  # z = (300 - 1) / 100 with continuity correction
    assert near_normal == pytest.approx(math.erfc(2.99 / math.sqrt(2)), rel=1e-2)


def test_comparison_of_one_pair_of_runs():
    a, b = split(9, 1, 10)
    result = c.compare_accuracy([a], [b], [1])
    assert result.difference == pytest.approx(8 / 20)
    assert result.over_seeds is None and result.over_examples.size == 20
    assert result.p_value == result.tests[0].p_value == pytest.approx(2 * 11 / 1024)
    assert 0 < result.over_examples.low < 0.4 < result.over_examples.high
    swapped = c.compare_accuracy([b], [a], [1])
    assert swapped.difference == -result.difference and swapped.p_value == result.p_value


def test_orders_are_averaged_before_seeds():
    """Seed 1 has two orders with gaps of 1/2 and 0 over the examples, seed 2 one of 1: (1/4 + 1) / 2, not (1/2 + 0 + 1)
    / 3.
    """
    a = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    result = c.compare_accuracy(a, np.zeros_like(a), [1, 1, 2])
    assert result.difference == pytest.approx(0.625)
    assert (result.over_seeds.estimate, result.over_seeds.size) == (pytest.approx(0.625), 2)
    assert result.over_seeds.high - 0.625 == pytest.approx(12.7062 * 0.375, rel=1e-5)  # t(1) times |0.25 - 1| / 2
    assert [test.only_a for test in result.tests] == [2, 0, 4]


def test_examples_are_clusters():
    """Three runs that answer alike hold as much information on examples as one, and three independent ones more."""
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 400)) < 0.7, rng.random((3, 400)) < 0.6

    def width(x, y):
        interval = c.compare_accuracy(x, y, range(len(x))).over_examples
        return interval.high - interval.low

    copies = width(np.repeat(a[:1], 3, 0), np.repeat(b[:1], 3, 0))
    assert copies == pytest.approx(width(a[:1], b[:1]), rel=0.05)
    assert width(a, b) < 0.75 * copies


def test_equal_classifiers():
    a = np.random.default_rng(0).random((3, 50)) < 0.5
    result = c.compare_accuracy(a, a, [1, 2, 3])
    assert (result.difference, result.p_value, result.over_examples.low, result.over_examples.high) == (
        0.0,
        1.0,
        0.0,
        0.0,
    )
    assert c.compare_accuracy([[True]], [[False]], [1]).over_examples is None  # one example says nothing about others
    with pytest.raises(ValueError, match="a seed for each run"):
        c.compare_accuracy(a, a, [1, 2])
    with pytest.raises(ValueError, match="a seed for each run"):
        c.compare_accuracy(a, a[:, :9], [1, 2, 3])


def test_coverage_of_both_intervals():
    """Seeds with their own effect, examples with their own difficulty: each interval covers what it speaks of."""
    rng = np.random.default_rng(4)
    trials, over_examples, over_seeds = 200, 0, 0
    for trial in range(trials):
        difficulty = rng.uniform(0.2, 0.9, 300)
        effect = 0.05 + rng.normal(0, 0.03, (5, 1))
        a, b = rng.random((5, 300)) < difficulty + effect, rng.random((5, 300)) < difficulty
        result = c.compare_accuracy(a, b, range(5), n_resamples=1000, seed=trial)
        over_examples += result.over_examples.low <= effect.mean() <= result.over_examples.high
        over_seeds += result.over_seeds.low <= 0.05 <= result.over_seeds.high
    assert 0.89 <= over_examples / trials <= 0.99
    assert 0.89 <= over_seeds / trials <= 0.99


def test_bootstrap_by_counts_is_the_bootstrap_by_units(monkeypatch):
    """Against resampling of units: the same distribution, drawn otherwise."""
    rng = np.random.default_rng(5)
    gap = rng.choice([-1, 0, 0, 0, 1 / 3, 1], size=500)
    interval, p_value = bootstrap_difference(gap, 20_000, seed=1)
    units = paired_bootstrap(gap, np.zeros(500), np.ones(500), 20_000, seed=1)
    assert interval.estimate == pytest.approx(units.difference)
    assert (interval.low, interval.high) == pytest.approx((units.low, units.high), abs=2e-3)
    assert p_value == pytest.approx(units.p_value, abs=0.01)
    assert bootstrap_difference(gap, 300, seed=2) == bootstrap_difference(gap, 300, seed=2)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_difference([1.0])


def test_runs_about_different_examples():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 40)) < np.array([0.8, 0.5])[:, None, None]
    evaluated = np.zeros((3, 40), dtype=bool)
    for row, chosen in enumerate((range(20), range(10, 30), range(20, 40))):
        evaluated[row, chosen] = True
    found = c.compare_accuracy(a, b, [1, 2, 3], evaluated=evaluated)
    gaps = [float((x[one].astype(float) - y[one]).mean()) for x, y, one in zip(a, b, evaluated, strict=True)]
    assert found.difference == pytest.approx(np.mean(gaps)) == pytest.approx(found.over_seeds.estimate)
    assert found.over_examples.low < found.difference < found.over_examples.high and found.over_examples.size == 40
    assert found.tests == tuple(c.mcnemar(x[one], y[one]) for x, y, one in zip(a, b, evaluated, strict=True))
    # by hand: examples drawn with all their answers
    gap, count = np.where(evaluated, a.astype(float) - b, 0).sum(0), evaluated.sum(0)
    drawn = rng.integers(0, 40, (4000, 40))
    ratios = gap[drawn].sum(1) / count[drawn].sum(1)
    ends = [found.over_examples.low, found.over_examples.high]
    assert np.percentile(ratios, [2.5, 97.5]) == pytest.approx(ends, abs=0.03)
    whole = c.compare_accuracy(a, b, [1, 2, 3], evaluated=np.ones((3, 40), dtype=bool))
    assert whole == c.compare_accuracy(a, b, [1, 2, 3])
    with pytest.raises(ValueError, match="evaluated"):
        c.compare_accuracy(a, b, [1, 2, 3], evaluated=np.zeros((3, 40), dtype=bool))
