"""Against a loop without a cache, a full forward pass for each token."""

import functools

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.icl import engine
from momentum_lm.icl.engine import row_budget
from momentum_lm.icl.sampling import likeliest, sample

CONTEXTS = [[0, 9, 17, 30], [0], [0, *range(40, 75)], [0, 5, 5, 5, 8, 8]]
DECODERS = {
    "vanilla": {"momentum_kind": "none"},
    "ema": {},
    "ema_learned_rotary": {"momentum_learned": True, "position": "rotary"},
    "multi_ema_learned_positions": {"momentum_kind": "multi_ema", "position": "learned"},
}


def generate(lm, contexts, most, *given):
    found = list(engine.generate(lm, contexts, most, *given))
    assert sorted(number for number, _ in found) == list(range(len(contexts)))
    return [tokens for _, tokens in sorted(found)]


def never(tokens):
    return False


def plain(lm, context, most, ends=()):
    """Greedy, up to </s> or after a token of ``ends``; padding is no choice."""
    tokens = list(context)
    while len(tokens) < len(context) + most:
        with torch.no_grad():
            logits = lm.model(torch.tensor([tokens]))[0, -1]
        logits[1] = -torch.inf
        token = int(logits.argmax())
        if token == 2:
            break
        tokens.append(token)
        if token in ends:
            break
    return tokens[len(context) :]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_is_the_plain_loop_of_each(make_lm, decoder):
    lm = make_lm(**DECODERS[decoder])
    expected = [plain(lm, context, 20) for context in CONTEXTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert generate(lm, CONTEXTS, 20) == expected


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_contexts_begin_with_is_read_once(make_lm, decoder, monkeypatch):
    """Rows of unequal length, padded on the left, go on from it as they do from nothing."""
    lm = make_lm(**DECODERS[decoder])
    beginning = [0, *range(60, 100)]
    contexts = [[*beginning, *context[1:]] for context in CONTEXTS for _ in range(9)]
    seen, features = [], lm.model.features
    monkeypatch.setattr(
        lm.model, "features", lambda tokens, *a, **k: (seen.append(tuple(tokens.shape)), features(tokens, *a, **k))[1]
    )
    found = generate(lm, contexts, 10)
    assert seen[:2] == [(1, 40), (36, 36)]
    monkeypatch.undo()
    assert found == [plain(lm, context, 10) for context in contexts]


@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_end_by_themselves_and_the_others_go_on(make_lm, decoder):
    """At a token of which one says that it ends the text, and at </s>."""
    lm = make_lm(**DECODERS[decoder])
    for ends in ({token} for tokens in (plain(lm, context, 20) for context in CONTEXTS) for token in tokens[3:6]):
        expected = [plain(lm, context, 20, ends) for context in CONTEXTS]
        assert generate(lm, CONTEXTS, 20, lambda tokens, ends=ends: tokens[-1] in ends) == expected


def test_the_end_of_a_sentence_ends_the_text(lm):
    """A token that the greedy text holds is made to look like </s>."""
    first = plain(lm, CONTEXTS[0], 20)

    def choose(logits):
        tokens = likeliest(logits)
        return torch.where(tokens == first[4], 2, tokens)

    cut = first.index(first[4])
    assert generate(lm, CONTEXTS[:1], 20, never, choose) == [first[:cut]]
    assert generate(lm, CONTEXTS, 20, never, lambda logits: torch.full((len(logits),), 2)) == [[], [], [], []]


def test_no_more_than_asked(lm):
    assert generate(lm, CONTEXTS, 0) == [[], [], [], []]
    assert [len(tokens) for tokens in generate(lm, CONTEXTS, 1)] <= [1, 1, 1, 1]


def test_padding_is_never_written(make_lm):
    """Whatever logit it has: here the highest after each context."""
    lm = make_lm()
    with torch.no_grad():
        hidden = lm.model.features(torch.tensor([CONTEXTS[0]]))[0, -1]
        lm.model.output_projection.weight[1] = 100 * hidden
        assert lm.model(torch.tensor([CONTEXTS[0]]))[0, -1].argmax() == 1
    assert generate(lm, CONTEXTS, 20) == [plain(lm, context, 20) for context in CONTEXTS]
    torch.manual_seed(0)
    drawn = generate(lm, CONTEXTS[:1] * 50, 5, never, functools.partial(sample, temperature=5.0))
    assert len({tokens[0] for tokens in drawn}) > 20 and all(1 not in tokens for tokens in drawn)


def test_samples_have_the_model_s_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0])
    many = logits.expand(200_000, -1)
    for temperature in (0.5, 1.0, 3.0):
        found = torch.bincount(sample(many, temperature), minlength=5) / len(many)
        torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=5e-3, rtol=0)
    found = torch.bincount(sample(many, top_k=2), minlength=5) / len(many)
    torch.testing.assert_close(found[[0, 3]], logits[[0, 3]].softmax(0), atol=5e-3, rtol=0)
    assert found[[1, 2, 4]].sum() == 0
    shares = logits.softmax(0)  # 0.24, 0, 0.09, 0.64, 0.03
    found = torch.bincount(sample(many, top_p=0.7), minlength=5) / len(many)
    torch.testing.assert_close(found[[0, 3]], shares[[0, 3]] / shares[[0, 3]].sum(), atol=5e-3, rtol=0)
    assert found[[1, 2, 4]].sum() == 0
    assert set(sample(many[:100], top_p=0.01).tolist()) == {3} == set(sample(many[:100], top_k=1).tolist())


def test_a_seed_gives_the_same_samples(lm):
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(generate(lm, CONTEXTS, 12, never, functools.partial(sample, temperature=2.0)))
    assert runs[0] == runs[1] != runs[2]


def test_broken_weights_are_told(make_lm):
    lm = make_lm(layers=1)
    torch.nn.init.constant_(lm.model.layer_norm.bias, float("nan"))
    with pytest.raises(UserError, match=r"\.pt gives probabilities of 0 or NaN: its weights are broken"):
        generate(lm, CONTEXTS, 3)


def test_memory_bounds_the_rows(make_lm):
    assert (
        row_budget(make_lm(layers=1), 160)
        > row_budget(make_lm(layers=40), 160)
        > row_budget(make_lm(layers=40), 1600)
        >= 1
    )
    assert row_budget(make_lm(layers=1), 10**9) == 1
