"""Against what the authors' code computed for the same model and data (tests/golden), and on small random models."""

import dataclasses
import gzip
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.loading import Example, LabelledDataset, load_dataset
from momentum_lm.lm.native import load_native
from momentum_lm.results.records import read_results
from momentum_lm.studies import classification
from momentum_lm.studies import icl_vs_finetuning as study
from momentum_lm.studies.icl_vs_finetuning import Settings, analyse
from momentum_lm.text.dictionary import BOS

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = {
    "kendall": "kendall_token", "recall_at_k": "recall_at_k_token", "kendall_example": "kendall_example",
    "recall_at_k_example": "recall_at_k_example", "simaou": "simaou", "simam": "simam", "simam_before": "simam_before",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    for name in ("model.pt", "dict.txt"):
        shutil.copy(GOLDEN / name, folder)
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def run(lm, datasets, settings, folder, **more):
    analyse(lm, datasets, settings, folder, show_progress=False, **more)
    return read_results(folder)


def digest(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


@pytest.mark.parametrize("dataset", ["mr", "agnews"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_authors_numbers(golden_model, tmp_path, dataset, seed):
    expected = json.loads((GOLDEN / f"{dataset}_seed{seed}.json").read_text())
    lm = load_native(golden_model, {"decoder_attention_heads": 4})
    prompt_settings = classification.Settings(shots=(expected["shots"],), seeds=(seed,), protocol="paper", bos=(BOS,))
    settings = Settings(prompt_settings, rates=(expected["finetune_lr"],), controls=())
    data = load_dataset(dataset, str(GOLDEN), "code")
    (found,) = run(lm, [data], settings, tmp_path)["runs"]
    for setting, predictions in expected["predictions"].items():
        assert [line["pred"] for line in lines(tmp_path) if line["setting"] == setting] == predictions
        assert found["accuracy"][setting] == pytest.approx(expected["accuracy"][setting])
    assert [line["gold"] for line in lines(tmp_path)] == 3 * expected["gold"]
    assert found["rec2ftp"] == (None if expected["rec2ftp"] is None else pytest.approx(expected["rec2ftp"]))
    for ours, theirs in NAMES.items():
        np.testing.assert_allclose(found["paper"][ours], expected[theirs], atol=1e-4, err_msg=ours)
    assert (
        (found["rec2ftp"] is None) == ("note" in found) == (dataset == "agnews")
    )  # there finetuning puts nothing right
    assert found["lr_selected_on"] == "given" and found["finetune_lr"] == expected["finetune_lr"]


# ---- a small random model


@pytest.fixture
def films(examples):
    """A made-up data set of the examples of conftest; for training many times over, and with other texts than are
    evaluated."""
    spec = dataclasses.replace(load_dataset("mr", str(GOLDEN), "code").spec, name="films")
    labels = (" Positive", " Negative")
    inputs = [
        f"{'very ' * (i // len(examples))}{e.inputs[0].replace(' Sentiment', ' film Sentiment')}"
        for i, e in enumerate(examples * 3)
    ]
    train = [Example(i, (text,), labels, i * 7 % 3 % 2) for i, text in enumerate(inputs)]
    evaluation = [Example(i, e.inputs, labels, i * 5 % 3 % 2) for i, e in enumerate(examples)]
    return LabelledDataset(spec, train, evaluation, {"kind": "local", "path": "films"})


PROMPT_SETTINGS = classification.Settings(shots=(3,), seeds=(1,), batch_tokens=60)
SETTINGS = Settings(PROMPT_SETTINGS, rates=(0.05,), controls=("random", "shuffled_labels", "lcgd"))


def test_everything_is_recorded_and_the_weights_are_restored(lm, films, tmp_path):
    before = digest(lm)
    settings = dataclasses.replace(
        SETTINGS, controls=("untrained", "random", "shuffled_labels", "lcgd", "all_parameters"), save_traces=True
    )
    results = run(lm, [films], settings, tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in digest(lm).items())
    (found,) = results["runs"]
    assert found["baselines"].keys() == {"untrained", "shuffled_labels", "lcgd", "all_parameters"}
    assert {"simaou", "simaou_random", "simam", "simam_before", "kendall", "kendall_random", "recall_at_k"} <= found[
        "paper"
    ].keys()
    corrected = {
        "simaou",
        "simaou_random",
        "simam_delta",
        "kendall",
        "dw_similarity",
        "relaxation_cosine",
        "simaou_relaxed",
    }
    assert corrected <= found["corrected"].keys()
    for part in ("paper", "corrected"):
        assert all(len(values) == 2 for values in found[part].values())
        for name, ends in found[f"{part}_ci95"].items():
            for value, (low, high) in zip(found[part][name], ends, strict=True):
                assert low is None or low <= value <= high
    assert np.shape(found["heads"]["simam_delta"]) == np.shape(found["heads"]["kendall"]) == (2, 4)
    alone = found["corrected"]["simaou"]
    assert 0 <= found["labels_changed_by_shuffling"] <= 3 == len(found["demonstration_labels"])
    assert [entry["index"] for entry in found["attention"]] == [films.evaluation[i].index for i in range(3)]
    for entry in found["attention"]:
        shares = np.array([entry["in_context"], entry["finetuned"]])
        assert shares.shape == (2, 2, 3) and (shares > 0).all() and not np.allclose(*shares)
        np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-4)
    for name in found["baselines"]:
        assert not np.allclose(found["baselines"][name]["corrected"]["simaou"], alone)  # each is a model of its own
    assert results["summary"]["films"]["3"]["corrected"]["simaou"]["mean"] == pytest.approx(np.mean(alone))
    with np.load(tmp_path / "a" / "traces" / "films-3shot-seed1.npz") as arrays:
        assert arrays["outputs"].shape == (9, 3, 2, 2, 32)
        np.testing.assert_allclose(np.nanmean(arrays["corrected/simaou"], 0), alone, rtol=1e-5)
    again = run(lm, [films], settings, tmp_path / "b")["runs"][0]
    assert again | {"seconds": 0} == found | {"seconds": 0}


def test_batches_that_memory_does_not_hold_are_halved(lm, films, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, questions=dataclasses.replace(PROMPT_SETTINGS, batch_tokens=200))
    whole = run(lm, [films], settings, tmp_path / "whole")["runs"][0]
    sizes, real = [], study.trace_queries

    def small(lm, queries, *given, projections=False, **options):
        if len(queries) > 1 and not projections:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(queries))
        return real(lm, queries, *given, projections=projections, **options)

    monkeypatch.setattr(study, "trace_queries", small)
    halved = run(lm, [films], settings, tmp_path / "halved")["runs"][0]
    assert max(sizes) > 1 and sizes.count(1) >= 9
    for part in ("paper", "corrected"):
        for name, values in whole[part].items():
            assert halved[part][name] == pytest.approx(values, abs=2e-4), name
    assert halved["accuracy"] == whole["accuracy"]


def test_finished_units_are_kept(lm, films, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, controls=())
    whole = dataclasses.replace(settings, questions=dataclasses.replace(PROMPT_SETTINGS, seeds=(1, 2)))
    run(lm, [films], settings, tmp_path / "a")
    first = (tmp_path / "a" / "predictions.jsonl").read_bytes()
    went_on = run(lm, [films], whole, tmp_path / "a")
    assert (tmp_path / "a" / "predictions.jsonl").read_bytes().startswith(first)
    assert len(lines(tmp_path / "a")) == 2 * 3 * 9
    at_once = run(lm, [films], whole, tmp_path / "b")
    for one, other in zip(went_on["runs"], at_once["runs"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    monkeypatch.setattr("momentum_lm.studies.icl_vs_finetuning._Study", None)  # nothing is left to do
    assert run(lm, [films], whole, tmp_path / "a") == went_on
    with pytest.raises(UserError, match="holds other results"):
        run(lm, [films], dataclasses.replace(whole, loss="label"), tmp_path / "a")


def test_the_rate_is_chosen_on_data_that_is_not_reported(lm, films, tmp_path, caplog):
    settings = dataclasses.replace(SETTINGS, rates=(1e30, 0.05, 0.01), held_out=12, controls=())
    with caplog.at_level(logging.WARNING):
        (found,) = run(lm, [films], settings, tmp_path / "a")["runs"]
    assert "learning rate 1e+30 diverges" in caplog.text
    grid = {entry["lr"]: entry for entry in found["lr_grid"]}
    assert found["lr_selected_on"] == "train" and grid[1e30]["accuracy"] is None
    order = {rate: (-grid[rate]["accuracy"], grid[rate]["loss"]) for rate in (0.05, 0.01)}
    assert found["finetune_lr"] == min(order, key=order.get)

    paper = dataclasses.replace(settings, questions=dataclasses.replace(PROMPT_SETTINGS, protocol="paper"))
    (found,) = run(lm, [films], paper, tmp_path / "b")["runs"]
    assert found["lr_selected_on"] == "evaluation"
    chosen = next(entry for entry in found["lr_grid"] if entry["lr"] == found["finetune_lr"])
    assert found["accuracy"]["finetuned"] == chosen["accuracy"]
    with pytest.raises(UserError, match=r"diverges at every learning rate \(1e\+30, 1e\+31\)"):
        run(lm, [films], dataclasses.replace(settings, rates=(1e30, 1e31)), tmp_path / "c")
    with pytest.raises(UserError, match="try a smaller rates"):
        run(lm, [films], dataclasses.replace(settings, rates=(1e30,)), tmp_path / "c")


def test_demonstrations_that_do_not_fit(make_lm, films, tmp_path, caplog):
    lm = make_lm(max_positions=60)
    prompt_settings = dataclasses.replace(PROMPT_SETTINGS, shots=(8,))
    with caplog.at_level(logging.WARNING):
        (found,) = run(
            lm, [films], dataclasses.replace(SETTINGS, questions=prompt_settings, controls=()), tmp_path / "a"
        )["runs"]
    assert 0 < found["shots_fitted"] == len(found["demonstrations"]) == len(found["finetune_losses"]) < 8
    assert "finetuning learns these too" in caplog.text
    with pytest.raises(UserError, match=r"films: .*no demonstration fits"):
        run(make_lm(max_positions=30), [films], SETTINGS, tmp_path / "b")
    with pytest.raises(UserError, match="shots=0"):
        run(
            lm,
            [films],
            dataclasses.replace(SETTINGS, questions=dataclasses.replace(PROMPT_SETTINGS, shots=(0, 4))),
            tmp_path / "b",
        )


def test_the_label_alone_is_learnt(lm, films, tmp_path):
    settings = dataclasses.replace(SETTINGS, controls=())
    (whole,) = run(lm, [films], settings, tmp_path / "a")["runs"]
    (label,) = run(lm, [films], dataclasses.replace(settings, loss="label"), tmp_path / "b")["runs"]
    assert whole["finetune_losses"][0] != label["finetune_losses"][0]
    assert whole["accuracy"]["in_context"] == label["accuracy"]["in_context"]


def test_momentum_is_analysed(make_lm, films, tmp_path):
    """The same weights with and without the EMA: it is part of the attention output that SimAOU compares."""
    found = []
    for kind in ("none", "ema"):
        settings = dataclasses.replace(SETTINGS, controls=(), rates=(1e-3,))
        found += run(make_lm(momentum_kind=kind), [films], settings, tmp_path / kind)["runs"]
    without, with_momentum = (run["corrected"] for run in found)
    assert abs(without["simaou"][0] - with_momentum["simaou"][0]) > 1e-3
    assert without["kendall"][0] == pytest.approx(
        with_momentum["kendall"][0], abs=0.05
    )  # logits of the first layer hardly change


def test_choices_of_their_own(lm, choices, films, tmp_path):
    """Several tokens a choice, and inputs of their own."""
    spec = dataclasses.replace(films.spec, labels=None, name="pick")
    data = dataclasses.replace(films, spec=spec, train=choices, evaluation=choices)
    settings = dataclasses.replace(SETTINGS, questions=dataclasses.replace(PROMPT_SETTINGS, shots=(2,)))
    (found,) = run(lm, [data], settings, tmp_path / "a")["runs"]
    prompt_settings = dataclasses.replace(settings.questions, shots=(0, 2))
    classification.evaluate(lm, [data], prompt_settings, tmp_path / "b", show_progress=False)
    accuracy = {run["shots"]: run["accuracy"] for run in read_results(tmp_path / "b")["runs"]}
    assert (found["accuracy"]["zero_shot"], found["accuracy"]["in_context"]) == (accuracy[0], accuracy[2])
    expected = [line["scores"] for line in lines(tmp_path / "b") if line["shots"] == 2]
    for one, other in zip(
        [line for line in lines(tmp_path / "a") if line["setting"] == "in_context"], expected, strict=True
    ):
        np.testing.assert_allclose(one["scores"], other, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_a_model_of_transformers(tokenizer_folder, films, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    from momentum_lm.lm.huggingface import HuggingFaceLM
    from momentum_lm.text.tokenizer import load_tokenizer

    size = load_tokenizer(tokenizer_folder).vocab_size
    config = {
        "gpt2": transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256),
        "neox": transformers.GPTNeoXConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
        "llama": transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        ),
    }[family]

    class Tokenizer:
        inner, eos_token_id, model_max_length = load_tokenizer(tokenizer_folder), 2, 256

        def __call__(self, texts, add_special_tokens=True):
            given = [texts] if isinstance(texts, str) else texts
            ids = [self.inner.encode(text.replace("\n", " ")) for text in given]
            return type("Encoding", (), {"input_ids": ids[0] if isinstance(texts, str) else ids})

        def decode(self, ids, **options):
            return self.inner.decode(ids)

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    lm = HuggingFaceLM(model, Tokenizer(), family, "0")
    before = digest(lm)
    (found,) = run(lm, [films], dataclasses.replace(SETTINGS, controls=("untrained", "lcgd")), tmp_path)["runs"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in digest(lm).items())
    for name in ("simaou", "kendall", "relaxation_cosine", "simaou_relaxed", "dw_similarity"):
        assert all(value is not None and abs(value) <= 1 for value in found["corrected"][name])
    assert np.shape(found["heads"]["kendall"]) == (2, 4)


SCRIPT = """\
import sys
from momentum_lm.icl.datasets.loading import load_dataset
from momentum_lm.lm.native import load_native
from momentum_lm.studies import classification
from momentum_lm.studies import icl_vs_finetuning as study
from momentum_lm.studies.icl_vs_finetuning import Settings, analyse

model, data, folder = sys.argv[1:]
prompt_settings = classification.Settings(shots=(3,), seeds=(1,), limit=12, batch_tokens=200)
settings = Settings(prompt_settings, rates=(0.3, 0.1), held_out=8, controls=("shuffled_labels",), save_traces=True)
lm = load_native(model, {"decoder_attention_heads": 4})
analyse(lm, [load_dataset("mr", data, "code")], settings, folder, show_progress=False)
"""


def test_two_processes(golden_model, run_cli, tmp_path):
    """Under torchrun examples are shared out; the numbers are those of one process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_cli(["torchrun", "--nproc-per-node", "2", script, golden_model, GOLDEN, tmp_path / "two"], warm=True)
    assert done.returncode == 0, done.stderr
    lm = load_native(golden_model, {"decoder_attention_heads": 4})
    prompt_settings = classification.Settings(shots=(3,), seeds=(1,), limit=12, batch_tokens=200)
    settings = Settings(prompt_settings, rates=(0.3, 0.1), held_out=8, controls=("shuffled_labels",), save_traces=True)
    one = run(lm, [load_dataset("mr", str(GOLDEN), "code")], settings, tmp_path / "one")
    two = read_results(tmp_path / "two")
    assert one["runs"][0] | {"seconds": 0} == two["runs"][0] | {"seconds": 0}
    assert (tmp_path / "one" / "predictions.jsonl").read_bytes() == (
        tmp_path / "two" / "predictions.jsonl"
    ).read_bytes()
    traces = [np.load(tmp_path / name / "traces" / "mr-3shot-seed1.npz") for name in ("one", "two")]
    for name in traces[0]:
        np.testing.assert_array_equal(traces[0][name], traces[1][name])
