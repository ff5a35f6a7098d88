"""Known values from tables, and coverage of intervals by simulation."""

import math

import numpy as np
import pytest

from momentum_lm.analysis import statistics as st


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),  # printed tables of Student's t
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 4, 2.77645), (0.975, 5, 2.57058),
        (0.95, 7, 1.89458), (0.995, 10, 3.16927), (0.975, 30, 2.04227), (0.9, 29, 1.31143), (0.025, 4, -2.77645),
    ],
)  # fmt: skip
def test_t_quantile_matches_tables(probability, degrees, expected):
    assert st.t_quantile(probability, degrees) == pytest.approx(expected, rel=5e-6)


def test_t_interval_by_hand():
    interval = st.t_interval([1.0, 3.0])  # mean 2, standard error 1
    assert (interval.estimate, interval.size) == (2.0, 2)
    assert (interval.low, interval.high) == pytest.approx((2 - 12.7062047, 2 + 12.7062047))
    with pytest.raises(ValueError, match="at least two"):
        st.t_interval([1.0])


def test_wilson_interval_known_values():
    interval = st.wilson_interval(10, 100)  # 0.0552-0.1744, Newcombe's worked form
    assert (interval.low, interval.high) == pytest.approx((0.05523, 0.17437), abs=1e-5)
    nothing, everything = st.wilson_interval(0, 20), st.wilson_interval(20, 20)
    assert (nothing.low, everything.high) == (0.0, 1.0)
    assert nothing.high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert everything.low == pytest.approx(1 - nothing.high)
    for bad in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            st.wilson_interval(*bad)


def test_bootstrap_is_seeded_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = st.bootstrap_mean_ci(values, 500, seed=3)
    assert whole == st.bootstrap_mean_ci(values, 500, seed=3)
    assert whole != st.bootstrap_mean_ci(values, 500, seed=4)
    monkeypatch.setattr(st, "_CELLS", 50 * 7)
    assert whole == st.bootstrap_mean_ci(values, 500, seed=3)


