"""Means, intervals and spread against loops over single columns."""

import json

import numpy as np
import pytest

from momentum_lm.analysis import per_example as pe
from momentum_lm.analysis import statistics as st


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(12, 3, 2))


def filled(values, order=None):
    kept = pe.PerExample(len(values))
    for i in range(len(values)) if order is None else order:
        kept.add(i, {"metric": values[i], "layers": values[i, :, 0]})
    return kept


def test_means_do_not_depend_on_order_or_processes(values):
    whole, reverse = filled(values), filled(values, reversed(range(12)))
    first, second = filled(values, range(5)), filled(values, range(5, 12))
    first.merge(second.arrays)
    np.testing.assert_allclose(whole.mean("metric"), values.mean(axis=0), atol=1e-7)
    for other in (reverse, first):
        assert list(other) == ["metric", "layers"]
        for name in other:
            np.testing.assert_array_equal(other.arrays[name], whole.arrays[name])
            np.testing.assert_array_equal(other.mean(name), whole.mean(name))
    assert whole.arrays["metric"].dtype == np.float32
    assert "metric" in whole and "else" not in whole


def test_undefined_values_are_left_out(values):
    values[3, 1, 0] = np.nan
    values[:, 2, 1] = np.nan
    kept = filled(values, [i for i in range(12) if i != 7])  # an example that never came
    seen = np.delete(values, 7, axis=0)
    for layer in range(3):
        for head in range(2):
            column = seen[:, layer, head]
            column = column[~np.isnan(column)]
            expected = column.mean() if column.size else np.nan
            assert kept.mean("metric")[layer, head] == pytest.approx(expected, abs=1e-7, nan_ok=True)
            assert kept.bands("metric", 50).size[layer, head] == column.size
    bands = kept.bands("metric", 200)
    assert np.isnan([bands.estimate[2, 1], bands.low[2, 1], bands.high[2, 1]]).all()
    assert bands.low[1, 0] < bands.estimate[1, 0] < bands.high[1, 0]


def test_bootstrap_is_that_of_single_columns(values, monkeypatch):
    bands = pe.bootstrap_columns(values, 300, seed=4)
    for layer in range(3):
        for head in range(2):
            one = st.bootstrap_mean_ci(values[:, layer, head], 300, seed=4)
            got = [x[layer, head] for x in (bands.estimate, bands.low, bands.high)]
            assert got == pytest.approx([one.estimate, one.low, one.high], abs=1e-12)
    monkeypatch.setattr(st, "_CELLS", 12 * 7)
    chunked = pe.bootstrap_columns(values, 300, seed=4)
    np.testing.assert_allclose(chunked.low, bands.low, rtol=0, atol=1e-12)  # BLAS may add up blocks in another order


def test_bootstrap_with_gaps_is_a_loop(values):
    column = values[:, 0, 0]
    column[[2, 5]] = np.nan
    rng, draws = np.random.default_rng(0), []
    for rows in rng.integers(12, size=(100, 12)):
        draws.append(np.nanmean(column[rows]))
    bands = pe.bootstrap_columns(column, 100)
    assert (bands.low, bands.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-12)
    assert bands.estimate.shape == ()


def test_one_example_has_a_mean_but_no_interval(values):
    bands = filled(values[:1]).bands("metric", 20)
    np.testing.assert_allclose(bands.estimate, values[0], atol=1e-7)
    assert np.isnan(bands.low).all() and np.isnan(bands.high).all() and (bands.size == 1).all()


def test_spread_over_seeds_is_students_interval_by_entry():
    curves = np.random.default_rng(1).normal(size=(4, 3))
    curves[2, 1] = np.nan
    curves[1:, 2] = np.nan
    bands = pe.spread_over_seeds(curves)
    for entry in (0, 1):
        known = curves[~np.isnan(curves[:, entry]), entry]
        one = st.t_interval(known)
        got = [bands.estimate[entry], bands.low[entry], bands.high[entry], bands.size[entry]]
        assert got == pytest.approx([one.estimate, one.low, one.high, one.size])
    assert bands.estimate[2] == curves[0, 2]  # a single seed says nothing about spread
    assert np.isnan([bands.low[2], bands.high[2]]).all()


def test_json_has_null_for_nan():
    assert json.dumps(pe.nullable([[1.5, np.nan], [0, 2]]), allow_nan=False) == "[[1.5, null], [0.0, 2.0]]"
    assert (pe.nullable(np.nan), pe.nullable(0.25)) == (None, 0.25)


def test_refuses_what_does_not_fit(values):
    kept = filled(values)
    with pytest.raises(ValueError, match="not within"):
        kept.add(12, {})
    with pytest.raises(ValueError, match="had shape"):
        kept.add(0, {"metric": np.zeros(3)})
    with pytest.raises(ValueError, match="examples"):
        kept.merge({"metric": np.zeros((5, 3, 2))})
