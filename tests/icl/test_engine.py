"""Against full prompts, one at a time, without a cache: queries in batches, and any requests in no order."""

import functools
import itertools
import random
from array import array

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.icl.engine import (
    Request,
    Rows,
    _rows,
    batches,
    collect,
    log_probs,
    plan,
    query_budget,
    score,
    score_batches,
)
from momentum_lm.icl.prompts import PromptFormat, build
from momentum_lm.text.dictionary import EOS

FORM = PromptFormat((EOS,), (EOS,))
DECODERS = {
    "vanilla": {"momentum_kind": "none"},
    "ema": {},
    "ema_learned_rotary": {"momentum_learned": True, "position": "rotary"},
    "multi_ema_learned_positions": {"momentum_kind": "multi_ema", "position": "learned"},
}


def brute_force(lm, request):
    """(log-probability in float64, whether each token is the likeliest but for padding)."""
    tokens = torch.tensor([list(request.tokens)])
    with torch.no_grad():
        logits = lm.model(tokens[:, :-1])[0, len(request.context) - 1 :]
    targets = tokens[0, len(request.context) :]
    total = logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
    logits[:, 1] = -torch.inf
    return total, bool((logits.argmax(1) == targets).all())


def sums_of(lm, prompts, budget, side="right"):
    """{query: log-probability of each choice}."""
    sums = {}
    for _, answers in score_batches(lm, prompts.queries, plan(prompts.queries, budget), side):
        sums |= log_probs(answers)
    return sums


def scores_of(*given):
    return collect(given[1].queries, sums_of(*given))


