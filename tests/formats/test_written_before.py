"""A checkpoint and an export that the version before wrote (``tests/fixtures/model``): they load, and compute what they
did.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import momentum_lm
from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.formats.native import read_native

BEFORE = Path(__file__).parents[1] / "fixtures" / "model"
TOKENS = torch.arange(4, 20)[None]


@pytest.fixture
def expected():
    return torch.from_numpy(np.load(BEFORE / "logits.npy"))


def test_the_checkpoint_loads(expected):
    found = read_native(BEFORE / "checkpoint_last.pt")
    config = found.config
    assert (config.kv_heads, config.head_dim, config.norm, config.ffn, config.bias) == (2, 4, "layer", "plain", "all")
    torch.testing.assert_close(found.model.eval()(TOKENS)[0].detach(), expected, rtol=0, atol=2e-5)


def test_the_export_loads(expected, tmp_path, monkeypatch):
    """Its weights and its config.json, without the options that came later, by the code that exports carry now."""
    import transformers

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(BEFORE / "export", tmp_path / "export")
    for file in (Path(momentum_lm.__file__).parent / "formats" / "remote").glob("*_momentum_lm.py"):
        shutil.copyfile(file, folder / file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(model(TOKENS).logits[0].detach(), expected, rtol=0, atol=2e-5)


def test_the_export_comes_back_bit_for_bit(tmp_path, run_cli):
    folder = shutil.copytree(BEFORE / "export", tmp_path / "export")
    done = run_cli(["momentum-lm", "convert", folder, tmp_path / "back"])
    assert done.returncode == 0, done.stderr
    ours = load_checkpoint(tmp_path / "back" / "model.pt")["model"]
    before = load_checkpoint(BEFORE / "checkpoint_last.pt")["model"]
    for name, weight in ours.items():
        assert torch.equal(weight, before[name]), name


def test_training_goes_on_from_the_checkpoint(tmp_path, run_cli):
    symbols = [line.split()[0] for line in (BEFORE / "dict.txt").read_text().splitlines()]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(symbols[(i * k) % len(symbols)] for k in range(20)) for i in range(60)) + "\n")
    words = ["fairseq-preprocess", "--only-source", "--srcdict", BEFORE / "dict.txt", "--trainpref", text]
    done = run_cli([*words, "--validpref", text, "--destdir", tmp_path / "data", "--workers", "1"])
    assert done.returncode == 0, done.stderr
    (tmp_path / "run").mkdir()
    shutil.copyfile(BEFORE / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_last.pt")
    shape = "--decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2".split()
    done = run_cli(
        ["fairseq-train", tmp_path / "data", "--task", "language_modeling", "--arch", "momentum_lm_tiny", *shape,
         "--momentum-learned", "--momentum-normalize", "--position", "rotary", "--tokens-per-sample", "16",
         "--max-tokens", "64", "--optimizer", "adam", "--lr", "1e-2", "--max-update", "5", "--cpu",
         "--save-dir", tmp_path / "run", "--reset-dataloader"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "@ 3 updates" in done.stdout + done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 5
