"""Losses by their place in a block of text, summed as blocks come: what more context is worth to a model."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .statistics import Interval, t_quantile

EARLY, LATE = slice(40, 60), slice(490, 510)  # twenty places each, around the 50th and the 500th token


class _Mean:
    """The mean, with a 95% interval, of numbers that come a few at a time and are not kept."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """values (n,)."""
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())

    def interval(self) -> Interval:
        """Student's, and from 200 numbers on normal. Its ends are NaN for fewer than two numbers, and all of it for
        none."""
        if self.count < 2:
            return Interval(self.total if self.count else math.nan, math.nan, math.nan, self.count)
        mean = self.total / self.count
        variance = max(0.0, self.squares - self.total * mean) / (self.count - 1)
        times = t_quantile(0.975, self.count - 1) if self.count <= 200 else NormalDist().inv_cdf(0.975)
        half = times * math.sqrt(variance / self.count)
        return Interval(mean, mean - half, mean + half, self.count)


class LossByPosition:
    """Mean losses of parts of a block that grow in length, and the in-context learning score.

    ``ends``: the place at which each part ends, from 1: 1, 2, 4, 8, ..., ``length``. Intervals are over blocks, which
    count as independent.
    """

    def __init__(self, length: int) -> None:
        self.ends = [*(2**k for k in range((length - 1).bit_length())), length]
        self._parts = [_Mean() for _ in self.ends]
        self._score = _Mean() if length >= LATE.stop else None

    def add(self, losses: NDArray[np.float64], real: NDArray[np.bool_]) -> None:
        """losses (B, T) in nats, of blocks; ``real`` (B, T): what is not padding, which is on the right. A part that is
        not whole does not count."""
        for part, start, end in zip(self._parts, [0, *self.ends], self.ends, strict=False):
            part.add(losses[real[:, end - 1], start:end].mean(1))
        if self._score is not None:
            whole = losses[real[:, LATE.stop - 1]]
            self._score.add(whole[:, LATE].mean(1) - whole[:, EARLY].mean(1))

    def losses(self) -> list[tuple[int, Interval]]:
        """(end, mean loss in nats a token) of each part that a block was long enough for."""
        found = [(end, part.interval()) for end, part in zip(self.ends, self._parts, strict=True)]
        return [(end, interval) for end, interval in found if interval.size]

    def icl_score(self) -> Interval | None:
        """Loss around the 500th token less loss around the 50th, in nats (arXiv 2209.11895, of twenty tokens each):
        the more negative, the more does the model make of its context. None where blocks are shorter."""
        return self._score.interval() if self._score is not None and self._score.count else None
