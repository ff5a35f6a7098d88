"""Against the definition, over all losses at once."""

import numpy as np
import pytest

from momentum_lm.analysis.by_position import LossByPosition
from momentum_lm.analysis.statistics import t_interval


def summed(losses, length, rows):
    """Of a stream of losses, cut into blocks, ``rows`` at a time; the last is padded."""
    count = -(-len(losses) // length)
    blocks = np.pad(losses, (0, count * length - len(losses))).reshape(count, length)
    real = (np.arange(count * length) < len(losses)).reshape(count, length)
    places = LossByPosition(length)
    for first in range(0, count, rows):
        places.add(blocks[first : first + rows], real[first : first + rows])
    return places


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("length", "tokens"), [(1, 9), (4, 41), (7, 100), (512, 512 * 6 + 300), (600, 600 * 3)])
def test_parts_are_means_over_whole_ones(length, tokens, rows):
    losses = np.random.default_rng(length).gamma(2.0, size=tokens) + 1 / (1 + np.arange(tokens) % length)
    found = summed(losses, length, rows).losses()
    ends = [end for end, _ in found]
    assert ends == [*(2**k for k in range(12) if 2**k < length), length]
    for start, (end, interval) in zip([0, *ends], found, strict=False):
        blocks = range(0, tokens - end + 1, length)
        expected = t_interval([losses[at + start : at + end].mean() for at in blocks])
        assert interval.size == len(blocks)
        assert (interval.estimate, interval.low, interval.high) == pytest.approx(
            (expected.estimate, expected.low, expected.high), rel=1e-9
        )


def test_icl_score():
    """Blocks in which the loss falls by a known amount between the 50th and the 500th token."""
    falls = [0.5, 0.7, 0.9, 0.4]
    losses = np.concatenate([np.where(np.arange(512) < 300, 5.0, 5.0 - fall) for fall in falls] + [np.full(509, 9.0)])
    score = summed(losses, 512, 2).icl_score()  # the last block ends before the 510th token
    expected = t_interval([-fall for fall in falls])
    assert score.size == 4
    assert (score.estimate, score.low) == pytest.approx((expected.estimate, expected.low))
    assert summed(losses, 509, 2).icl_score() is None  # too short
    assert summed(losses[:400], 512, 2).icl_score() is None  # none that is whole


def test_one_block_has_no_interval():
    ((_, interval),) = summed(np.array([2.0]), 1, 1).losses()
    assert (interval.estimate, interval.size) == (2.0, 1) and np.isnan([interval.low, interval.high]).all()


def test_many_blocks_need_no_memory():
    places = LossByPosition(2)
    for seed in range(50):
        values = np.random.default_rng(seed).normal(3.0, size=(1000, 2))
        places.add(values, np.ones_like(values, dtype=bool))
    (_, first), (_, second) = places.losses()
    assert first.size == second.size == 50_000
    assert first.low < 3.0 < first.high and first.high - first.low == pytest.approx(2 * 1.96 / 50_000**0.5, rel=0.02)
