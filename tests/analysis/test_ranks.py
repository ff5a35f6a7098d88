"""Against the definitions, pair by pair, and against SciPy where it is installed."""

import numpy as np
import pytest

from momentum_lm.analysis import ranks

SIZES = [2, 3, 5, 8, 17, 33]


def slow_tau(a, b):
    concordant = discordant = ties_a = ties_b = 0
    for i in range(len(a)):
        for j in range(i + 1, len(a)):
            product = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
            concordant, discordant = concordant + (product > 0), discordant + (product < 0)
            ties_a, ties_b = ties_a + (a[i] == a[j]), ties_b + (b[i] == b[j])
    pairs = len(a) * (len(a) - 1) / 2
    denominator = np.sqrt((pairs - ties_a) * (pairs - ties_b))
    return (concordant - discordant) / denominator if denominator else np.nan


def draw(rng, shape, values):
    """Few distinct values make many ties; None makes none."""
    return rng.normal(size=shape) if values is None else rng.integers(values, size=shape).astype(float)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("values", [2, 5, None])
def test_tau_is_the_definition(n, values):
    rng = np.random.default_rng(n)
    a, b = draw(rng, (3, 4, n), values), draw(rng, (3, 4, n), values)
    expected = np.array([[slow_tau(x, y) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)])
    np.testing.assert_allclose(ranks.kendall_tau(a, b), expected, rtol=0, atol=1e-14)  # NaN where the definition has it
    mixed = [[slow_tau(x, y) for x in p for y in b[0, :1]] for p in a]
    np.testing.assert_allclose(ranks.kendall_tau(a, b[0, 0]), mixed, rtol=0, atol=1e-14)  # broadcast


@pytest.mark.parametrize("n", [256, 300, 1024, 1025, 2500])
def test_tau_of_long_rows(n):
    """Beside all pairs' signs: however inversions are counted."""
    a, b = np.random.default_rng(n).normal(size=(2, 3, n))
    expected = [
        (np.sign(x[:, None] - x) * np.sign(y[:, None] - y)).sum() / (n * (n - 1)) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ranks.kendall_tau(a, b), expected, rtol=0, atol=1e-14)
    assert ranks.kendall_tau(a[0], -a[0]) == -1 and ranks.kendall_tau(a[0], np.exp(a[0])) == 1


@pytest.mark.parametrize("values", [3, 50, None])
def test_tau_is_scipys(values):
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = draw(rng, (5, 200), values), draw(rng, (5, 200), values)
    expected = [scipy_stats.kendalltau(x, y)[0] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ranks.kendall_tau(a, b), expected, rtol=0, atol=1e-14)


def test_tau_known_values():
    assert ranks.kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert ranks.kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # SciPy's own documentation: -0.47140452079103173
    assert ranks.kendall_tau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173, abs=1e-15)
    assert ranks.kendall_tau([0.0, -0.0, 1.0], [3.0, 3.0, 5.0]) == 1  # zeros of either sign are tied


def test_tau_looks_at_order_alone():
    rng = np.random.default_rng(1)
    a, b = draw(rng, 30, 6), draw(rng, 30, 6)
    tau = ranks.kendall_tau(a, b)
    shuffled = rng.permutation(30)
    assert ranks.kendall_tau(a[shuffled], b[shuffled]) == tau == ranks.kendall_tau(b, a)
    assert ranks.kendall_tau(np.exp(a) * 3 - 1, b) == tau
    assert ranks.kendall_tau(-a, b) == -tau


def test_long_rows_that_all_have_ties():
    rng = np.random.default_rng(3)
    a, b = rng.integers(40, size=(2, 300)).astype(float), rng.normal(size=(2, 300))
    np.testing.assert_allclose(
        ranks.kendall_tau(a, b), [slow_tau(x, y) for x, y in zip(a, b, strict=True)], rtol=0, atol=1e-14
    )
    assert np.isnan(ranks.kendall_tau(np.zeros((2, 300)), b)).all()


def test_tau_where_nothing_can_be_ranked():
    rows = np.array([[1.0, 2, 3], [2, 2, 2], [1, np.nan, 2]])
    np.testing.assert_array_equal(ranks.kendall_tau(rows, [1.0, 2, 3]), [1, np.nan, np.nan])
    assert np.isnan(ranks.kendall_tau([5.0], [7.0]))
    assert ranks.kendall_tau(np.empty((0, 4)), np.empty((0, 4))).shape == (0,)
    with pytest.raises(ValueError, match="as many entries"):
        ranks.kendall_tau([1, 2], [1, 2, 3])


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(2)
    a, b = draw(rng, (7, 20), 9), draw(rng, (7, 20), 9)
    whole = ranks.kendall_tau(a, b)
    monkeypatch.setattr(ranks, "_CELLS", 50)
    np.testing.assert_array_equal(ranks.kendall_tau(a, b), whole)


def slow_recall(found, wanted, k):
    def top(values):  # of equal entries the first is larger
        return {i for _, i in sorted((-v, i) for i, v in enumerate(values))[:k]}

    return len(top(found) & top(wanted)) / min(k, len(found))


@pytest.mark.parametrize("values", [3, None])
@pytest.mark.parametrize("k", [1, 4, 11, 20])
def test_recall_is_the_definition(k, values):
    rng = np.random.default_rng(k)
    a, b = draw(rng, (2, 3, 11), values), draw(rng, (2, 3, 11), values)
    expected = [[slow_recall(x, y, k) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]
    np.testing.assert_array_equal(ranks.recall_at_k(a, b, k), expected)
    np.testing.assert_array_equal(ranks.recall_at_k(a, a, k), np.ones((2, 3)))
    with pytest.raises(ValueError, match="k >= 1"):
        ranks.recall_at_k(a, b, 0)


def test_chance_recall():
    rng = np.random.default_rng(0)
    simulated = ranks.recall_at_k(rng.random((4000, 8)), np.arange(8.0), 5).mean()
    assert simulated == pytest.approx(ranks.chance_recall(8, 5), abs=0.01)
    assert (ranks.chance_recall(8, 5), ranks.chance_recall(6, 5), ranks.chance_recall(3, 5)) == (0.625, 5 / 6, 1)


def test_recall_of_what_cannot_be_ranked():
    assert np.isnan(ranks.recall_at_k([1, np.nan, 3, 2], [1, 2, 3, 4], 2)) and np.isnan(
        ranks.recall_at_k([1.0, 2], [np.nan, 1], 2)
    )
