"""Agreement between two rankings: Kendall's tau-b and overlap of the top k, for many rows at once. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CELLS = 500_000  # entries ranked at once: the temporaries of a block stay within some 30 MB
_DIRECT = 10  # bits: up to 1,024 entries all pairs are compared


def kendall_tau(a: ArrayLike, b: ArrayLike) -> Floats:
    """Kendall's tau-b along the last axis: (concordant - discordant pairs) / sqrt(pairs not tied in a * pairs not tied
    in b).

    a, b (..., n), broadcast against each other -> (...). This is what ``scipy.stats.kendalltau`` calls its statistic,
    and without ties it is the paper's (Pc - Pd) / (n (n - 1) / 2), section 4.6. Pairs are counted in whole numbers, in
    O(n log n). NaN where nothing can be ranked: fewer than two entries, all entries of a or b equal, or a NaN among
    them. Raises ValueError for unequal n.
    """
    first, second = _paired(a, b)
    shape, n = first.shape[:-1], first.shape[-1]
    if n < 2:
        return np.full(shape, np.nan)
    x, y = first.reshape(-1, n), second.reshape(-1, n)
    step = max(1, _CELLS // n)
    blocks = [_tau_rows(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)]
    return np.concatenate(blocks).reshape(shape) if blocks else np.empty(shape)


def recall_at_k(found: ArrayLike, wanted: ArrayLike, k: int) -> Floats:
    """Share of the k largest entries of ``wanted`` that are among the k largest of ``found``, along the last axis.

    found, wanted (..., n), broadcast against each other -> (...). Of equal entries the first ones count as larger.
    Where n < k (the authors' code stops there) k is n, and recall is 1. Entries of -inf, what attention does not see,
    are never found. NaN for rows with a NaN, or without anything to find. Raises ValueError for k < 1, no entries, or
    unequal n.
    """
    first, second = _paired(found, wanted)
    k = min(k, first.shape[-1])
    if k < 1:
        raise ValueError("recall@k needs k >= 1 and at least one entry")
    hidden = np.isneginf(first)
    recall = (_top(first, k) & ~hidden & _top(second, k)).sum(-1) / k
    return np.where(np.isnan(first).any(-1) | np.isnan(second).any(-1) | hidden.all(-1), np.nan, recall)


def chance_recall(n: int, k: int) -> float:
    """What :func:`recall_at_k` is expected to be for unrelated rankings of n entries: k / n, at most 1."""
    return min(1.0, k / n)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim == 0 or second.ndim == 0 or first.shape[-1] != second.shape[-1]:
        raise ValueError(f"need as many entries in both rankings, got shapes {first.shape} and {second.shape}")
    one, other = np.broadcast_arrays(first, second)
    return one, other


def _top(values: Floats, k: int) -> NDArray[np.bool_]:
    """Marks the k largest of each row; of those equal to the smallest of them the first."""
    least = np.partition(values, -k, axis=-1)[..., [-k]]
    above, equal = values > least, values == least
    wanted = k - above.sum(-1, keepdims=True)
    if (equal.sum(-1, keepdims=True) > wanted).any():
        equal &= np.cumsum(equal, axis=-1) <= wanted
    return above | equal


def _tau_rows(x: Floats, y: Floats) -> Floats:
    """Knight's algorithm (JASA 61, 1966) on (rows, n): order by x, then count the inversions that are left in y."""
    result = np.empty(len(x))
    rank, plain = _ranks(x, y)
    pairs = x.shape[1] * (x.shape[1] - 1) // 2
    if plain.any():
        result[plain] = (pairs - 2 * _inversions(rank[plain])) / pairs
    if not plain.all():
        result[~plain] = _tau_of_tied(x[~plain], y[~plain])
    return result


def _ranks(x: Floats, y: Floats) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Ranks in y of entries in the order of x, (rows, n), and which rows have neither ties nor NaN: those of the others
    mean nothing."""
    order = np.argsort(x, axis=1)
    x, y = (np.take_along_axis(v, order, axis=1) for v in (x, y))
    order = np.argsort(y, axis=1)
    with np.errstate(invalid="ignore"):  # -inf twice is a tie
        plain: NDArray[np.bool_] = np.all(
            [(np.diff(v, axis=1) > 0).all(1) for v in (x, np.take_along_axis(y, order, axis=1))], axis=0
        )
    return _places(order), plain


def _places(order: NDArray[np.int64]) -> NDArray[np.int32]:
    """The inverse of each row, a permutation."""
    places = np.empty(order.shape, dtype=np.int32)
    np.put_along_axis(places, order, np.arange(order.shape[1], dtype=np.int32)[None], axis=1)
    return places


def _tau_of_tied(x: Floats, y: Floats) -> Floats:
    undefined = np.isnan(x).any(1) | np.isnan(y).any(1)
    order = np.lexsort((y, x), axis=-1)  # by x, and by y where x is tied: then no pair tied in x is an inversion of y
    x, y = (np.take_along_axis(v, order, axis=1) for v in (x, y))
    new_x, new_y = (v[:, 1:] != v[:, :-1] for v in (x, y))
    ties_x, ties_both = _tied_pairs(new_x), _tied_pairs(new_x | new_y)
    order = np.argsort(
        y, axis=1, kind="stable"
    )  # stable: entries tied in y get ranks in the order they stand in, so are no inversion
    y = np.take_along_axis(y, order, axis=1)
    ties_y = _tied_pairs(y[:, 1:] != y[:, :-1])
    pairs = order.shape[1] * (order.shape[1] - 1) // 2
    score = pairs - ties_x - ties_y + ties_both - 2 * _inversions(_places(order))
    undefined |= (ties_x == pairs) | (ties_y == pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = score / np.sqrt(
            (pairs - ties_x).astype(np.float64) * (pairs - ties_y)
        )  # one root: equal rankings give 1 exactly
    return np.where(undefined, np.nan, tau)


def _tied_pairs(new: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs of equal entries in sorted rows, from where (rows, n - 1) an entry differs from the one before it."""
    position = np.arange(1, new.shape[1] + 1)
    start = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    return (position - start).sum(axis=1)  # an entry is tied with those of its run that stand before it


def _inversions(rank: NDArray[np.int32]) -> NDArray[np.int64]:
    """Pairs i < j with rank_i > rank_j in rows (rows, n) that are permutations of 0..n-1.

    Radix sort from the highest bit: two ranks that agree above a bit and differ in it are an inversion if the one with
    the bit stands first, so each bit's inversions are how far its zeros have to move to the front of their group. Rows
    are filled up to a power of two with larger ranks at their end, which adds none; then every group holds as many
    zeros as ones. In groups that are small enough pairs are compared one by one, which is several times as fast.
    """
    rows, n = rank.shape
    bits = (n - 1).bit_length()
    if bits <= _DIRECT:
        return _compare_pairs(rank)
    line = np.tile(np.arange(1 << bits, dtype=np.int32), (rows, 1))
    line[:, :n] = rank
    total = np.zeros(rows)
    for bit in reversed(range(_DIRECT, bits)):
        half = 1 << bit
        groups = line.reshape(rows, -1, 2 * half)
        high = (groups & half).astype(bool)
        total += ((~high).astype(np.float64) @ np.arange(2.0 * half)).sum(axis=1) - groups.shape[1] * (
            half * (half - 1) / 2
        )
        line = np.stack([groups[~high].reshape(rows, -1, half), groups[high].reshape(rows, -1, half)], axis=2)
    rest = _compare_pairs(line.reshape(-1, 1 << _DIRECT) & ((1 << _DIRECT) - 1))
    return total.astype(np.int64) + rest.reshape(rows, -1).sum(1)  # exact: whole numbers far below 2^53


def _compare_pairs(rank: NDArray[np.int32]) -> NDArray[np.int64]:
    """:func:`_inversions` in O(n^2), entries side by side: of 16-bit numbers, counted in 8 bits, a processor compares
    many at once."""
    line = np.ascontiguousarray(rank.T, dtype=np.int16)  # (n, rows): every distance is one stretch of memory
    total = np.zeros(line.shape[1], dtype=np.int64)
    smaller = np.empty(line.shape, dtype=bool)
    counts = np.zeros(line.shape, dtype=np.uint8)
    for distance in range(1, len(line)):
        np.less(line[distance:], line[:-distance], out=smaller[distance:])
        counts[distance:] += smaller.view(np.uint8)[distance:]
        if distance % 255 == 0:
            total += counts.sum(0, dtype=np.int64)
            counts[:] = 0
    return total + counts.sum(0, dtype=np.int64)
