"""Against independent float64 loops that spell the definitions out, with ties and degenerate cases; and properties that
must hold.
"""

import itertools
import math

import numpy as np
import pytest
import relaxed_attention
import torch

from momentum_lm.analysis import dual_form
from momentum_lm.analysis import metrics as mt
from momentum_lm.analysis.ranks import kendall_tau, recall_at_k

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def slow_cosine(a, b, epsilon=0.0):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b)) + epsilon
    return dot / lengths if lengths else math.nan


def over_rows(function, *arrays):
    """function of the last axis of each array, for every index in front of it."""
    shape = arrays[0].shape[:-1]
    return np.array([function(*(a[i] for a in arrays)) for i in np.ndindex(shape)]).reshape(shape)


# ---- Rec2FTP


def test_rec2ftp_counts(rng):
    z, i, f = (rng.random(200) < p for p in (0.4, 0.7, 0.6))
    result = mt.rec2ftp(z, i, f, n_resamples=500)
    recoverable = [n for n in range(200) if f[n] and not z[n]]
    recovered = [n for n in recoverable if i[n]]
    assert (result.recovered, result.recoverable) == (len(recovered), len(recoverable))
    assert result.value == len(recovered) / len(recoverable)
    assert result.chance == np.mean(i[~z])
    for cell in np.ndindex(2, 2, 2):
        assert result.cells[cell] == sum((z[n], i[n], f[n]) == tuple(bool(c) for c in cell) for n in range(200))


def test_rec2ftp_bootstrap_is_over_examples(rng):
    z, i, f = (rng.random(80) < p for p in (0.4, 0.7, 0.6))
    draws = []
    for rows in rng.integers(80, size=(4000, 80)):
        base = (f[rows] & ~z[rows]).sum()
        draws.append((f[rows] & ~z[rows] & i[rows]).sum() / base)
    low, high = np.quantile(draws, [0.025, 0.975])
    result = mt.rec2ftp(z, i, f, n_resamples=4000)
    assert result.bootstrap.low == pytest.approx(low, abs=0.03) and result.bootstrap.high == pytest.approx(
        high, abs=0.03
    )
    assert mt.rec2ftp(z, i, f, n_resamples=4000).bootstrap == result.bootstrap  # seeded
    assert mt.rec2ftp(z, i, f, n_resamples=4000, seed=1).bootstrap != result.bootstrap
    assert result.wilson.low < result.value < result.wilson.high


def test_rec2ftp_with_little_or_nothing_to_recover():
    right, wrong = np.ones(4, bool), np.zeros(4, bool)
    for nothing in (mt.rec2ftp(wrong, right, wrong), mt.rec2ftp(right, wrong, right)):
        assert (nothing.value, nothing.bootstrap, nothing.wilson, nothing.recoverable) == (None, None, None, 0)
    assert mt.rec2ftp(right, wrong, right).chance is None and mt.rec2ftp(wrong, right, wrong).chance == 1
    all_of_four = mt.rec2ftp(wrong, right, right)
    assert (all_of_four.value, all_of_four.bootstrap.low, all_of_four.bootstrap.high) == (1, 1, 1)
    assert all_of_four.wilson.low < 0.6  # four of four do not prove much
    one_of_four = mt.rec2ftp([1, 1, 1, 0], right, right)  # a third of the resamples has nothing to recover
    assert (one_of_four.value, one_of_four.bootstrap.low, one_of_four.bootstrap.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="one entry an example"):
        mt.rec2ftp([], [], [])


# ---- SimAOU


