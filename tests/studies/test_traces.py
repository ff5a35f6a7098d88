"""Scores and traces of a batch against single passes; alignment; dW_FT against the slow float64 reference."""

import numpy as np
import pytest
import torch
from relaxed_attention import Projections, finetuning_matrices, head_matrices, weight_similarity

from momentum_lm.icl.engine import Batch, log_probs, score_batches
from momentum_lm.icl.finetuning import Lesson
from momentum_lm.icl.prompts import PromptFormat, build
from momentum_lm.lm.tracing import AttentionTrace, tracing
from momentum_lm.studies.traces import (
    Learned,
    align,
    common_suffix,
    demonstration_matrices,
    finetuning_similarity,
    trace_queries,
)

FORM = PromptFormat((0,), (2,))


def test_scores_are_those_of_classification(lm, examples, choices):
    for some in (examples, choices):
        prompts = build(lm, FORM, some[:2], some)
        queries = dict(enumerate(prompts.queries))
        ((_, answers),) = score_batches(lm, prompts.queries, [Batch(list(queries), prompts.shared)])
        expected = log_probs(answers)
        shared = prompts.shared, lm.start(prompts.queries[0][0].context[: prompts.shared])
        for given in (shared, ()):
            found = trace_queries(lm, queries, *given).sums
            for query in queries:
                np.testing.assert_allclose(found[query], expected[query], atol=1e-4)


def test_both_positions_of_a_batch(lm, examples):
    prompts = build(lm, FORM, examples[:2], examples)
    state = lm.start(prompts.queries[0][0].context[: prompts.shared])
    seen = trace_queries(lm, {i: prompts.queries[i] for i in (5, 1, 3)}, prompts.shared, state)
    for i, query in enumerate([5, 1, 3]):
        request = prompts.queries[query][0]
        tokens = list(request.tokens)
        columns = [len(tokens) - 1, len(request.context) - 1]  # the choice's last token, and the one that predicts it
        alone = AttentionTrace(torch.tensor([columns]))
        with torch.no_grad(), tracing(lm.model, alone):
            lm.model(torch.tensor([tokens]))
        for layer in range(2):
            np.testing.assert_allclose(seen.outputs[layer, i], alone.outputs[layer][0], atol=1e-3)
            np.testing.assert_allclose(seen.queries[layer, i], alone.queries[layer][0], atol=1e-3)
            for p, column in enumerate(columns):
                both = seen.logits[layer][i, p, :, : column + 1], alone.logits[layer][0, p, :, : column + 1]
                np.testing.assert_allclose(*both, atol=1e-3)


def test_alignment():
    lessons = [[5, 6, 7], [6, 7], [9, 8]]
    aligned = align([0, 5, 6, 7, 2, 6, 7, 2, 9, 8, 2, 5], lessons, 1)
    assert aligned.context.tolist() == [1, 2, 3, 5, 6, 8, 9] and aligned.lengths == [3, 2, 2]
    joined = align([0, 5, 6, 77, 6, 7, 2, 9, 8, 2], lessons, 1)  # a tokenizer that joins 7 with what follows
    assert joined.context.tolist() == [1, 2, 4, 5, 7, 8] and joined.kept[0] == slice(0, 2)
    assert align([0, 50, 60, 70, 2, 6, 7], lessons, 1) is None
    assert common_suffix([1, 2, 3], [9, 2, 3]) == 2 and common_suffix([1], [2]) == 0 and common_suffix([2, 3], [3]) == 1


@pytest.fixture
def learned(lm):
    return Learned(lm, [Lesson([0, 50, 60, 70, 80]), Lesson([0, 70, 90, 40])], 0.2, "kv")


def test_weights_change_places(lm, learned):
    tokens = torch.tensor([[0, 50, 60, 70]])
    before, weight = lm.model(tokens), lm.model.layers[0].self_attn.k_proj.weight.clone()
    with learned.applied():
        assert not torch.equal(lm.model(tokens), before)
    with pytest.raises(IndexError), learned.applied():
        lm.model(torch.tensor([[10**6]]))
    assert torch.equal(lm.model.layers[0].self_attn.k_proj.weight, weight) and torch.equal(lm.model(tokens), before)


def test_similarity_of_weight_updates(lm, learned):
    context = [0, 50, 60, 70, 80, 2, 70, 90, 40, 2]
    matrices, dealt = demonstration_matrices(lm, context, 1, 4, [1])
    assert matrices.shape == dealt.shape == (2, 4, 8, 8) and not np.allclose(matrices, dealt)
    rows, spans = torch.tensor([[0, 33, 44, 55, 66], [0, 71, 81, 1, 1]]), [(1, 5), (1, 3)]
    trace, shown = (AttentionTrace(torch.tensor([[1]]), projections=True) for _ in range(2))
    with torch.no_grad(), tracing(lm.model, trace):
        lm.model(rows)
    with torch.no_grad(), tracing(lm.model, shown):
        lm.model(torch.tensor([context]))
    found = finetuning_similarity(trace, learned.update(lm.model), matrices, spans)
    assert found.shape == (2, 2, 4)
    for layer, block in enumerate(lm.model.layers):
        before = projections(block)
        with learned.applied():
            after = projections(block)
        keys, values = (
            x[layer][0, 1:].unflatten(-1, (4, 8)).transpose(0, 1).numpy() for x in (shown.keys, shown.values)
        )
        icl = head_matrices(values, keys)
        np.testing.assert_allclose(matrices[layer], icl, rtol=1e-3, atol=1e-3)
        for i, (first, end) in enumerate(spans):
            ft = finetuning_matrices(trace.inputs[layer][i, first:end].numpy(), before, after)
            np.testing.assert_allclose(found[i, layer], weight_similarity(icl, ft), atol=1e-4)


def projections(block):
    k, v = block.self_attn.k_proj, block.self_attn.v_proj
    return Projections(*(x.detach().double().numpy().copy() for x in (v.weight, k.weight, v.bias, k.bias)), 4)
