"""A fairseq dense LM as published: an fp16 ``model.pt`` with fairseq's older keys, a dict.txt of 51,200 entries,
GPT-2's BPE files.

The model is stock fairseq's own, with the real number of layers and a small width; the tokenizer has GPT-2's number of
tokens.
"""

import argparse
import json
import random
import shutil

import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

import momentum_lm
from momentum_lm.errors import UserError
from momentum_lm.lm.native import load_native
from momentum_lm.text.tokenizer import _byte_letters

momentum_lm.register()

SHAPE = ["--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "4"]
TOKENS = torch.randint(4, 51200, (2, 17), generator=torch.Generator().manual_seed(1))


def build(folder, *words):
    """(task, model, cfg) of fairseq"""
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [str(folder), "--tokens-per-sample", "2048", *words])
    args.decoder_learned_pos = False  # which no flag says, and the architecture's default is not
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    return task, task.build_model(cfg.model), cfg


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The unpacked folder."""
    folder = tmp_path_factory.mktemp("en_dense_lm")
    merges = ["Ġ t", "h e", "Ġt he", "Ġ f", "Ġf i", "l m", "Ġfi lm", "e r", "i s", "a n"]
    tokens = [*_byte_letters(), *("".join(merge.split()) for merge in merges)]
    tokens += [f"Ġnever{i}" for i in range(50257 - len(tokens))]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    symbols = [str(i) for i in range(50257)]
    random.Random(0).shuffle(symbols)  # theirs are in the order of their frequency
    symbols += [f"madeupword{i:04d}" for i in range(51200 - 4 - len(symbols))]
    (folder / "dict.txt").write_text("".join(f"{symbol} {len(symbols) - i}\n" for i, symbol in enumerate(symbols)))

    torch.manual_seed(0)
    flags = [
        "--task",
        "language_modeling",
        "--arch",
        "transformer_lm_gpt3_small",
        "--share-decoder-input-output-embed",
        *SHAPE,
    ]
    _, model, cfg = build(folder, *flags)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {
        "args": None, "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.half().state_dict(),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 572204,
        "lr_scheduler_state": {"best": 2.9}}],
        "extra_state": {"metrics": [], "train_iterator": {"epoch": 1}}, "task_state": {},
        "last_optimizer_state": None,
    }  # fmt: skip
    keys = state["model"].keys()
    assert {"decoder.version", "decoder.embed_positions._float_tensor", "decoder.output_projection.weight"} < keys
    assert len(keys) == 6 + 16 * 12
    torch.save(state, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def logits(published):
    """Stock fairseq's, in fp32."""
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(published / "model.pt")], {"data": str(published)}
    )
    assert (
        cfg.model._name == "transformer_lm_gpt3_small"
        and len(model.state_dict()["decoder.embed_tokens.weight"]) == 51200
    )
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def assert_same(model, logits):
    with torch.no_grad():
        found = model.eval()(TOKENS)
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else found[0], logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("form", ["cfg", "namespace", "args", "weights only"])
def test_equal_to_stock_fairseq(published, logits, form, tmp_path):
    folder, overrides = published, None
    if form != "cfg":
        state = torch.load(published / "model.pt")
        args = argparse.Namespace(**state["cfg"]["model"])
        forms = {
            "namespace": {"cfg": {**state["cfg"], "model": args}},
            "args": {"cfg": None, "args": args},
            "weights only": {"cfg": None},
        }
        folder = tmp_path
        torch.save(state | forms[form], folder / "model.pt")
        overrides = {"decoder_attention_heads": 4} if form == "weights only" else None
    lm = load_native(folder, overrides)
    assert (
        lm.config.layers == 12 and lm.max_positions == 2048 and lm.config.tie_embeddings and lm.dtype == torch.float32
    )
    assert_same(lm.model, logits)


def test_strictly_into_our_architecture(published, logits):
    words = ["--task", "momentum_language_modeling", "--arch", "gpt_lm_125m", *SHAPE]
    _, model, _ = build(published, *words)
    model.load_state_dict(torch.load(published / "model.pt")["model"], strict=True)
    assert_same(model, logits)


def test_fairseq_eval_takes_the_folder(published, run_cli, tmp_path):
    (tmp_path / "films.yaml").write_text(
        "description: made up\nfiles: {train: train.jsonl, evaluation: validation.jsonl}\nlabel: label\nlabels: "
        "[Negative, Positive]\n"
        'templates:\n  paper: "Review: {text} Sentiment:"\n'
    )
    for split, count in (("train", 4), ("validation", 9)):
        rows = [
            json.dumps({"text": f"the {split} film is {'good' if i % 2 else 'bad'} {i}", "label": i % 2})
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    words = [
        "--datasets",
        tmp_path / "films.yaml",
        "--shots",
        "0,2",
        "--seeds",
        "1",
        "--results-dir",
        tmp_path / "results",
    ]
    done = run_cli(["fairseq-eval", "--task", "icl_classification", "--path", published, *words])
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "results" / "results.json").read_text())
    assert content["model"]["architecture"]["vocab_size"] == 51200 and content["model"]["architecture"]["heads"] == 4
    assert [run["num_examples"] for run in content["runs"]] == [9, 9]


def test_fairseq_interactive_takes_the_folder(published, run_cli):
    words = [
        published,
        "--task",
        "momentum_language_modeling",
        "--path",
        published / "model.pt",
        "--bpe",
        "momentum_lm",
        "--cpu",
    ]
    done = run_cli(
        ["fairseq-interactive", *words, "--beam", "2", "--max-len-a", "1", "--max-len-b", "5"], input="the film  is é\n"
    )
    assert done.returncode == 0, done.stderr
    (text,) = (line.split("\t")[2] for line in done.stdout.splitlines() if line.startswith("D-0"))
    assert text.startswith("the film  is é")


class Payload:
    """What a pickle can do when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return shutil.copy, (__file__, self.marker)


@pytest.mark.parametrize("place", ["model", "cfg", "extra_state"])
def test_a_malicious_checkpoint_is_refused_unless_trusted(published, place, run_cli, tmp_path):
    marker = tmp_path / "marker"
    state = torch.load(published / "model.pt")
    state[place]["payload"] = Payload(str(marker))
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt holds shutil\.copy, .*can run code.*trust=True"):
        load_native(tmp_path)
    assert not marker.exists()
    if place != "cfg":  # one command is enough
        return
    words = [
        "fairseq-eval",
        "--task",
        "icl_classification",
        "--path",
        tmp_path,
        "--datasets",
        "mr",
        "--results-dir",
        tmp_path / "results",
    ]
    refused = run_cli(words)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "--trust-checkpoint" in refused.stderr
    assert not marker.exists()
    run_cli(
        [*words, "--data-dir", tmp_path, "--trust-checkpoint"]
    )  # which finds no data, after it has read the checkpoint
    assert marker.exists()