def slow_simaou(icl, ft, zs, normalize):
    if normalize:
        icl, ft, zs = (x / (math.sqrt(sum(float(v) ** 2 for v in x)) + 1e-20) for x in (icl, ft, zs))
    return slow_cosine(icl - zs, ft - zs, 1e-20 if normalize else 0.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_simaou_is_the_definition(rng, normalize):
    icl, ft, zs = rng.normal(size=(3, 4, 5, 9))
    icl[0, 0] = zs[0, 0]  # no update
    icl[0, 1] = 0
    zs[0, 2] = 0
    expected = over_rows(lambda i, f, z: slow_simaou(i, f, z, normalize), icl, ft, zs)
    got = mt.simaou(icl, ft, zs, normalize)
    np.testing.assert_allclose(got, expected, **EXACT)
    assert got[0, 0] == 0 if normalize else np.isnan(got[0, 0])
    assert got.dtype == np.float64 and mt.simaou(icl.astype(np.float32), ft, zs, normalize).dtype == np.float64


def test_simaou_invariances(rng):
    icl, ft, zs = rng.normal(size=(3, 4, 9))
    scales = rng.random((3, 4, 1)) + 0.5
    np.testing.assert_allclose(
        mt.simaou(*(s * h for s, h in zip(scales, (icl, ft, zs), strict=True)), True), mt.simaou(icl, ft, zs, True)
    )
    np.testing.assert_allclose(
        mt.simaou(zs + 3 * (icl - zs), zs + 0.1 * (ft - zs), zs, False), mt.simaou(icl, ft, zs, False)
    )
    shuffled = rng.permutation(9)
    for normalize in (True, False):
        expected = mt.simaou(icl, ft, zs, normalize)
        np.testing.assert_allclose(mt.simaou(icl[:, shuffled], ft[:, shuffled], zs[:, shuffled], normalize), expected)
        np.testing.assert_allclose(mt.simaou(ft, icl, zs, normalize), expected)
        np.testing.assert_allclose(mt.simaou(icl, icl, zs, normalize), 1)
    np.testing.assert_allclose(mt.simaou(icl, 2 * zs - icl, zs, False), -1)


def test_normalisation_rewards_noise(rng):
    """Deutch et al.: unrelated updates of three times the squared length of h have similarity 1/4 once h
    is normalised.
    """
    zs, one, two = rng.normal(size=(3, 400, 2048))
    icl, ft = zs + math.sqrt(3) * one, zs + math.sqrt(3) * two
    assert mt.simaou(icl, ft, zs, True).mean() == pytest.approx(0.25, abs=0.005)
    assert mt.simaou(icl, ft, zs, False).mean() == pytest.approx(0, abs=0.005)


def test_an_update_of_rounding_has_no_direction(rng):
    zs, far = rng.standard_normal((2, 3, 16))
    icl = zs + np.array([[1e-7], [1e-3], [0.0]]) * far
    for value in (mt.simaou(icl, zs + far, zs, False, noise=1e-4), mt.random_simaou(icl, zs, 0, False, noise=1e-4)):
        assert np.isnan(value).tolist() == [True, False, True]
    assert mt.simaou(icl, zs + far, zs, False)[:2] == pytest.approx([1, 1], abs=1e-6)
    paper = mt.simaou(icl, zs + far, zs, True, noise=1e-4)  # the authors' form is as their code is
    np.testing.assert_array_equal(paper, mt.simaou(icl, zs + far, zs, True))


def test_random_simaou(rng):
    icl, zs = rng.normal(size=(2, 300, 256))
    icl += 0.2  # an update whose mean is not zero: the uniform baseline sees it, the centred one does not
    uniform, normal = (mt.random_simaou(icl, zs, (3, 1), normalize) for normalize in (True, False))
    assert abs(normal.mean()) < 0.012 and normal.std() == pytest.approx(1 / 16, rel=0.15)
    assert uniform.mean() > 0.08
    draw = np.random.default_rng((3, 1)).random((300, 256))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (icl, zs)]
    np.testing.assert_allclose(uniform, over_rows(slow_cosine, unit[0] - unit[1], draw), **EXACT)
    np.testing.assert_array_equal(normal, mt.random_simaou(icl, zs, (3, 1), False))
    assert (normal != mt.random_simaou(icl, zs, (3, 2), False)).all()


# ---- SimAM


