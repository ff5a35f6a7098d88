"""Each method against numbers worked out by hand, as fractions."""

import numpy as np
import pytest

from momentum_lm.icl import calibration

log, nan = np.log, np.nan
TWO = log([[0.6, 0.3], [0.1, 0.4], [0.5, 0.5]])  # not normalised over labels, as scores of a vocabulary are not


def test_none_is_a_copy():
    result = calibration.apply("none", TWO)
    np.testing.assert_array_equal(result, TWO)
    result[0, 0] = 7
    assert TWO[0, 0] != 7


def test_contextual():
    """Labels' shares after inputs without content: 3/4, 1/4 and 1/2, 1/2; their mean: 5/8, 3/8."""
    result = calibration.apply("contextual", TWO, content_free=log([[0.3, 0.1], [0.2, 0.2]]))
    np.testing.assert_allclose(
        result, log([[0.6 * 8 / 5, 0.3 * 8 / 3], [0.1 * 8 / 5, 0.4 * 8 / 3], [0.8, 4 / 3]]), rtol=1e-14
    )
    assert result.argmax(1).tolist() == [0, 1, 1]


def test_batch():
    """Shares of the labels: (2/3, 1/3), (1/5, 4/5), (1/2, 1/2); their mean: 41/90, 49/90."""
    result = calibration.apply("batch", TWO)
    shares = np.array([[2 / 3, 1 / 3], [1 / 5, 4 / 5], [1 / 2, 1 / 2]])
    np.testing.assert_allclose(result, log(shares / [41 / 90, 49 / 90]), rtol=1e-14)
    assert result.argmax(1).tolist() == [0, 1, 0]


def test_batch_removes_a_constant_preference():
    """A label that every query prefers by the same factor is worth nothing; without the factor the
    answers alternate.
    """
    odds = np.array([4.0, 1 / 4, 9.0, 1 / 9])
    plain = np.stack([log(odds), np.zeros(4)], axis=1)
    biased = plain + np.array([5.0, 0.0])
    assert biased.argmax(1).tolist() == [0, 0, 0, 0]
    assert calibration.apply("batch", biased).argmax(1).tolist() == plain.argmax(1).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "premise", [log([0.5, 0.1]), log([[0.5, 0.1]]), log([[0.5, 0.1]] * 3)], ids=["C", "1xC", "nxC"]
)
def test_domain_pmi(premise):
    result = calibration.apply("domain_pmi", TWO, domain=premise)
    np.testing.assert_allclose(result, log([[1.2, 3.0], [0.2, 4.0], [1.0, 5.0]]), rtol=1e-14)


def test_ragged_choices():
    """Examples with two and three choices: what is not there stays NaN and is never predicted."""
    scores = [[-3.0, -1.0, nan], [-5.0, -4.0, -4.0]]
    np.testing.assert_array_equal(calibration.apply("none", scores), scores)
    result = calibration.apply("domain_pmi", scores, domain=[[-4.0, -1.0, nan], [-5.0, -5.0, -2.0]])
    np.testing.assert_array_equal(result, [[1.0, 0.0, nan], [0.0, 1.0, -2.0]])
    assert np.nanargmax(result, axis=1).tolist() == [0, 1]
    assert np.nanargmax(calibration.apply("none", scores), axis=1).tolist() == [1, 1]  # the lowest index among equals
    for name in ("contextual", "batch"):
        with pytest.raises(ValueError, match="same labels"):
            calibration.apply(name, scores, content_free=scores)


def test_ties_go_to_the_lowest_index():
    equal = np.full((4, 3), -2.0)
    for name in calibration.CALIBRATIONS:
        result = calibration.apply(name, equal, content_free=[[-1.0, -1.0, -1.0]], domain=[-1.0, -1.0, -1.0])
        assert np.nanargmax(result, axis=1).tolist() == [0, 0, 0, 0], name


def test_extreme_scores_stay_finite():
    """Long continuations have log-probabilities far below the range of exp: e^-1000 of probability is still divided
    out.
    """
    scores = np.array([[-2000.0, -1000.0], [-2001.0, -1000.0]])
    share = log((1 + np.exp(-1)) / 2)  # of the first label on average, beside e^-1000
    np.testing.assert_allclose(calibration.apply("batch", scores), [[-share, 0.0], [-1 - share, 0.0]], atol=1e-9)
    contextual = calibration.apply("contextual", scores, content_free=scores[:1])
    np.testing.assert_allclose(contextual, [[-1000.0, -1000.0], [-1001.0, -1000.0]], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "scores", "more", "message"),
    [
        ("bach", TWO, {}, "choose one of none, contextual, domain_pmi, batch"),
        ("contextual", TWO, {}, "inputs without content"),
        ("contextual", TWO, {"content_free": [[-1.0, -1.0, -1.0]]}, "same 2 labels"),
        ("contextual", TWO, {"content_free": [[-1.0, nan]]}, "same 2 labels"),
        ("domain_pmi", TWO, {}, "premise"),
        ("domain_pmi", TWO, {"domain": [[-1.0, -1.0]] * 2}, r"shape \(3, 2\) or \(2,\)"),
        ("domain_pmi", TWO, {"domain": [-1.0, nan]}, "lacks the score"),
        ("none", [-1.0, -2.0], {}, "one row an example"),
        ("none", np.zeros((0, 2)), {}, "one row an example"),
        ("none", [[-1.0, -np.inf]], {}, "finite"),
        ("none", [[nan, -1.0]], {}, "end of rows"),
        ("none", [[-1.0, nan, -1.0]], {}, "end of rows"),
        ("none", [[nan, nan]], {}, "end of rows"),
    ],
)
def test_what_does_not_fit_is_refused(name, scores, more, message):
    with pytest.raises(ValueError, match=message):
        calibration.apply(name, scores, **more)
