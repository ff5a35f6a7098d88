"""Against full prompts, one at a time."""

import functools
import itertools
import random
from array import array

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.harness.scoring import batches, score
from momentum_lm.icl.prompts import Request

DECODERS = {
    "vanilla": {"momentum_kind": "none"},
    "ema": {},
    "ema_learned_rotary": {"momentum_learned": True, "position": "rotary"},
    "multi_ema_learned_positions": {"momentum_kind": "multi_ema", "position": "learned"},
}


def draw(rng, vocab, count):
    return [rng.randrange(4, vocab) for _ in range(count)]


@pytest.fixture(scope="module")
def requests(lm):
    """Long and short beginnings in common, rows that begin others, choices of a context, repetitions, lone requests; in no order."""
    rng = random.Random(0)
    new = functools.partial(draw, rng, lm.vocab_size)
    found = []
    for beginning, contexts in ((new(90), 6), (new(70), 5), (new(8), 3), ([], 4)):
        for _ in range(contexts):
            context = [0, *beginning, *new(rng.randrange(1, 12))]
            first = new(3)
            choices = [first, first[:1], first[:2], new(1), new(1), new(4)]
            found += [Request(array("i", context + choice), len(context)) for choice in choices]
    found += [found[3], Request(array("i", [0, 7]), 1), Request(array("i", [0, *new(80)]), 1)]
    rng.shuffle(found)
    return found


def brute_force(lm, request):
    """(log-probability in float64, whether each token is the likeliest but for padding)."""
    tokens = torch.tensor([list(request.tokens)])
    with torch.no_grad():
        logits = lm.model(tokens[:, :-1])[0, request.start - 1 :]
    targets = tokens[0, request.start :]
    total = logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
    logits[:, 1] = -torch.inf
    return total, bool((logits.argmax(1) == targets).all())


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
    np.testing.assert_allclose([answers[n][0] for n in range(len(requests))], [total for total, _ in expected], atol=1e-4)
    assert [answers[n][1] for n in range(len(requests))] == [same for _, same in expected]


@pytest.mark.parametrize("decoder", DECODERS)
def test_only_what_the_model_would_write_is_greedy(make_lm, requests, decoder):
    lm = make_lm(**DECODERS[decoder])
    asked, expected = [], []
    for request in requests[:12]:
        context = request.tokens[: request.start]
        tokens = greedy(lm, context, 3)
        for spoiled in (None, -3, -2, -1):
            changed = list(tokens)
            if spoiled is not None:
                changed[spoiled] = 5 if tokens[spoiled] != 5 else 6
            asked.append(Request(array("i", changed), request.start))
            expected.append(spoiled is None)
    assert [answer for _, (_, answer) in sorted(score(lm, asked))] == expected


def test_what_many_begin_with_goes_through_the_model_once(lm, monkeypatch):
    rng = random.Random(1)
    beginnings = [[0, *draw(rng, lm.vocab_size, 99)] for _ in range(3)]
    requests = [Request(array("i", beginning + draw(rng, lm.vocab_size, 6)), 105) for beginning in beginnings for _ in range(20)]
    rng.shuffle(requests)
    seen = []
    features = lm.model.features
    monkeypatch.setattr(lm.model, "features", lambda tokens, *a, **k: (seen.append(tokens.numel()), features(tokens, *a, **k))[1])
    answers = dict(score(lm, requests))
    assert sum(seen) == 3 * 100 + 60 * 5
    monkeypatch.undo()
    np.testing.assert_allclose([answers[n][0] for n in range(60)], [brute_force(lm, request)[0] for request in requests], atol=1e-4)


def test_choices_of_one_token_share_a_row(lm, monkeypatch):
    context = [0, 9, 8, 7, 6]
    requests = [Request(array("i", [*context, token]), 5) for token in range(4, 44)]
    seen = []
    features = lm.model.features
    monkeypatch.setattr(lm.model, "features", lambda tokens, *a, **k: (seen.append(tuple(tokens.shape)), features(tokens, *a, **k))[1])
    answers = dict(score(lm, requests))
    assert seen == [(1, 5)] and len(answers) == 40


def test_nothing_asked_is_nothing_answered(lm):
    assert list(score(lm, [])) == []


def test_broken_weights_are_told(make_lm):
    lm = make_lm(layers=1)
    torch.nn.init.constant_(lm.model.layer_norm.weight, float("nan"))
    with pytest.raises(UserError, match="gives probabilities of 0 or NaN"):
        list(score(lm, [Request(array("i", [0, 5, 6]), 1)]))


@pytest.mark.parametrize(("budget", "most"), [(1, None), (10, None), (10, 2), (1000, 3), (1000, None)])
def test_batches_keep_to_their_limits(budget, most):
    lengths = [3, 1, 9, 4, 4, 12, 2, 1]
    found = list(batches(range(8), lengths.__getitem__, budget, most))
    assert sorted(itertools.chain(*found)) == list(range(8))
    order = [lengths[i] for i in itertools.chain(*found)]
    assert order == sorted(lengths, reverse=True)
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
        assert most is None or len(batch) <= most
    assert budget < 1000 or len(found) == (1 if most is None else 3)