def test_simam_is_the_definition(rng):
    icl, other = rng.normal(size=(2, 2, 3, 4, 7))
    icl[0, 0, 0] = 0
    got = mt.simam(icl, other)
    np.testing.assert_allclose(got, over_rows(lambda a, b: slow_cosine(a, b, 1e-20), icl, other), **EXACT)
    assert got.shape == (2, 3, 4) and got[0, 0, 0] == 0
    np.testing.assert_allclose(mt.simam(5 * icl, other), got, **EXACT)
    np.testing.assert_allclose(
        mt.simam(icl[..., :1], other[..., :1]), np.sign(icl[..., 0] * other[..., 0]), **EXACT
    )  # a single token


def test_padding_changes_nothing(rng):
    icl, ft, zs = rng.normal(size=(3, 2, 3, 4, 7))
    lengths = np.array([[7, 3, 1], [2, 5, 6]])
    mask = np.arange(7) >= 7 - lengths[..., None]  # on the left, as the authors pad
    padded = [np.where(mask[..., None, :], m, fill) for m, fill in ((icl, -np.inf), (ft, np.nan), (zs, 9.0))]
    for i in np.ndindex(2, 3):
        alone = [m[i][:, 7 - lengths[i] :] for m in (icl, ft, zs)]
        np.testing.assert_allclose(mt.simam(padded[0], padded[1], mask)[i], mt.simam(alone[0], alone[1]), **EXACT)
        for centred in (False, True):
            got = mt.simam_delta(*padded, mask=mask, centred=centred)[i]
            np.testing.assert_allclose(got, mt.simam_delta(*alone, centred=centred), **EXACT)


@pytest.mark.parametrize("centred", [True, False])
def test_simam_delta_is_the_definition(rng, centred):
    icl, ft, zs = rng.normal(size=(3, 3, 4, 7))
    icl[0, 0] = zs[0, 0]
    ft[0, 1] = zs[0, 1]

    def slow(i, f, z):
        changes = [[m[n] - z[n] for n in range(7)] for m in (i, f)]
        if centred:
            changes = [[v - sum(change) / 7 for v in change] for change in changes]
        return slow_cosine(*changes)

    got = mt.simam_delta(icl, ft, zs, centred=centred)
    np.testing.assert_allclose(got, over_rows(slow, icl, ft, zs), **EXACT)
    assert np.isnan(got[0, :2]).all() and np.isfinite(got[1:]).all()
    shifted = mt.simam_delta(icl + 2, ft - 1, zs, centred=centred)
    assert np.allclose(shifted[1:], got[1:]) == centred  # only the centred form ignores a constant


def test_simam_delta_leaves_rounding_out(rng):
    zs, ft = rng.normal(size=(2, 2, 4, 7))
    icl = zs * (1 + 1e-6 * rng.normal(size=zs.shape))
    icl[1] += 0.1
    got = mt.simam_delta(icl, ft, zs, noise=1e-4)
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()
    assert np.isfinite(mt.simam_delta(icl, ft, zs)).all()


# ---- attention to training tokens


def slow_softmax(row):
    weights = [math.exp(v - max(row)) for v in row]
    return [w / sum(weights) for w in weights]


@pytest.fixture
def demonstrations(rng):
    lengths = [4, 1, 7, 3, 5, 2]
    return lengths, *rng.normal(size=(2, 3, 2, sum(lengths)))


def split(row, lengths):
    starts = np.cumsum([0, *lengths])
    return [row[a:b] for a, b in itertools.pairwise(starts)]


def test_paper_form_of_training_attention(demonstrations):
    lengths, icl, ft = demonstrations
    ft[0, 0] = np.round(ft[0, 0])  # ties
    got = mt.training_attention(icl, ft, lengths, corrected=False, k_tokens=6, k_examples=2)
    for i in np.ndindex(3, 2):
        one, other = slow_softmax(icl[i]), slow_softmax(ft[i])
        pooled = [[sum(part) for part in split(row, lengths)] for row in (one, other)]
        assert got.kendall[i] == pytest.approx(float(kendall_tau(one, other)), abs=1e-12)
        assert got.recall[i] == recall_at_k(one, other, 6)
        assert got.kendall_example[i] == pytest.approx(float(kendall_tau(*pooled)), abs=1e-12)
        assert got.recall_example[i] == recall_at_k(*pooled, 2)


