"""examples/continued_pretraining/continue.py on a random Llama and a small text: what it trains and measures, what it
does not train again, and what it refuses.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SCRIPT = Path(__file__).parents[2] / "examples/continued_pretraining/continue.py"
LAYERS, GROUPS = 3, 2
SMALL = """--documents 150 --valid 20 --tokens 256 --tokens-per-sample 16 --batch-size 2 --shots 2 --draws 1,2 --limit 4
--jobs 1 --autocast none --momentum-lr 0.05""".split()


@pytest.fixture(scope="module")
def here(documents, tmp_path_factory):
    """A folder with a model of transformers, text, and labelled data."""
    folder = tmp_path_factory.mktemp("continued")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=["<|endoftext|>"])
    core.train_from_iterator(documents, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=core.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=GROUPS, max_position_embeddings=512, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "labelled/mr").mkdir(parents=True)
    for split, texts in (("train", documents[:40]), ("validation", documents[40:60])):
        rows = [{"text": text[-30:], "label": index % 2} for index, text in enumerate(texts)]
        (folder / f"labelled/mr/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def study(here, run_cli):
    """study(*flags) -> the command's result, its output in a folder ``out``."""

    def run(*flags):
        words = ["--model", here / "model", "--corpus", here / "text.jsonl", "--data-dir", here / "labelled"]
        return run_cli(["python", SCRIPT, *words, "--output", here / "out", *SMALL, *flags], warm=True)

    return run


@pytest.fixture(scope="module")
def continue_main():
    """The script's main; its name is none that could be imported."""
    spec = importlib.util.spec_from_file_location("continued_pretraining", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=False)["model"]


@pytest.mark.nightly
def test_what_is_trained_is_measured_kept_and_goes_on(here, study):
    done = study("--variants", "ema", "--seeds", "1,2")
    assert done.returncode == 0, done.stderr
    results = json.loads((here / "out/results.json").read_text())
    assert results["settings"]["momentum_lr"] == 0.05 and (results["updates"], results["tokens"]) == (8, 256)
    assert list(results["first_loss_bits"]) == ["1", "2"] and (here / "out/learned.png").exists()
    before = results["before"]["perplexity"]
    for name in ("vanilla", "ema"):
        found = results["variants"][name]
        assert found["perplexity"] == pytest.approx(math.prod(found["by_seed"]) ** 0.5)
        assert found["against_before"]["difference"]["ratio"] == pytest.approx(found["perplexity"] / before)
        (raw, batch) = found["icl"]
        assert (raw["calibration"], batch["calibration"]) == ("none", "batch") and len(raw["after"]) == 2
    ema, vanilla = results["variants"]["ema"], results["variants"]["vanilla"]
    ratios = [a / b for a, b in zip(ema["by_seed"], vanilla["by_seed"], strict=True)]
    assert ema["against_vanilla"]["ratio_by_seed"] == pytest.approx(ratios) and ratios != [1.0, 1.0]
    for seed in (1, 2):
        state = weights(here / f"out/ema/seed{seed}/checkpoint_last.pt")
        for name, key in (("gate", "gate"), ("decay", "decay_logit")):
            stored = torch.stack([state[f"decoder.layers.{i}.self_attn.momentum.{key}"] for i in range(LAYERS)])
            stored = stored.sigmoid() if name == "decay" else stored
            said = np.array(ema["learned"][name]["by_seed"][str(seed)])
            assert said.shape == (LAYERS, GROUPS) and np.abs(said - ema["learned"][name]["start"]).max() > 0.001
            np.testing.assert_allclose(said, stored, atol=1e-5)
        assert not any("momentum" in key for key in weights(here / f"out/vanilla/seed{seed}/checkpoint_last.pt"))
    assert ["ema", f"{ema['perplexity']:.2f}"] in [line.split()[:2] for line in done.stdout.splitlines()]

    # another variant later; a training that had come as far as its checkpoint before the last
    interrupted, kept = here / "out/ema/seed2", here / "out/ema/seed1/checkpoint_last.pt"
    last, stamp = weights(interrupted / "checkpoint_last.pt"), kept.stat().st_mtime_ns
    (earlier,) = interrupted.glob("checkpoint_1_*.pt")
    earlier.replace(interrupted / "checkpoint_last.pt")
    (interrupted / "train.done").unlink()
    done = study("--variants", "ema,fir", "--seeds", "1,2")
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == stamp
    assert all(torch.equal(value, last[key]) for key, value in weights(interrupted / "checkpoint_last.pt").items())
    again = json.loads((here / "out/results.json").read_text())
    assert again["variants"]["ema"] == ema and again["variants"]["vanilla"] == vanilla
    assert again["variants"]["fir"]["learned"].keys() == {"gate", *(f"weight_of_lag_{lag}" for lag in (1, 2, 3))}

    stamps = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*") if path.is_file()}
    refused = study("--variants", "ema", "--lr", "1e-3")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and "is of a study that differs in lr (0.0001 there, 0.001 now)" in line
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "emma"], "--variants emma: choose from ema, fir"),
        (["--seeds", "x"], "--seeds x"),
        (["--tokens", "31"], "--tokens 31: must be at least 32, one update's"),
        (["--valid", "150"], "--valid 150: must be less than --documents 150"),
        (["--momentum-lr", "0"], "--momentum-lr 0: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--corpus", "nowhere"], "--corpus nowhere does not exist"),
        (["--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
        (["--gguf-file", "a.gguf"], "--gguf-file a.gguf: give its folder as --model"),
        (["--datasets", "trec"], "--datasets trec: give --data-dir"),
    ],
)
def test_bad_flags_are_one_line(continue_main, tmp_path, capsys, words, message):
    assert continue_main(["--output", str(tmp_path / "out"), *SMALL, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_ends_the_study(here, continue_main, tmp_path, capsys):
    words = ["--model", "nowhere/at_all.pt", "--corpus", here / "text.jsonl", "--data-dir", here / "labelled"]
    assert continue_main([*map(str, words), "--output", str(tmp_path / "out"), *SMALL]) == 1
    assert "nowhere/at_all.pt does not exist" in (said := capsys.readouterr().err)
    assert "Traceback" not in said
