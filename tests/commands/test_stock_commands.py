"""Every fairseq command with the plugin's architectures, as a user types it, with no --user-dir."""

import re

import pytest
import torch

from momentum_lm.formats.checkpoint import load_checkpoint


@pytest.fixture(scope="module", params=["stock", "ours"])
def kind(request):
    """Whose task, criterion and optimizer."""
    return request.param


@pytest.fixture(scope="module")
def task(kind):
    return {"stock": "language_modeling", "ours": "momentum_language_modeling"}[kind]


@pytest.fixture(scope="module")
def checkpoint(kind, data, run_cli, tmp_path_factory, flags, json_lines):
    folder = tmp_path_factory.mktemp("momentum")
    result = run_cli(flags(data, folder, "--arch", "momentum_lm_tiny", task=kind, updates=30))
    assert result.returncode == 0, result.stderr
    losses = [float(line["loss"]) for line in json_lines(result)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    return folder / "checkpoint_best.pt"


def test_train_and_checkpoint(checkpoint, task):
    state = load_checkpoint(checkpoint)
    assert state["cfg"]["task"]["_name"] == task
    assert state["cfg"]["model"]["_name"] == "momentum_lm_tiny" and state["cfg"]["model"]["momentum_eta"] > 0
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_train_again_goes_on(checkpoint, kind, data, run_cli, tmp_path, flags, json_lines):
    result = run_cli(
        flags(data, tmp_path, "--arch", "momentum_lm_tiny", "--restore-file", checkpoint, task=kind, updates=32)
    )
    assert result.returncode == 0, result.stderr
    assert [line["num_updates"] for line in json_lines(result)] == ["31", "32"]


def test_validate(checkpoint, task, data, run_cli, json_lines):
    result = run_cli(
        [
            "fairseq-validate",
            data,
            "--task",
            task,
            "--path",
            checkpoint,
            "--tokens-per-sample",
            "32",
            "--batch-size",
            "4",
            "--cpu",
            "--log-format",
            "json",
        ]
    )
    assert result.returncode == 0, result.stderr
    (line,) = json_lines(result, "valid")
    assert 2 < float(line["valid_loss"]) < 9


def test_eval_lm(checkpoint, task, data, run_cli):
    result = run_cli(
        [
            "fairseq-eval-lm",
            data,
            "--task",
            task,
            "--path",
            checkpoint,
            "--tokens-per-sample",
            "32",
            "--batch-size",
            "4",
            "--gen-subset",
            "valid",
            "--cpu",
        ]
    )
    assert result.returncode == 0, result.stderr
    perplexity = float(re.search(r"Perplexity: ([\d.]+)", result.stderr + result.stdout)[1])
    assert 10 < perplexity < 500


def test_generate(checkpoint, task, data, run_cli):
    result = run_cli(
        [
            "fairseq-generate",
            data,
            "--task",
            task,
            "--path",
            checkpoint,
            "--gen-subset",
            "valid",
            "--tokens-per-sample",
            "32",
            "--sample-break-mode",
            "eos",
            "--batch-size",
            "8",
            "--prefix-size",
            "3",
            "--beam",
            "2",
            "--max-len-b",
            "6",
            "--cpu",
            "--skip-invalid-size-inputs-valid-test",
        ]
    )
    assert result.returncode == 0, result.stderr
    hypotheses = [line.split("\t")[2].split() for line in result.stdout.splitlines() if line.startswith("H-")]
    # fairseq writes an unknown word of a reference as <<unk>>
    targets = [
        line.split("\t")[1].replace("<<unk>>", "<unk>").split()
        for line in result.stdout.splitlines()
        if line.startswith("T-")
    ]
    assert hypotheses and all(h[:3] == t[:3] for h, t in zip(hypotheses, targets, strict=True))


def test_interactive(checkpoint, task, data, run_cli):
    result = run_cli(
        [
            "fairseq-interactive",
            data,
            "--task",
            task,
            "--path",
            checkpoint,
            "--beam",
            "2",
            "--max-len-b",
            "8",
            "--cpu",
        ],
        input="return the value of the\n",
    )
    assert result.returncode == 0, result.stderr
    (hypothesis,) = [line.split("\t")[2] for line in result.stdout.splitlines() if line.startswith("H-0")][:1]
    assert hypothesis.startswith("return the value of the ") or hypothesis == "return the value of the"


HYDRA = """
common: {cpu: true, log_format: json, log_interval: 1, seed: 1}
checkpoint: {no_epoch_checkpoints: true}
task: {_name: TASK, data: "???", tokens_per_sample: 32}
dataset: {batch_size: 4, num_workers: 0}
criterion: {_name: cross_entropy}
optimizer: {_name: adam, adam_betas: "(0.9, 0.98)"}
lr_scheduler: {_name: fixed}
optimization: {max_update: 3, lr: [0.01]}
model: {_name: momentum_lm_tiny, decoder_layers: 2, decoder_embed_dim: 32, decoder_ffn_embed_dim: 64,
        decoder_attention_heads: 2,
        momentum_eta: 0.3}
"""


@pytest.mark.parametrize("task", ["language_modeling", "momentum_language_modeling"])
def test_hydra_train(task, data, run_cli, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "lm.yaml").write_text(HYDRA.replace("TASK", task))
    result = run_cli(
        [
            "fairseq-hydra-train",
            "--config-dir",
            tmp_path / "config",
            "--config-name",
            "lm",
            f"task.data={data}",
            f"checkpoint.save_dir={tmp_path}/out",
            f"hydra.run.dir={tmp_path}/hydra",
        ],
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    state = load_checkpoint(tmp_path / "out" / "checkpoint_last.pt")
    assert state["cfg"]["model"]["momentum_eta"] == 0.3 and state["optimizer_history"][-1]["num_updates"] == 3


@pytest.mark.parametrize(
    "more",
    [
        ["--arch", "gpt_lm_tiny", "--position", "learned"],
        ["--arch", "momentum_lm_tiny", "--momentum-kind", "multi_ema", "--position", "rotary"],
        [
            "--arch",
            "momentum_lm_tiny",
            "--momentum-learned",
            "--momentum-normalize",
            "--momentum-gate",
            "zero",
            "--bf16",
        ],
        ["--arch", "momentum_lm_tiny", "--checkpoint-activations", "--packed-documents"],
    ],
)
def test_every_kind_trains_with_our_task(more, data, run_cli, tmp_path, flags, json_lines):
    result = run_cli(flags(data, tmp_path, *more, task="ours", updates=4))
    assert result.returncode == 0, result.stderr
    assert len(json_lines(result)) == 4


def test_stock_checkpoint_of_transformer_lm_gpt_continues_as_gpt_lm(data, run_cli, tmp_path, flags):
    """A stock run's weights go on in our model, and ours in the stock one, under the same fairseq-train."""
    stock = [
        "--arch",
        "transformer_lm_gpt",
        "--share-decoder-input-output-embed",
        "--dropout",
        "0",
        "--attention-dropout",
        "0",
    ]
    ours = ["--arch", "gpt_lm_tiny"]
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
    first = run_cli(flags(data, tmp_path / "a", *stock, updates=3))
    assert first.returncode == 0, first.stderr
    for name, arch, source in (("b", ours, "a"), ("c", stock, "b")):
        result = run_cli(
            flags(
                data,
                tmp_path / name,
                *arch,
                "--restore-file",
                tmp_path / source / "checkpoint_last.pt",
                *reset,
                updates=3,
            )
        )
        assert result.returncode == 0, result.stderr
