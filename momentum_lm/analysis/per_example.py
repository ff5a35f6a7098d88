"""Values of metrics that are kept for every example, so that their means get intervals over examples and spread over
seeds. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import bootstrap_ratios, t_quantile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bands:
    """Means with their intervals, entry by entry (for a metric: by layer, or by layer and head). NaN where nothing is
    known.

    ``size`` is the number of independent units behind each entry: examples with a value, or seeds.
    """

    estimate: Floats
    low: Floats
    high: Floats
    size: NDArray[np.int64]


class PerExample:
    """Metrics of n examples as they stream in, in any order and from any process, at four bytes a value.

    Every metric is an array of one fixed shape per example, (layers,) or (layers, heads), kept in float32: 24 layers of
    2,000 examples are 190 kB. NaN, or an example that was never added, stands for "not defined" and is left out of
    means (the authors' NumPy means would be NaN altogether).
    """

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self._values: dict[str, NDArray[np.float32]] = {}

    def add(self, example: int, values: Mapping[str, ArrayLike]) -> None:
        """Keeps the values, name -> array, of the example at 0 <= ``example`` < n. Raises ValueError for another shape
        than before."""
        if not 0 <= example < self.examples:
            raise ValueError(f"example {example} is not within 0..{self.examples - 1}")
        for name, value in values.items():
            array = np.asarray(value, dtype=np.float32)
            rows = self._rows(name, array.shape)
            rows[example] = array

    def merge(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Takes over what :attr:`arrays` of another process, or of an earlier run, holds; rows (n, ...) that are NaN
        there stay as they are here. Raises ValueError for another number of examples."""
        for name, value in arrays.items():
            array = np.asarray(value, dtype=np.float32)
            if len(array) != self.examples:
                raise ValueError(f"{name} has {len(array)} examples, not {self.examples}")
            rows = self._rows(name, array.shape[1:])
            np.copyto(rows, array, where=~np.isnan(array))

    @property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Name -> (n, ...) float32, NaN where there is no value: what to save, or to send to :meth:`merge`."""
        return dict(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def mean(self, name: str) -> Floats:
        """Mean over the examples that have a value, in float64, of the metric's shape; NaN where none has."""
        return column_means(self._values[name])[0]

    def bands(self, name: str, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Bands:
        """:meth:`mean` with bootstrap intervals over examples, see :func:`bootstrap_columns`."""
        return bootstrap_columns(self._values[name], n_resamples, seed, confidence)

    def _rows(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name not in self._values:
            self._values[name] = np.full((self.examples, *shape), np.nan, dtype=np.float32)
        rows = self._values[name]
        if rows.shape[1:] != shape:
            raise ValueError(f"{name} had shape {rows.shape[1:]} for other examples, got {shape}")
        return rows


def column_means(values: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """Means over the first axis, NaN left out, and how many values each is of: (n, ...) -> (...), (...). NaN for
    none."""
    rows = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(rows)
    size = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, rows, 0.0).sum(axis=0) / size), np.asarray(size)


def bootstrap_columns(values: ArrayLike, n_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Bands:
    """Percentile bootstrap intervals of means over examples, for all columns of (n, ...) together.

    Examples are resampled whole, so all columns share each resample; for a column without NaN the interval is that of
    ``statistics.bootstrap_mean_ci`` with the same seed. NaN values are left out, as are resamples that hold nothing
    else for a column. A column of fewer than two values gets NaN as its ends. Entries of the result have shape (...).
    """
    rows = np.asarray(values, dtype=np.float64)
    estimate, size = column_means(rows)
    n, flat = len(rows), rows.reshape(len(rows), -1)
    known = ~np.isnan(flat)
    whole = bool(known.all())
    below = np.ones((n, 1)) if whole else known.astype(np.float64)
    draws = bootstrap_ratios(np.where(known, flat, 0.0), below, n_resamples, seed)
    ends = np.full((2, flat.shape[1]), np.nan)
    enough = size.reshape(-1) > 1
    quantile: Any = np.quantile if whole else np.nanquantile
    if enough.any():
        ends[:, enough] = quantile(draws[:, enough], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    low, high = ends.reshape(2, *estimate.shape)
    return Bands(estimate, low, high, size)


def spread_over_seeds(curves: ArrayLike, confidence: float = 0.95) -> Bands:
    """Means over s seeds, (s, ...), with Student's intervals; NaN is left out, and an interval of fewer than two seeds
    is NaN."""
    rows = np.asarray(curves, dtype=np.float64)
    mean, size = column_means(rows)
    squares, _ = column_means((rows - mean) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        sd = np.where(size > 1, np.sqrt(squares * size / (size - 1)), np.nan)
        quantiles = np.array(
            [t_quantile(0.5 + confidence / 2, int(s) - 1) if s > 1 else np.nan for s in np.ravel(size)]
        )
        half = quantiles.reshape(np.shape(size)) * sd / np.sqrt(size)
    return Bands(mean, mean - half, mean + half, size)


def nullable(values: ArrayLike) -> Any:
    """Nested lists for JSON, with None for NaN, which JSON does not have. A number for shape ()."""
    array = np.asarray(values, dtype=np.float64)
    boxed = array.astype(object)
    boxed[np.isnan(array)] = None
    return boxed.tolist()
