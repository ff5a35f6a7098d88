"""The evaluation that a training run makes of itself: the same numbers as the study's, and no trace in the model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.icl import engine
from momentum_lm.icl.datasets.loading import load_dataset
from momentum_lm.lm.native import NativeLM
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.studies.classification import Questions, Settings, Unit

momentum_lm.register()

from momentum_lm.fairseq_plugin.tasks.icl_evaluation import IclEvaluation  # noqa: E402

WORDS = "a film that is good and long bad the plot thin actors very indeed dull nobody should see this".split()
FLAGS = {
    "datasets": "mr",
    "interval": 5,
    "shots": "0,2",
    "seeds": "1,2",
    "limit": 20,
    "sampling": "balanced",
    "max_field_tokens": None,
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    (folder / "mr").mkdir()
    draw = random.Random(0)
    for split, count in (("train", 10), ("validation", 30)):
        made = [{"text": " ".join(draw.choices(WORDS, k=draw.randrange(2, 8))), "label": i % 2} for i in range(count)]
        (folder / "mr" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


class Model(torch.nn.Module):
    """What fairseq trains has a decoder."""

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        shape = {
            "dim": 32,
            "ffn_dim": 48,
            "layers": 2,
            "heads": 4,
            "max_positions": 200,
            "dropout": 0.5,
            "attention_dropout": 0.5,
        }
        self.decoder = Decoder(
            DecoderConfig(336, **{**shape, "momentum_kind": "ema", "momentum_learned": True, **changes})
        )


@pytest.fixture
def make(films, tokenizer_folder):
    def build(model, **changes):
        flags = {f"icl_eval_{name}": value for name, value in {**FLAGS, "data_dir": str(films), **changes}.items()}
        others = {
            "data": str(tokenizer_folder),
            "add_bos_token": True,
            "ddp_backend": "pytorch_ddp",
            "tokens_per_sample": 200,
        }
        return IclEvaluation(model, OmegaConf.create({**others, "max_tokens": None, "batch_size": 2, **flags}))

    return build


def test_numbers_are_those_of_the_study(make, films, tokenizer_folder):
    model = Model()
    values = make(model)()
    assert values.keys() == {"icl_mr_0shot", "icl_mr_0shot_n", "icl_mr_2shot", "icl_mr_2shot_n"}
    assert values["icl_mr_0shot_n"] == 20 and values["icl_mr_2shot_n"] == 40
    lm = NativeLM(model.decoder, Path("it"), tokenizer_path=tokenizer_folder)
    settings = Settings(sampling="balanced", limit=20)
    questions = Questions(lm, load_dataset("mr", films), settings)
    right = []
    for seed in (1, 2):
        prompts = questions.prompts(settings.form(lm), Unit("mr", 2, seed, 0))[1]
        alone = [engine.Batch([i], prompts.shared) for i in range(len(prompts.queries))]
        answers = {
            query: found
            for _, part in engine.score_batches(lm, prompts.queries, alone)
            for query, found in part.items()
        }
        scores = engine.collect(prompts.queries, engine.log_probs(answers)).values("mean")
        right += [scores[i].argmax() == example.gold for i, example in enumerate(questions.examples)]
    assert values["icl_mr_2shot"] == sum(right) / 40
    assert 0 < values["icl_mr_2shot"] < 1


def test_the_model_and_the_generators_are_left_as_they_were(make):
    model = Model()
    evaluation = make(model)
    model.train()
    model.decoder.layers[1].eval()
    model.decoder.layer_norm.weight.requires_grad_(False)
    tokens = torch.randint(4, 336, (2, 16))
    model.decoder.loss(tokens, tokens).backward()

    def state():
        return (
            [m.training for m in model.modules()],
            [
                (p.requires_grad, p.is_inference(), None if p.grad is None else p.grad.tolist(), p.tolist())
                for p in model.parameters()
            ],
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        )

    before = state()
    first = evaluation()
    assert state() == before and evaluation() == first
    model.decoder.loss(tokens, tokens).backward()  # nothing that evaluation made is in the way


def test_an_interrupted_evaluation_leaves_training_mode(make, monkeypatch):
    model = Model().train()
    evaluation = make(model)
    monkeypatch.setattr(engine, "score_batches", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation()
    assert all(m.training for m in model.modules())


def test_a_broken_model_gets_nan(make, caplog):
    model = Model()
    evaluation = make(model)
    with torch.no_grad():
        model.decoder.layer_norm.weight[0] = torch.nan
    values = evaluation()
    assert np.isnan(values["icl_mr_0shot"]) and np.isnan(values["icl_mr_2shot"]) and values["icl_mr_2shot_n"] == 40
    assert "NaN" in caplog.text


def test_due_at_multiples_of_the_interval(make):
    evaluation = make(Model(), interval=3)
    assert [update for update in range(1, 10) if evaluation.due(update)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"datasets": "mr,nothing"}, {}, ["--icl-eval-datasets", "nothing"]),
        ({"data_dir": "/nowhere"}, {}, ["--icl-eval-data-dir /nowhere"]),
        ({"interval": 0}, {}, ["--icl-eval-interval 0"]),
        ({"limit": 0}, {}, ["--icl-eval-limit 0"]),
        ({"shots": "two"}, {}, ["--icl-eval-shots two"]),
        ({"shots": "11"}, {}, ["--icl-eval-shots", "10 examples"]),
        ({"seeds": "-1"}, {}, ["--icl-eval-seeds -1"]),
        ({}, {"max_positions": 8}, ["mr", "8", "--icl-eval-max-field-tokens"]),
    ],
)
def test_what_cannot_be_asked_is_said_at_once(changes, model, words, make):
    with pytest.raises(UserError) as caught:
        make(Model(**model), **changes)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_other_models_sharded_weights_and_missing_tokenizers_are_refused(films, tmp_path):
    flags = {f"icl_eval_{name}": value for name, value in {**FLAGS, "data_dir": str(films)}.items()}
    args = OmegaConf.create({"data": str(tmp_path), "add_bos_token": False, "ddp_backend": "fully_sharded", **flags})
    with pytest.raises(UserError, match="--arch"):
        IclEvaluation(torch.nn.Linear(1, 1), args)
    with pytest.raises(UserError, match="--ddp-backend"):
        IclEvaluation(Model(), args)
    args.ddp_backend = "pytorch_ddp"
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        IclEvaluation(Model(), args)