def test_bootstrap_mean_coverage():
    rng = np.random.default_rng(1)
    trials, hits = 300, 0
    for trial in range(trials):
        interval = st.bootstrap_mean_ci(rng.exponential(size=80), 400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / trials <= 0.98  # nominal 0.95, a little less on 80 skewed values


def test_paired_bootstrap_is_the_ratio_estimator():
    tokens = np.array([10.0, 1000.0, 50.0])
    a, b = 2.0 * tokens, 2.5 * tokens
    result = st.paired_bootstrap(a, b, tokens, 200)
    assert result.difference == pytest.approx(-0.5)
    assert (result.low, result.high) == pytest.approx((-0.5, -0.5))  # the same gap in every document
    assert result.ratio == pytest.approx(np.exp(-0.5))
    assert result.p_value == pytest.approx(2 / 201)
    mirrored = st.paired_bootstrap(b, a, tokens, 200)
    assert mirrored.difference == -result.difference
    assert mirrored.ratio_high == pytest.approx(np.exp(0.5))
    uneven = st.paired_bootstrap([30.0, 0.0], [0.0, 0.0], [10.0, 90.0], 200)
    assert uneven.difference == pytest.approx(0.3)  # not the mean of 3 and 0


def test_paired_bootstrap_of_equal_models():
    tokens = np.arange(1, 30)
    result = st.paired_bootstrap(tokens * 1.5, tokens * 1.5, tokens, 100)
    assert (result.difference, result.p_value, result.ratio) == (0.0, 1.0, 1.0)


def test_paired_bootstrap_coverage_and_power():
    rng = np.random.default_rng(2)
    trials, hits, false_alarms = 300, 0, 0
    for trial in range(trials):
        tokens = rng.integers(20, 400, size=60)
        difficulty = rng.normal(4, 1, size=60)  # shared by both models, far larger than the gap between them
        gap = -0.02 + rng.normal(0, 0.05, size=60)
        a, b = (difficulty + gap) * tokens, difficulty * tokens
        result = st.paired_bootstrap(a, b, tokens, 400, seed=trial)
        hits += result.low <= -0.02 <= result.high
        false_alarms += st.paired_bootstrap(a + 0.02 * tokens, b, tokens, 400, seed=trial).p_value < 0.05
    assert 0.89 <= hits / trials <= 0.98
    assert false_alarms / trials <= 0.11


@pytest.mark.parametrize(
    ("a", "b", "weights", "message"),
    [
        ([1.0], [1.0], [1.0], "at least two"),
        ([1.0, 2.0], [1.0], [1.0, 1.0], "one entry a document"),
        ([1.0, np.nan], [1.0, 1.0], [1.0, 1.0], "finite"),
        ([1.0, 2.0], [1.0, 1.0], [1.0, 0.0], "positive"),
    ],
)
def test_paired_bootstrap_refuses(a, b, weights, message):
    with pytest.raises(ValueError, match=message):
        st.paired_bootstrap(a, b, weights)


def test_ratio_interval_is_that_of_the_mean_where_denominators_agree():
    found, expected = st.ratio_interval([1.0, 4.0, 2.0], [10, 10, 10]), st.t_interval([0.1, 0.4, 0.2])
    assert (found.estimate, found.low, found.high, found.size) == pytest.approx(
        (expected.estimate, expected.low, expected.high, 3)
    )
    with pytest.raises(ValueError, match="two runs"):
        st.ratio_interval([1], [2])
    with pytest.raises(ValueError, match="positive"):
        st.ratio_interval([1, 0], [0, 0])


def test_ratio_interval_covers():
    """95 of 100 intervals hold the ratio, where runs are of very unequal size."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        sizes = rng.integers(5, 60, 12)
        found = st.ratio_interval(rng.binomial(sizes, 0.4), sizes)
        hits += found.low <= 0.4 <= found.high
    assert 0.91 < hits / 400 < 0.99


def test_what_two_ratios_share_is_no_doubt_about_their_difference():
    rng = np.random.default_rng(0)
    ups = rng.normal(0, 0.2, 8)
    sizes = np.full(8, 1000)
    gap = st.ratio_difference_interval((0.5 + ups) * sizes, sizes, (0.4 + ups) * sizes, sizes)
    assert (gap.estimate, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))
    apart = st.ratio_difference_interval((0.5 + ups) * sizes, sizes, (0.4 - ups) * sizes, sizes)
    assert apart.high - apart.low > 0.3


@pytest.mark.parametrize(("size", "t", "p"), [(2, 12.706205, 0.05), (8, 2.364624, 0.05), (10, -3.249836, 0.01)])
def test_t_test_matches_tables(size, t, p):
    sample = np.random.default_rng(0).normal(size=size)
    sample += t * sample.std(ddof=1) / math.sqrt(size) - sample.mean()
    assert st.t_test(sample) == pytest.approx(p, rel=5e-6)


def test_t_test_at_its_ends():
    assert st.t_test([2.0, 2.0, 2.0]) == 0.0 and st.t_test([0.0, 0.0]) == 1.0
    assert st.t_test([1e-200, 2e-200]) == st.t_test([1.0, 2.0]) == pytest.approx(0.2048328)
    low = st.t_interval([0.1, 0.2, 0.4], confidence=1 - st.t_test([0.1, 0.2, 0.4])).low
    assert low == pytest.approx(0, abs=1e-9)  # the interval of that confidence ends at zero
    with pytest.raises(ValueError, match="at least two"):
        st.t_test([1.0])


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.01, 0.04], tests=6) == pytest.approx([0.06, 0.2])  # the others may still come out smaller
    assert st.holm([0.5, 0.9]) == [1.0, 1.0] and st.holm([]) == []
    with pytest.raises(ValueError, match="2 p-values of 1 planned"):
        st.holm([0.1, 0.2], tests=1)
    for wrong in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            st.holm([0.2, wrong])
