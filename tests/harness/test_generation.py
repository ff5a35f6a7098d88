"""Against a loop without a cache, a full forward pass for each token."""

import functools

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.harness.generation import generate, likeliest, row_budget, sample

CONTEXTS = [[0, 9, 17, 30], [0], [0, *range(40, 75)], [0, 5, 5, 5, 8, 8]]
DECODERS = {
    "vanilla": {"momentum_kind": "none"},
    "ema": {},
    "ema_learned_rotary": {"momentum_learned": True, "position": "rotary"},
    "multi_ema_learned_positions": {"momentum_kind": "multi_ema", "position": "learned"},
}
GREEDY = functools.partial(likeliest, padding_idx=1)


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
    assert generate(lm, CONTEXTS, 20, GREEDY, lambda tokens: False) == expected


@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_end_by_themselves_and_the_others_go_on(make_lm, decoder):
    """At a token of which one says that it ends the text, and at </s>."""
    lm = make_lm(**DECODERS[decoder])
    for ends in ({token} for tokens in (plain(lm, context, 20) for context in CONTEXTS) for token in tokens[3:6]):
        expected = [plain(lm, context, 20, ends) for context in CONTEXTS]
        assert generate(lm, CONTEXTS, 20, GREEDY, lambda tokens, ends=ends: tokens[-1] in ends) == expected


def test_the_end_of_a_sentence_ends_the_text(lm):
    """A token that the greedy text holds is made to look like </s>."""
    first = plain(lm, CONTEXTS[0], 20)

    def choose(logits):
        tokens = GREEDY(logits)
        return torch.where(tokens == first[4], 2, tokens)

    cut = first.index(first[4])
    assert generate(lm, CONTEXTS[:1], 20, choose, lambda tokens: False) == [first[:cut]]
    assert generate(lm, CONTEXTS, 20, lambda logits: torch.full((len(logits),), 2), lambda tokens: False) == [[], [], [], []]


def test_no_more_than_asked(lm):
    assert generate(lm, CONTEXTS, 0, GREEDY, lambda tokens: False) == [[], [], [], []]
    assert [len(tokens) for tokens in generate(lm, CONTEXTS, 1, GREEDY, lambda tokens: False)] <= [1, 1, 1, 1]


def test_padding_is_never_written():
    logits = torch.tensor([[0.0, 9.0, 1.0, 2.0], [5.0, 6.0, 1.0, 2.0]])
    assert likeliest(logits, 1).tolist() == [3, 0]
    torch.manual_seed(0)
    assert set(sample(logits[:1].expand(500, -1), 1).tolist()) == {0, 2, 3}
    assert logits[0, 1] == 9.0  # the caller's own


def test_samples_have_the_model_s_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0])
    many = logits.expand(200_000, -1)
    for temperature in (0.5, 1.0, 3.0):
        found = torch.bincount(sample(many, 1, temperature), minlength=5) / len(many)
        torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=5e-3, rtol=0)
    found = torch.bincount(sample(many, 1, top_k=2), minlength=5) / len(many)
    torch.testing.assert_close(found[[0, 3]], logits[[0, 3]].softmax(0), atol=5e-3, rtol=0)
    assert found[[1, 2, 4]].sum() == 0
    shares = logits.softmax(0)  # 0.24, 0, 0.09, 0.64, 0.03
    found = torch.bincount(sample(many, 1, top_p=0.7), minlength=5) / len(many)
    torch.testing.assert_close(found[[0, 3]], shares[[0, 3]] / shares[[0, 3]].sum(), atol=5e-3, rtol=0)
    assert found[[1, 2, 4]].sum() == 0
    assert set(sample(many[:100], 1, top_p=0.01).tolist()) == {3} == set(sample(many[:100], 1, top_k=1).tolist())


def test_a_seed_gives_the_same_samples(lm):
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(generate(lm, CONTEXTS, 12, functools.partial(sample, padding_idx=1, temperature=2.0), lambda tokens: False))
    assert runs[0] == runs[1] != runs[2]


def test_broken_weights_are_told(make_lm):
    lm = make_lm(layers=1)
    torch.nn.init.constant_(lm.model.layer_norm.bias, float("nan"))
    with pytest.raises(UserError, match=r"\.pt gives NaN: its weights are broken"):
        generate(lm, CONTEXTS, 3, GREEDY, lambda tokens: False)


def test_memory_bounds_the_rows(make_lm):
    assert row_budget(make_lm(layers=1), 160) > row_budget(make_lm(layers=40), 160) > row_budget(make_lm(layers=40), 1600) >= 1
    assert row_budget(make_lm(layers=1), 10**9) == 1
