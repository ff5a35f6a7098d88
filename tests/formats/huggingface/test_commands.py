"""fairseq's own commands, and ours, on converted models."""

import json
import math
import re

import pytest
import torch

from momentum_lm.text.tokenizer import load_tokenizer

from .conftest import sentences

TRAIN = (
    "--task momentum_language_modeling --criterion chunked_cross_entropy --tokens-per-sample 32 --batch-size 4 "
    "--optimizer adam --lr 1e-9 "
    "--max-update 1 --disable-validation --no-save --log-format json --log-interval 1 --cpu --num-workers 0 "
    "--sample-break-mode none"
).split()


@pytest.fixture(
    params=["gpt2", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("opt", "xglm", "gpt_neox"))]
)
def converted(request, make_model, convert, tmp_path, run_cli):
    """(folder of the converted model, data binarised with its tokenizer, the flags that convert printed)"""
    _, theirs = make_model(request.param)
    out = convert(theirs, tmp_path / "ours")
    (tmp_path / "text.txt").write_text("\n".join(sentences(80, seed=3)))
    result = run_cli(
        ["momentum-lm", "prepare", tmp_path / "text.txt", "--hf-tokenizer", tmp_path / "ours" / "tokenizer.json",
        "--document", "line",
         "--output", tmp_path / "data", "--valid", "20", "--test", "0", "--workers", "1"]
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "dict.txt").stat().st_size > 100
    flags = re.search(r"(--arch .*)", out)[1].split()
    return tmp_path / "ours", tmp_path / "data", flags


def train_loss(run_cli, data, *arguments):
    result = run_cli(["fairseq-train", data, *TRAIN, *arguments])
    assert result.returncode == 0, result.stderr[-3000:]
    logged = [
        json.loads(line[line.index("{") :])
        for line in (result.stderr + result.stdout).splitlines()
        if '"train_loss"' in line or '"loss"' in line
    ]
    return float(logged[0].get("loss", logged[0].get("train_loss")))


def test_training_starts_from_it_and_momentum_changes_nothing(converted, run_cli, tmp_path):
    ours, data, flags = converted
    plain = train_loss(run_cli, data, *flags, "--finetune-from-model", ours / "model.pt", "--save-dir", tmp_path / "a")
    gated = train_loss(
        run_cli,
        data,
        *flags,
        "--momentum-kind",
        "ema",
        "--momentum-gate",
        "zero",
        "--finetune-from-model",
        ours / "model.pt",
        "--save-dir",
        tmp_path / "b",
    )
    assert math.isfinite(plain) and plain == gated
    restored = train_loss(
        run_cli, data, *flags, "--restore-file", ours / "model.pt", "--reset-optimizer", "--save-dir", tmp_path / "c"
    )
    assert restored == plain


def test_both_perplexities_are_the_same(converted, run_cli, tmp_path):
    ours, data, _ = converted
    result = run_cli(
        ["fairseq-eval", "--task", "lm_perplexity", data, "--path", ours, "--split", "valid", "--context-lengths",
        "32", "--results-dir",
         tmp_path / "results", "--device", "cpu"]
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    ppl = json.loads((tmp_path / "results" / "results.json").read_text())["runs"][0]["perplexity"]
    stock = run_cli(
        ["fairseq-eval-lm", data, "--path", ours / "model.pt", "--gen-subset", "valid", "--tokens-per-sample", "32",
        "--sample-break-mode",
         "none", "--cpu", "--batch-size", "4", "--context-window", "0"]
    )  # fmt: skip
    assert stock.returncode == 0, stock.stderr[-3000:]
    stock_ppl = float(re.search(r"Perplexity: ([\d.]+)", stock.stderr + stock.stdout)[1])
    assert math.isfinite(ppl) and ppl == pytest.approx(stock_ppl, rel=1e-3)
    validated = run_cli(
        [
            "fairseq-validate",
            data,
            "--path",
            ours / "model.pt",
            "--task",
            "language_modeling",
            "--cpu",
            "--batch-size",
            4,
        ]
    )
    assert validated.returncode == 0, validated.stderr[-3000:]
    assert float(re.search(r"ppl ([\d.]+)", validated.stderr + validated.stdout)[1]) > 1
    state = torch.load(ours / "model.pt", weights_only=True)
    assert state["cfg"]["task"]["add_bos_token"] == (load_tokenizer(ours).prefix == [0])
