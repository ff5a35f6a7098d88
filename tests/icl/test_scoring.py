"""Against full prompts, one at a time, without a cache."""

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.icl.prompts import PromptFormat, build
from momentum_lm.icl.scoring import _rows, collect, plan, score, token_budget
from momentum_lm.text.dictionary import EOS

FORM = PromptFormat((EOS,), (EOS,))
DECODERS = {
    "vanilla": {"momentum_kind": "none"},
    "ema": {},
    "ema_learned_rotary": {"momentum_learned": True, "position": "rotary"},
    "multi_ema_learned_positions": {"momentum_kind": "multi_ema", "position": "learned"},
}


def brute_force(lm, prompts):
    """(n, C) sums in float64, and counts."""
    sums, counts = [], []
    for query in prompts.queries:
        for request in query:
            tokens = torch.tensor([prompts.prefix + list(request.tokens)])
            with torch.no_grad():
                log_probs = lm.model(tokens[:, :-1])[0].double().log_softmax(-1)
            start = len(prompts.prefix) + request.start
            targets = tokens[0, start:]
            sums.append(log_probs[start - 1 :].gather(1, targets[:, None]).sum().item())
            counts.append(len(targets))
    return np.array(sums), np.array(counts)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("which", ["examples", "choices"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_scores_are_those_of_full_prompts(make_lm, decoder, which, batch_tokens, side, request):
    lm, questions = make_lm(**DECODERS[decoder]), request.getfixturevalue(which)
    prompts = build(lm, FORM, request.getfixturevalue("examples")[:3], questions)
    scores = collect(prompts, score(lm, prompts, plan(prompts, batch_tokens), side))
    sums, counts = brute_force(lm, prompts)
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
        tables.append(collect(prompts, score(lm, prompts, plan(prompts, 60))).sums)
    np.testing.assert_allclose(tables[1], tables[0][order], atol=1e-5)
    np.testing.assert_array_equal(tables[1].argmax(1), tables[0][order].argmax(1))


def test_labels_share_rows(lm, examples):
    """One row for the input covers every label of one token, and a longer label's row covers the labels that begin it."""
    query = build(lm, FORM, [], examples[:1]).queries[0]
    rows = _rows(query)
    assert sorted(c for row in rows for c in {choice for choice, _, _ in row.wanted}) == [0, 1, 2, 3]
    single = [request for request in query if len(request.tokens) - request.start == 1]
    assert len(single) > 1 and len(rows) <= len(query) - len(single) + 1
    for row in rows:
        for choice, position, target in row.wanted:
            assert query[choice].tokens[position + 1] == target and row.tokens[: position + 1] == query[choice].tokens[: position + 1]


def test_the_prefix_goes_through_the_model_once(lm, examples, monkeypatch):
    prompts = build(lm, FORM, examples[:3], examples)
    seen = []
    features = lm.model.features
    monkeypatch.setattr(lm.model, "features", lambda tokens, *a, **k: (seen.append(tuple(tokens.shape)), features(tokens, *a, **k))[1])
    score(lm, prompts, plan(prompts, 50))
    assert seen[0] == (1, len(prompts.prefix))
    assert max(shape[1] for shape in seen[1:]) == max(len(r.tokens) - 1 for q in prompts.queries for r in q)


def test_batches_keep_to_their_budget(lm, examples, choices):
    for some in (examples, choices):
        prompts = build(lm, FORM, [], some)
        for budget in (1, 30, 100):
            batches = plan(prompts, budget)
            assert sorted(query for batch in batches for query in batch) == list(range(len(some)))
            for batch in batches:
                rows = [row for query in batch for row in _rows(prompts.queries[query])]
                assert len(batch) == 1 or len(rows) * max(len(row.tokens) for row in rows) <= budget
    assert token_budget(lm, prompts) >= 1


def test_numbers_and_finished(lm, examples):
    prompts = build(lm, FORM, [], examples)
    batches = plan(prompts, 30)
    told = {}
    found = score(lm, prompts, batches, finished=told.__setitem__, numbers=[2, 0])
    assert list(told) == [2, 0] and set(found) == {*batches[0], *batches[2]}
    assert {query: sums for part in told.values() for query, sums in part.items()} == found


def test_memory_that_does_not_suffice_halves_the_batch(lm, examples, monkeypatch):
    prompts = build(lm, FORM, examples[:2], examples)
    expected = score(lm, prompts, plan(prompts, 10_000))
    log_probs = lm.log_probs

    def small(tokens, *rest):
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return log_probs(tokens, *rest)

    monkeypatch.setattr(lm, "log_probs", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = score(lm, prompts, plan(prompts, 10_000))
    for query, sums in expected.items():
        assert found[query] == pytest.approx(sums, abs=1e-5)


def test_a_broken_model_is_named(make_lm, examples):
    lm = make_lm()
    lm.model.layer_norm.weight[0] = float("nan")
    prompts = build(lm, FORM, [], examples)
    with pytest.raises(UserError, match=r"model\d+.pt gives probabilities of 0 or NaN"):
        score(lm, prompts, plan(prompts, 100))


def test_half_precision_agrees_to_its_rounding(make_lm, examples):
    lm, half = make_lm(), make_lm()
    half.model.to(torch.bfloat16)
    tables = []
    for model in (lm, half):
        prompts = build(model, FORM, examples[:3], examples)
        tables.append(collect(prompts, score(model, prompts, plan(prompts, 100))).values("mean"))
    assert half.dtype == torch.bfloat16
    assert 0 < np.abs(tables[0] - tables[1]).max() < 0.6