def test_corrected_form_of_training_attention(demonstrations):
    lengths, icl, ft = demonstrations
    got = mt.training_attention(icl, ft, lengths, corrected=True, k_tokens=6, k_examples=2)
    for i in np.ndindex(3, 2):
        pooled = [
            [sum(math.exp(v) for v in part) / len(part) for part in split(row, lengths)] for row in (icl[i], ft[i])
        ]
        assert got.kendall[i] == kendall_tau(icl[i], ft[i])
        assert got.recall[i] == pytest.approx((float(recall_at_k(icl[i], ft[i], 6)) - 6 / 22) / (1 - 6 / 22))
        assert got.kendall_example[i] == pytest.approx(float(kendall_tau(*pooled)), abs=1e-12)
        assert got.recall_example[i] == pytest.approx((float(recall_at_k(*pooled, 2)) - 2 / 6) / (1 - 2 / 6))
    everything = mt.training_attention(icl, ft, lengths, corrected=True)  # k = 100 of 22 tokens cannot miss
    assert np.isnan(everything.recall).all() and np.isfinite(everything.recall_example).all()


def test_where_the_forms_of_training_attention_differ(rng):
    lengths, icl, ft = [1, 20, 2, 9, 4], np.zeros(36), np.zeros(36)
    paper = mt.training_attention(icl, ft, lengths, corrected=False)
    assert (
        np.isnan(paper.kendall) and paper.kendall_example == 1
    )  # attention that is nowhere in particular: only lengths are ranked
    corrected = mt.training_attention(icl, ft, lengths, corrected=True)
    assert np.isnan([corrected.kendall, corrected.kendall_example]).all()
    steep = np.arange(36.0) * 100  # softmax underflows: the tail is tied
    assert mt.training_attention(steep, steep[::-1], lengths, corrected=True).kendall == -1
    assert mt.training_attention(steep, steep[::-1], lengths, corrected=False).kendall > -1
    np.testing.assert_allclose(mt.example_sums(mt.softmax(icl), lengths), np.array(lengths) / 36, **EXACT)


def test_training_attention_of_few(rng):
    icl, ft = rng.normal(size=(2, 3, 4))
    one = mt.training_attention(icl, ft, [4], corrected=False)
    assert np.isnan(one.kendall_example).all() and (one.recall_example == 1).all() and np.isfinite(one.kendall).all()
    token = mt.training_attention(icl[:, :1], ft[:, :1], [1], corrected=True)
    assert np.isnan([token.kendall, token.kendall_example, token.recall, token.recall_example]).all()
    for lengths in ([2, 1], [4, 0], []):
        with pytest.raises(ValueError, match="do not make up"):
            mt.training_attention(icl, ft, lengths, corrected=False)


@pytest.mark.parametrize("corrected", [True, False])
def test_random_training_attention(rng, corrected):
    lengths = [3, 9, 5, 8, 4, 6, 10, 5]
    icl = rng.normal(size=(400, 50))
    got = mt.random_training_attention(icl, lengths, (1, 2), corrected)
    assert got.kendall.mean() == pytest.approx(0, abs=0.02) and got.kendall_example.mean() == pytest.approx(0, abs=0.05)
    assert got.recall_example.mean() == pytest.approx(0 if corrected else 5 / 8, abs=0.04)
    again, other = (mt.random_training_attention(icl, lengths, key, corrected) for key in ((1, 2), (1, 3)))
    np.testing.assert_array_equal(got.kendall, again.kendall)
    assert (got.kendall != other.kendall).any()


