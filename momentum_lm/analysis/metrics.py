"""How alike in-context learning (ICL) and finetuning (FT) change a model: the metrics of "Why Can GPT Learn
In-Context?" (Dai et al., 2023, arXiv:2212.10559), as the authors' code computes them and corrected. NumPy only;
everything is computed in float64.

Settings: ZSL is the model as it is, given the query alone; ICL the model as it is, given demonstrations and the query;
FT the model finetuned on the demonstrations, given the query alone. ``paper`` forms follow the authors' published
analysis code, including what it does with zero vectors (a cosine of 0); ``corrected`` forms answer NaN where a quantity
is not defined, which means leave out.

Shapes: L layers, H heads, N tokens, C model width, D head width; "..." is anything in front, usually (L,). Attention
logits are the scores q k / sqrt(D) before softmax of one query row, never a T x T matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ranks import chance_recall, kendall_tau, recall_at_k
from .statistics import Interval, bootstrap_ratios, percentiles, wilson_interval

Floats = NDArray[np.float64]

_EPSILON = 1e-20  # what the authors' code adds to norms it divides by
TOP_TOKENS, TOP_EXAMPLES = 100, 5  # k of the authors' recall@k


# ---- predictions


@dataclass(frozen=True)
class Rec2FTP:
    """Recall to finetuning's predictions, section 4.3: of the examples that FT puts right, the share that ICL puts
    right too.

    An example is put right when ZSL is wrong about it and the setting is not. ``value`` = ``recovered`` /
    ``recoverable``, None when FT puts nothing right (the authors' code divides by zero). ``bootstrap`` is the
    percentile interval over all examples, which is empty when ICL recovers everything or nothing; ``wilson`` is
    Wilson's interval given ``recoverable``, which is not. ``chance`` is the share of ZSL's errors that ICL puts right:
    what Rec2FTP is expected to be if FT's repairs said nothing about ICL's. ``cells[z, i, f]`` counts examples by
    whether ZSL, ICL and FT are right about them.
    """

    value: float | None
    recovered: int
    recoverable: int
    bootstrap: Interval | None
    wilson: Interval | None
    chance: float | None
    cells: NDArray[np.int64]


def rec2ftp(
    zero_shot_correct: ArrayLike,
    icl_correct: ArrayLike,
    ft_correct: ArrayLike,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Rec2FTP:
    """:class:`Rec2FTP` from whether each setting is right about each of n examples: three (n,) bool.

    Resamples in which FT puts nothing right have no value and are left out. Raises ValueError for no examples, or
    unequal lengths.
    """
    z, i, f = (np.asarray(x).astype(bool).astype(np.int64) for x in (zero_shot_correct, icl_correct, ft_correct))
    if z.ndim != 1 or z.size == 0 or not z.shape == i.shape == f.shape:
        raise ValueError(
            f"need one entry an example and at least one example, got shapes {z.shape}, {i.shape} and {f.shape}"
        )
    cells = np.bincount(4 * z + 2 * i + f, minlength=8).reshape(2, 2, 2)
    wrong, repaired_by_icl = int(cells[0].sum()), int(cells[0, 1].sum())
    recoverable, recovered = int(cells[0, :, 1].sum()), int(cells[0, 1, 1])
    chance = repaired_by_icl / wrong if wrong else None
    if recoverable == 0:
        return Rec2FTP(None, 0, 0, None, None, chance, cells)
    kinds = np.array([recovered, recoverable - recovered, z.size - recoverable])
    draws = bootstrap_ratios(np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0]), n_resamples, seed, kinds)
    value, (low, high) = recovered / recoverable, percentiles(draws[~np.isnan(draws)], confidence)
    bootstrap, wilson = Interval(value, low, high, z.size), wilson_interval(recovered, recoverable, confidence)
    return Rec2FTP(value, recovered, recoverable, bootstrap, wilson, chance, cells)


# ---- attention outputs


def cosine(a: ArrayLike, b: ArrayLike) -> Floats:
    """Cosine along the last axis, (..., n) and (..., n) -> (...). NaN where a or b is zero: no direction, no angle."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)))


def paper_cosine(a: ArrayLike, b: ArrayLike) -> Floats:
    """The authors' cosine, (..., n) and (..., n) -> (...): 1e-20 is added to the product of the norms, so that it is 0
    where a or b is zero."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.asarray((x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1) + _EPSILON))


def simaou(h_icl: ArrayLike, h_ft: ArrayLike, h_zs: ArrayLike, normalize: bool, noise: float = 0.0) -> Floats:
    """SimAOU, the similarity of attention output updates, section 4.4: cos(h_ICL - h_ZSL, h_FT - h_ZSL), (..., C) each
    -> (...).

    h is a layer's attention output after the output projection and its bias, before dropout and residual, at one
    position. ``normalize=True`` is the paper's form: every h is divided by its length before the differences are taken,
    and a zero update has similarity 0. Deutch et al. (arXiv:2311.07772) show what that does: where both settings add to
    h unrelated noise of three times its squared length, it gives 1/4 and not 0, since dividing by the length takes the
    same part of h out of both. ``False`` is the corrected form: differences of h itself, NaN for a zero update, and
    where ICL's is no longer than ``noise`` times h_ZSL: a query that sees no demonstration, as in a sliding window, has
    an update of rounding alone, the more so with rotary positions (see :func:`simam_delta`).
    """
    icl, ft = (_updates(h, h_zs, normalize) for h in (h_icl, h_ft))
    return paper_cosine(icl, ft) if normalize else np.where(_small(icl, h_zs, noise), np.nan, cosine(icl, ft))


def random_simaou(
    h_icl: ArrayLike, h_zs: ArrayLike, key: int | Sequence[int], normalize: bool, noise: float = 0.0
) -> Floats:
    """SimAOU of ICL and a random update that takes the place of h_FT - h_ZSL: (..., C) -> (...).

    ``normalize=True`` as in the authors' code: the update is uniform on [0, 1), which is not centred, so the baseline
    is near zero only where ICL's update happens to have entries of mean zero. ``False``: standard normal; mean 0 and
    standard deviation near 1 / sqrt(C). The authors' draw is unseeded. ``key`` seeds this one; (seed, number of the
    example) makes it independent of how examples are shared out. ``noise`` as in :func:`simaou`.
    """
    icl = _updates(h_icl, h_zs, normalize)
    rng = np.random.default_rng(key)
    if normalize:
        return paper_cosine(icl, rng.random(icl.shape))
    return np.where(_small(icl, h_zs, noise), np.nan, cosine(icl, rng.standard_normal(icl.shape)))


def _small(update: Floats, before: ArrayLike, noise: float) -> NDArray[np.bool_]:
    """Whether an update is nothing but rounding, (..., n) each -> (...)."""
    return np.asarray(
        np.linalg.norm(update, axis=-1) <= noise * np.linalg.norm(np.asarray(before, dtype=np.float64), axis=-1)
    )


def _updates(h: ArrayLike, h_zs: ArrayLike, normalize: bool) -> Floats:
    after, before = np.asarray(h, dtype=np.float64), np.asarray(h_zs, dtype=np.float64)
    if normalize:
        after, before = (x / (np.linalg.norm(x, axis=-1, keepdims=True) + _EPSILON) for x in (after, before))
    return after - before


# ---- attention to the query's own tokens


def simam(m_icl: ArrayLike, m_other: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """SimAM, the similarity of attention maps, section 4.5: cos(m_ICL, m_FT), or cos(m_ICL, m_ZSL) for "before
    finetuning".

    m (..., H, N): each head's logits of one query row over the query's own tokens, BOS and demonstrations left out ->
    (..., H). The authors average over heads, then examples, then layers. ``mask`` (..., N), True at tokens, sets
    padding to zero, which changes no cosine (the authors pad to the longest query of the set). A row of zeros has
    similarity 0, as in the authors' code.
    """
    return paper_cosine(_masked(m_icl, mask), _masked(m_other, mask))


def simam_delta(
    m_icl: ArrayLike,
    m_ft: ArrayLike,
    m_zs: ArrayLike,
    mask: ArrayLike | None = None,
    centred: bool = False,
    noise: float = 0.0,
) -> Floats:
    """SimAM of what changes, cos(m_ICL - m_ZSL, m_FT - m_ZSL), by Deutch et al. (arXiv:2311.07772). Shapes as in
    :func:`simam`.

    SimAM itself is high for any two settings whose maps are mostly the model's own. ``centred`` takes each map's mean
    over the tokens out first: a constant added to all logits of a row changes no attention among them (a key bias does
    just that), yet it does change the cosine of raw logits. NaN where an update is zero, or ICL's no longer than
    ``noise`` times the ZSL map: with relative positions (rotary) the first layer's ICL map is its ZSL map, but for
    rounding, which in fp32 is about 2e-5 of it after 2,000 tokens (``noise`` of 1e-4 then fits).
    """
    icl, ft, zs = (_centre(_masked(m, mask), mask) if centred else _masked(m, mask) for m in (m_icl, m_ft, m_zs))
    small = _small(icl - zs, _masked(m_zs, mask), noise)
    return np.where(small, np.nan, cosine(icl - zs, ft - zs))


def _masked(m: ArrayLike, mask: ArrayLike | None) -> Floats:
    values = np.asarray(m, dtype=np.float64)
    return (
        values if mask is None else np.where(_per_head(mask), values, 0.0)
    )  # not a product: padding may hold infinities


def _centre(values: Floats, mask: ArrayLike | None) -> Floats:
    tokens = np.ones(values.shape[-1:], dtype=bool)[None] if mask is None else _per_head(mask)
    mean = values.sum(-1, keepdims=True) / np.maximum(tokens.sum(-1, keepdims=True), 1)
    return np.where(tokens, values - mean, 0.0)


def _per_head(mask: ArrayLike) -> NDArray[np.bool_]:
    return np.asarray(mask, dtype=bool)[..., None, :]


# ---- attention to training tokens


@dataclass(frozen=True)
class TrainingAttention:
    """How ICL's and FT's attention to the demonstrations agree, section 4.6; each (...). NaN where nothing can be
    ranked.

    ``kendall`` and ``recall`` rank tokens, ``kendall_example`` and ``recall_example`` whole demonstrations.
    """

    kendall: Floats
    recall: Floats
    kendall_example: Floats
    recall_example: Floats


def query_products(train_queries: ArrayLike, test_query: ArrayLike, heads: int | None = None) -> Floats:
    """What section 4.6 takes as FT's attention to training tokens: inner products q'_n q of attention queries.

    train_queries (L, N, C): Q', the queries of the training tokens while they were trained on (each demonstration's
    just before the step on it), BOS left out; test_query (..., L, C): q, that of the test example under the finetuned
    model. C is all heads together. Returns (..., L, N), summed over heads as in the paper, or (..., L, H, N) with
    ``heads``. The authors record queries scaled by D^-0.5, so their products hold that factor twice: for numbers like
    theirs scale both, for attention logits one. Ranks of tokens do not care. A layer at a time is brought to float64,
    never (examples, L, N, C); pass many test queries at once to do so once.
    """
    test = np.asarray(test_query, dtype=np.float64)
    products = []
    for layer, queries in enumerate(np.asarray(train_queries)):
        train, query = queries.astype(np.float64), test[..., layer, :]
        if heads is None:
            products.append(query @ train.T)
        else:
            split = train.reshape(len(train), heads, -1).transpose(1, 2, 0)  # (H, D, N)
            products.append((query.reshape(*query.shape[:-1], heads, 1, -1) @ split)[..., 0, :])
    return np.stack(products, axis=test.ndim - 2)


def training_attention(
    icl: ArrayLike,
    ft: ArrayLike,
    lengths: Sequence[int],
    corrected: bool,
    k_tokens: int = TOP_TOKENS,
    k_examples: int = TOP_EXAMPLES,
) -> TrainingAttention:
    """Kendall's tau-b and recall@k between ICL's and FT's attention to the demonstrations' tokens.

    icl (..., N): logits from the query row to the demonstrations' tokens, -inf for those that attention does not see,
    which come last; all NaN where it sees none; ft (..., N): :func:`query_products` for the same tokens. ``lengths``
    gives each demonstration's number of tokens, sum N; BOS and separators are left out by the caller. Returns (...).

    ``corrected=False``, the authors' code: icl and ft are sums over heads; weights are their softmax over the N tokens,
    which may underflow to ties; a demonstration's weight is the sum of its tokens'. ``True``: for maps of single heads,
    (..., H, N), to be averaged over heads afterwards. Tokens are ranked by the logits themselves, so nothing
    underflows; a demonstration's weight is the mean of its tokens', since sums let long demonstrations come first on
    both sides; recall is corrected for chance, (recall - k/N) / (1 - k/N), and NaN where k >= N leaves nothing to miss.
    Recall is of FT's top k by ICL's, and k is at most N. Raises ValueError unless ``lengths`` are positive and add up
    to N.
    """
    first, second = np.asarray(icl, dtype=np.float64), np.asarray(ft, dtype=np.float64)
    n, m = first.shape[-1], len(lengths)
    if sum(lengths) != n or second.shape[-1] != n or min(lengths, default=0) < 1:
        raise ValueError(
            f"demonstrations of {list(lengths)} tokens do not make up maps of {n} and {second.shape[-1]} tokens"
        )
    pool = example_scores if corrected else example_sums
    if not corrected:
        first, second = softmax(first), softmax(second)
    by_example = pool(first, lengths), pool(second, lengths)
    recall, recall_example = recall_at_k(first, second, k_tokens), recall_at_k(*by_example, k_examples)
    if corrected:
        recall, recall_example = _above_chance(recall, n, k_tokens), _above_chance(recall_example, m, k_examples)
    return TrainingAttention(kendall_tau(first, second), recall, kendall_tau(*by_example), recall_example)


def random_training_attention(
    icl: ArrayLike, lengths: Sequence[int], key: int | Sequence[int], corrected: bool
) -> TrainingAttention:
    """:func:`training_attention` of ICL, logits of the same shapes as there, and random weights in FT's place.

    ``key`` seeds them, see :func:`random_simaou`.

    The authors draw weights from U[0, 1), for demonstrations anew, and k indices with replacement for recall; a recall
    of k weights at random has the same mean, k / N. ``corrected`` draws normal logits for the tokens and pools those
    into demonstrations as usual.
    """
    logits = np.asarray(icl, dtype=np.float64)
    rng = np.random.default_rng(key)
    if corrected:
        return training_attention(logits, rng.standard_normal(logits.shape), lengths, corrected=True)
    weights = softmax(logits)
    by_example = example_sums(weights, lengths)
    tokens, examples = rng.random(weights.shape), rng.random(by_example.shape)
    return TrainingAttention(
        kendall_tau(weights, tokens),
        recall_at_k(tokens, weights, TOP_TOKENS),
        kendall_tau(by_example, examples),
        recall_at_k(examples, by_example, TOP_EXAMPLES),
    )


def softmax(logits: ArrayLike) -> Floats:
    """Softmax along the last axis, (..., N) -> (..., N), in float64. Entries more than about 745 below the largest are
    0; NaN where all are
    -inf."""
    x = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def example_sums(weights: ArrayLike, lengths: Sequence[int]) -> Floats:
    """Attention to whole demonstrations: weights (..., N) summed over each one's tokens, (..., M)."""
    return np.asarray(np.add.reduceat(np.asarray(weights, dtype=np.float64), _starts(lengths), axis=-1))


def example_scores(logits: ArrayLike, lengths: Sequence[int]) -> Floats:
    """Log of the mean of exp(logit) over each demonstration's tokens, (..., N) -> (..., M): mean attention per token,
    up to a constant;
    -inf where all are."""
    x, starts = np.asarray(logits, dtype=np.float64), _starts(lengths)
    top = np.maximum.reduceat(x, starts, axis=-1)
    top = np.where(np.isneginf(top), 0.0, top)
    sums = np.add.reduceat(np.exp(x - np.repeat(top, lengths, axis=-1)), starts, axis=-1)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(sums / np.asarray(lengths)))


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


def _above_chance(recall: Floats, n: int, k: int) -> Floats:
    chance = chance_recall(n, k)
    return np.full(recall.shape, np.nan) if chance == 1 else (recall - chance) / (1 - chance)