@pytest.fixture
def shapes(lm, monkeypatch):
    """Those of all tokens that go through the model."""
    seen, features = [], lm.model.features
    monkeypatch.setattr(
        lm.model, "features", lambda tokens, *a, **k: (seen.append(tuple(tokens.shape)), features(tokens, *a, **k))[1]
    )
    return seen


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("which", ["examples", "choices"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_scores_are_those_of_full_prompts(make_lm, decoder, which, batch_tokens, side, request):
    lm, questions = make_lm(**DECODERS[decoder]), request.getfixturevalue(which)
    prompts = build(lm, FORM, request.getfixturevalue("examples")[:3], questions)
    scores = scores_of(lm, prompts, batch_tokens, side)
    sums = np.array([brute_force(lm, request)[0] for query in prompts.queries for request in query])
    counts = np.array([len(request.continuation) for query in prompts.queries for request in query])
    there = scores.counts > 0
    np.testing.assert_allclose(scores.sums[there], sums, atol=1e-4)
    np.testing.assert_array_equal(scores.counts[there], counts)
    assert np.isnan(scores.sums[~there]).all() and scores.sums.shape[1] == max(len(q.continuations) for q in questions)
    np.testing.assert_allclose(scores.values("mean")[there], sums / counts, atol=1e-4)
    np.testing.assert_array_equal(scores.values("sum"), scores.sums)


def test_order_of_queries_changes_nothing(lm, examples):
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    tables = []
    for some in (examples, [examples[i] for i in order]):
        prompts = build(lm, FORM, examples[:3], some)
        tables.append(scores_of(lm, prompts, 60).sums)
    np.testing.assert_allclose(tables[1], tables[0][order], atol=1e-5)
    np.testing.assert_array_equal(tables[1].argmax(1), tables[0][order].argmax(1))


def test_labels_share_rows(lm, examples):
    """One row for the input covers every label of one token, and a longer label's row covers the labels
    that begin it.
    """
    query = build(lm, FORM, [], examples[:1]).queries[0]
    rows = _rows(query)
    assert sorted(choice for _, numbers in rows for choice in numbers) == [0, 1, 2, 3]
    single = [request for request in query if len(request.continuation) == 1]
    assert len(single) > 1 and len(rows) <= len(query) - len(single) + 1
    for row, numbers in rows:
        assert all(row[: len(query[choice].tokens) - 1] == query[choice].tokens[:-1] for choice in numbers)
    (first, numbers), *others = _rows(query[1:], whole_first=True)
    assert first == query[1].tokens and 0 in numbers and len(others) == len(_rows(query[1:])) - (len(numbers) > 1)


def test_rows_hold_each_target_where_it_is_predicted(lm, examples):
    """Of whole prompts and after what they share, padded on either side, with first choices whole and in
    front or not.
    """
    queries = build(lm, FORM, examples[:2], examples).queries[:4]
    for shared, side, whole_first in itertools.product((0, 7), ("left", "right"), (False, True)):
        rows = Rows(queries, shared, side, whole_first)
        assert len(rows.targets) == sum(len(request.continuation) for query in queries for request in query)
        shown = [row[~pad].tolist() for row, pad in zip(rows.tokens, rows.padding, strict=True)]
        if whole_first:
            assert shown[:4] == [list(query[0].tokens[shared:]) for query in queries]
        told = set()
        for row, column, target in zip(rows.rows.tolist(), rows.positions.tolist(), rows.targets.tolist(), strict=True):
            before = rows.tokens[row, : column + 1][~rows.padding[row, : column + 1]].tolist()
            told.add((*before, target))
        assert told == {
            tuple(request.tokens[shared:end])
            for query in queries
            for request in query
            for end in range(len(request.context) + 1, len(request.tokens) + 1)
        }


def test_the_prefix_goes_through_the_model_once(lm, examples, shapes):
    prompts = build(lm, FORM, examples[:3], examples)
    sums_of(lm, prompts, 50)
    assert shapes[0] == (1, prompts.shared) and prompts.shared > 20
    assert (
        max(shape[1] for shape in shapes[1:]) == max(len(r.read) for q in prompts.queries for r in q) - prompts.shared
    )


def test_batches_keep_to_their_budget(lm, examples, choices):
    for some in (examples, choices):
        prompts = build(lm, FORM, [], some)
        for budget, share in itertools.product((1, 30, 100), ({}, {"worth": 10}, {"share": False})):
            planned = plan(prompts.queries, budget, **share)
            assert sorted(query for batch in planned for query in batch.queries) == list(range(len(some)))
            for batch in planned:
                assert batch.shared == (prompts.shared if not share else 0) or "worth" in share
                rows = [row for query in batch.queries for row, _ in _rows(prompts.queries[query])]
                assert len(batch.queries) == 1 or len(rows) * (max(map(len, rows)) - batch.shared) <= budget
    assert query_budget(lm, prompts.queries) >= 1 and plan([], 10) == []


def test_batches_by_number(lm, examples):
    queries = build(lm, FORM, [], examples).queries
    planned = plan(queries, 30)
    found = list(score_batches(lm, queries, planned, numbers=[2, 0]))
    assert [number for number, _ in found] == [2, 0]
    assert [list(answers) for _, answers in found] == [planned[2].queries, planned[0].queries]
    whole = dict(score_batches(lm, queries, planned))
    assert all(whole[number] == answers for number, answers in found)


def test_memory_that_does_not_suffice_halves_the_batch(lm, examples, monkeypatch):
    prompts = build(lm, FORM, examples[:2], examples)
    expected = sums_of(lm, prompts, 10_000)
    log_probs = lm.log_probs

    def small(tokens, *rest):
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return log_probs(tokens, *rest)

    monkeypatch.setattr(lm, "log_probs", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = sums_of(lm, prompts, 10_000)
    for query, sums in expected.items():
        assert found[query] == pytest.approx(sums, abs=1e-5)


def test_a_broken_model_is_named(make_lm, examples):
    lm = make_lm()
    lm.model.layer_norm.weight[0] = float("nan")
    prompts = build(lm, FORM, [], examples)
    with pytest.raises(UserError, match=r"model\d+.pt gives probabilities of 0 or NaN"):
        sums_of(lm, prompts, 100)


def test_half_precision_agrees_to_its_rounding(make_lm, examples):
    lm, half = make_lm(), make_lm()
    half.model.to(torch.bfloat16)
    tables = []
    for model in (lm, half):
        prompts = build(model, FORM, examples[:3], examples)
        tables.append(scores_of(model, prompts, 100).values("mean"))
    assert half.dtype == torch.bfloat16
    assert 0 < np.abs(tables[0] - tables[1]).max() < 0.6


# Any requests


def draw(rng, vocab, count):
    return [rng.randrange(4, vocab) for _ in range(count)]


@pytest.fixture(scope="module")
def requests(lm):
    """Long and short beginnings in common, rows that begin others, choices of a context, repetitions, lone requests; in
    no order.
    """
    rng = random.Random(0)
    new = functools.partial(draw, rng, lm.vocab_size)
    found = []
    for beginning, contexts in ((new(90), 6), (new(70), 5), (new(8), 3), ([], 4)):
        for _ in range(contexts):
            context = [0, *beginning, *new(rng.randrange(1, 12))]
            first = new(3)
            choices = [first, first[:1], first[:2], new(1), new(1), new(4)]
            found += [Request(array("i", context), array("i", choice)) for choice in choices]
    found += [found[3], Request(array("i", [0]), array("i", [7])), Request(array("i", [0]), array("i", new(80)))]
    rng.shuffle(found)
    return found


def greedy(lm, context, count):
    tokens = list(context)
    for _ in range(count):
        with torch.no_grad():
            logits = lm.model(torch.tensor([tokens]))[0, -1]
        logits[1] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize("most", [1, 4, None])
@pytest.mark.parametrize("decoder", DECODERS)
def test_answers_are_those_of_full_prompts(make_lm, requests, decoder, most):
    lm = make_lm(**DECODERS[decoder])
    found = list(score(lm, requests, most))
    answers = dict(found)
    assert len(found) == len(requests) and sorted(answers) == list(range(len(requests)))
    expected = [brute_force(lm, request) for request in requests]
    np.testing.assert_allclose(
        [answers[n][0] for n in range(len(requests))], [total for total, _ in expected], atol=1e-4
    )
    assert [answers[n][1] for n in range(len(requests))] == [same for _, same in expected]


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_what_the_model_would_write_is_greedy(make_lm, requests, decoder):
    lm = make_lm(**DECODERS[decoder])
    changed_requests, expected = [], []
    for request in requests[:12]:
        tokens = greedy(lm, request.context, 3)
        for spoiled in (None, -3, -2, -1):
            changed = list(tokens)
            if spoiled is not None:
                changed[spoiled] = 5 if tokens[spoiled] != 5 else 6
            changed_requests.append(Request(request.context, array("i", changed[len(request.context) :])))
            expected.append(spoiled is None)
    assert [answer for _, (_, answer) in sorted(score(lm, changed_requests))] == expected


def test_what_many_begin_with_goes_through_the_model_once(lm, shapes, monkeypatch):
    rng = random.Random(1)
    beginnings = [[0, *draw(rng, lm.vocab_size, 99)] for _ in range(3)]
    requests = [
        Request(array("i", beginning + draw(rng, lm.vocab_size, 5)), array("i", draw(rng, lm.vocab_size, 1)))
        for beginning in beginnings
        for _ in range(20)
    ]
    rng.shuffle(requests)
    answers = dict(score(lm, requests))
    assert sum(rows * length for rows, length in shapes) == 3 * 100 + 60 * 5
    monkeypatch.undo()
    np.testing.assert_allclose(
        [answers[n][0] for n in range(60)], [brute_force(lm, request)[0] for request in requests], atol=1e-4
    )


def test_choices_of_one_token_share_a_row(lm, shapes):
    requests = [Request(array("i", [0, 9, 8, 7, 6]), array("i", [token])) for token in range(4, 44)]
    answers = dict(score(lm, requests))
    assert shapes == [(1, 5)] and len(answers) == 40


def test_nothing_asked_is_nothing_answered(lm):
    assert list(score(lm, [])) == []


def test_broken_weights_are_told(make_lm):
    lm = make_lm(layers=1)
    torch.nn.init.constant_(lm.model.layer_norm.weight, float("nan"))
    with pytest.raises(UserError, match="gives probabilities of 0 or NaN"):
        list(score(lm, [Request(array("i", [0]), array("i", [5, 6]))]))


@pytest.mark.parametrize(("budget", "most"), [(1, None), (10, None), (10, 2), (1000, 3), (1000, None)])
def test_batches_keep_to_their_limits(budget, most):
    lengths = [3, 1, 9, 4, 4, 12, 2, 1]
    found = batches([(1, length) for length in lengths], budget, most)
    assert sorted(itertools.chain(*found)) == list(range(8))
    order = [lengths[i] for i in itertools.chain(*found)]
    assert order == sorted(lengths, reverse=True)
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
        assert most is None or len(batch) <= most
    assert budget < 1000 or len(found) == (1 if most is None else 3)