def test_query_products(rng):
    train, test = rng.normal(size=(2, 5, 6)), rng.normal(size=(3, 2, 6))
    per_head = mt.query_products(train, test, heads=3)
    summed = mt.query_products(train, test)
    assert per_head.shape == (3, 2, 3, 5) and summed.shape == (3, 2, 5)
    for example, layer, head, token in np.ndindex(3, 2, 3, 5):
        piece = slice(2 * head, 2 * head + 2)
        expected = sum(a * b for a, b in zip(train[layer, token, piece], test[example, layer, piece], strict=True))
        assert per_head[example, layer, head, token] == pytest.approx(expected)
    np.testing.assert_allclose(per_head.sum(axis=2), summed, **EXACT)
    np.testing.assert_allclose(mt.query_products(train, test[1], heads=3), per_head[1], **EXACT)
    np.testing.assert_allclose(mt.query_products(train, test[1]), summed[1], **EXACT)


# ---- the weights of relaxed attention


def as_columns(array):
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(array, -1, -2)))


def test_matrices_are_those_of_the_dual_form(rng):
    heads, width, model = 3, 4, 6
    before, after = (
        relaxed_attention.Projections(*rng.normal(size=(2, heads * width, model)), None, None, heads) for _ in range(2)
    )
    demos, query = rng.normal(size=(11, model)), rng.normal(size=(5, model))
    icl, ft = before.matrices(demos), relaxed_attention.finetuning_matrices(query, before, after)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        w_v, w_k, new_v, new_k = (torch.from_numpy(w[rows]) for w in (before.w_v, before.w_k, after.w_v, after.w_k))
        np.testing.assert_allclose(icl[head], dual_form.icl_update(w_v, w_k, as_columns(demos)).numpy(), **EXACT)
        expected = dual_form.finetuning_update(w_v, w_k, new_v - w_v, new_k - w_k, as_columns(query))
        np.testing.assert_allclose(ft[head], expected.numpy(), **EXACT)
    assert not relaxed_attention.finetuning_matrices(query, before, before).any()


def test_biases_are_a_constant_input(rng):
    w_v, w_k, b_v, b_k, x = (rng.normal(size=s) for s in ((8, 6), (8, 6), 8, 8, (5, 6)))
    joined = [np.concatenate([w, b[:, None]], axis=1) for w, b in ((w_v, b_v), (w_k, b_k))]
    expected = relaxed_attention.Projections(*joined, None, None, 2).matrices(
        np.concatenate([x, np.ones((5, 1))], axis=1)
    )
    np.testing.assert_allclose(relaxed_attention.Projections(w_v, w_k, b_v, b_k, 2).matrices(x), expected, **EXACT)


def test_icl_matrices_are_sums_without_order(rng):
    values, keys = rng.normal(size=(2, 3, 9, 4))
    literal = sum(values[:, n, :, None] * keys[:, n, None, :] for n in range(9))
    shuffled = rng.permutation(9)
    np.testing.assert_allclose(relaxed_attention.head_matrices(values, keys), literal, **EXACT)
    np.testing.assert_allclose(
        relaxed_attention.head_matrices(values[:, shuffled], keys[:, shuffled]), literal, **EXACT
    )
    assert not relaxed_attention.head_matrices(values[:, :0], keys[:, :0]).any()


def test_weight_similarity(rng):
    a, b = rng.normal(size=(2, 3, 4, 5))
    expected = [slow_cosine(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(relaxed_attention.weight_similarity(a, b), expected, **EXACT)
    np.testing.assert_allclose(relaxed_attention.weight_similarity(a, -2 * a), -1)
    assert np.isnan(relaxed_attention.weight_similarity(a, np.zeros_like(a))).all()
    many = relaxed_attention.weight_similarity(*rng.normal(size=(2, 500, 16, 16)))
    assert many.mean() == pytest.approx(0, abs=0.01) and many.std() == pytest.approx(1 / 16, rel=0.15)


# ---- relaxation


def slow_attention(weights, values):
    return sum(w * v for w, v in zip(weights, values, strict=True))


def test_relaxed_and_softmax_heads(rng):
    query, keys, values = (
        rng.normal(size=(4, 3)),
        rng.normal(size=(2, 6, 3)),
        rng.normal(size=(2, 6, 5)),
    )  # two query heads a key head
    scaling = 3**-0.5
    logits = np.array([scaling * keys[h // 2] @ query[h] for h in range(4)])
    softmaxed, relaxed = (
        relaxed_attention.softmax_heads(logits, values),
        relaxed_attention.relaxed_heads(logits, values, scaling),
    )
    cosines, ratios = relaxed_attention.relaxation_distance(logits, values, scaling)
    for h in range(4):
        exact = slow_attention(slow_softmax(logits[h]), values[h // 2])
        linear = relaxed_attention.head_matrices(values[h // 2], keys[h // 2]) @ query[h]  # W q of the relaxed form
        np.testing.assert_allclose(softmaxed[h], exact, **EXACT)
        np.testing.assert_allclose(relaxed[h], linear, **EXACT)
        assert cosines[h] == pytest.approx(slow_cosine(linear, exact))
        assert ratios[h] == pytest.approx(np.linalg.norm(linear) / np.linalg.norm(exact))
    stacked = relaxed_attention.relaxed_heads(np.stack([logits, 2 * logits]), np.stack([values, values]), scaling)
    np.testing.assert_allclose(stacked, np.stack([relaxed, 2 * relaxed]), **EXACT)


def test_relaxation_of_degenerate_rows(rng):
    values = rng.normal(size=(2, 4, 3))
    cosines, ratios = relaxed_attention.relaxation_distance(
        np.full((2, 4), 0.7), values, 1.0
    )  # constant: the same direction
    np.testing.assert_allclose(cosines, 1)
    np.testing.assert_allclose(ratios, 0.7 * 4)
    cosines, ratios = relaxed_attention.relaxation_distance(np.zeros((2, 4)), values, 1.0)
    assert np.isnan(cosines).all() and not ratios.any()
    cosines, ratios = relaxed_attention.relaxation_distance(np.ones((2, 4)), np.zeros((2, 4, 3)), 1.0)
    assert np.isnan(cosines).all() and np.isnan(ratios).all()
    np.testing.assert_allclose(
        relaxed_attention.softmax_heads(rng.normal(size=(2, 1)), values[:, :1]), values[:, 0]
    )  # a single token


def test_what_attention_does_not_see_is_not_ranked():
    """-inf comes last, is never found among the largest, and nothing but -inf is nothing to rank."""
    icl = np.array([[-np.inf, -np.inf, 1.0, 3.0, 2.0, 0.0], [-np.inf] * 6])
    ft = np.array([6.0, 5.0, 1.0, 4.0, 3.0, 2.0])
    found = mt.training_attention(icl, ft, [2, 2, 2], True, k_tokens=2, k_examples=1)
    seen = np.array([0.0, 0.0, 1.0, 3.0, 2.0, 0.5]) + np.array([-9, -9, 0, 0, 0, 0])
    assert found.kendall[0] == pytest.approx(kendall_tau(seen, ft))
    assert found.recall[0] == pytest.approx((0 - 2 / 6) / (1 - 2 / 6))  # the two largest of ft are not seen
    np.testing.assert_allclose(mt.example_scores(icl, [2, 2, 2])[0, 1:], mt.example_scores(icl[0, 2:], [2, 2]))
    assert np.isneginf(mt.example_scores(icl, [2, 2, 2])).tolist() == [[True, False, False], [True] * 3]
    for value in (found.kendall, found.recall, found.kendall_example, found.recall_example):
        assert np.isnan(value[1]) and np.isfinite(value[0])
    paper = mt.training_attention(icl, ft, [2, 2, 2], False)
    assert np.isnan(paper.kendall[1]) and np.isfinite(paper.kendall[0])
