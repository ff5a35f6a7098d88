"""``fairseq-eval --task lm_perplexity`` and ``momentum-lm report`` on checkpoints that fairseq-train wrote."""

import contextlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from momentum_lm.cli import evaluate, report
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.indexed import IndexedDatasetWriter

SHAPE = [
    "--decoder-layers",
    "2",
    "--decoder-embed-dim",
    "32",
    "--decoder-ffn-embed-dim",
    "64",
    "--decoder-attention-heads",
    "2",
]
ARCHITECTURES = {
    "momentum": ["--arch", "momentum_lm_tiny", "--momentum-learned", *SHAPE],
    "stock": ["--arch", "transformer_lm_gpt", "--share-decoder-input-output-embed", *SHAPE],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents of a first-order Markov chain over 60 words: something to learn."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    following = rng.integers(4, 64, size=(64, 3))
    for split, documents in (("train", 150), ("valid", 23)):
        with IndexedDatasetWriter(folder / split, 64) as writer:
            for _ in range(documents):
                tokens = [int(rng.integers(4, 64))]
                for _ in range(int(rng.integers(3, 60))):
                    tokens.append(int(following[tokens[-1], rng.integers(3)]))
                writer.add(np.array([*tokens, 2]))
                if split == "valid":
                    writer.add(np.array([2]))  # an empty line is a document too
    Dictionary(f"w{i}" for i in range(60)).save(folder / "dict.txt")
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, data, run_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    done = run_cli([
        "fairseq-train", data, "--task", "language_modeling", *ARCHITECTURES[request.param], "--tokens-per-sample",
        "24",
        "--optimizer", "adam", "--lr", "0.01", "--max-update", "30", "--batch-size", "8", "--save-dir", folder,
        "--no-epoch-checkpoints", "--num-workers", "0", "--disable-validation", "--dropout", "0.1", "--cpu",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint_last.pt"


def test_same_as_fairseq_eval_lm(data, checkpoint, run_cli, tmp_path, capsys):
    status = evaluate.main(
        [
            "--task",
            "lm_perplexity",
            str(data),
            "--path",
            str(checkpoint),
            "--context-lengths",
            "7,24",
            "--results-dir",
            str(tmp_path),
        ]
    )
    printed = capsys.readouterr().out
    assert status == 0
    runs = {run["context_length"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    for length in (7, 24):
        done = run_cli([
            "fairseq-eval-lm", data, "--path", checkpoint, "--gen-subset", "valid", "--tokens-per-sample", length,
            "--sample-break-mode", "none", "--num-workers", "0", "--cpu",
        ])  # fmt: skip
        assert done.returncode == 0, done.stderr
        base2, tokens = (
            re.search(p, done.stdout + done.stderr)[1]
            for p in (r"Loss \(base 2\): ([\d.]+)", r"Evaluated (\d+) tokens")
        )
        assert runs[length]["num_tokens"] == int(tokens)
        assert math.log2(runs[length]["perplexity"]) == pytest.approx(float(base2), abs=1e-4)
        assert f"{runs[length]['perplexity']:.2f}" in printed
    assert runs[24]["perplexity"] < 50  # it learned
    assert {"report.html", "perplexity-valid.png", "tensorboard", "documents"} <= {p.name for p in tmp_path.iterdir()}
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two untrained models, one of which momentum has made worse."""
    from momentum_lm.model import Decoder, DecoderConfig

    folder = tmp_path_factory.mktemp("models")
    cfg = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 2,
           "activation_fn": "gelu", "position": "sinusoidal", "max_target_positions": 32}  # fmt: skip
    for name, scale in (("small", 0.02), ("large", 0.3)):
        torch.manual_seed(0)
        model = Decoder(DecoderConfig(64, 16, 16, 1, 2, max_positions=32))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=scale)
        state = {f"decoder.{key}": value for key, value in model.state_dict().items()}
        torch.save({"cfg": {"model": cfg}, "model": state}, folder / f"{name}.pt")
    return folder


def run_both(data, models, out):
    for name in ("small", "large"):
        words = [
            "--task",
            "lm_perplexity",
            data,
            "--path",
            models / f"{name}.pt",
            "--context-lengths",
            "8,16",
            "--results-dir",
            out / name,
        ]
        assert evaluate.main(list(map(str, words))) == 0


def test_report_compares(data, models, tmp_path, capsys):
    run_both(data, models, tmp_path)
    capsys.readouterr()
    page = tmp_path / "compare.html"
    assert report.main([str(tmp_path / "small"), str(tmp_path / "large"), "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 + 2
    small, large = lines[2].split(), lines[3].split()
    assert small[:3] == ["valid", "8", "small"]
    assert large[:3] == ["valid", "8", "large"]
    change = float(large[3]) / float(small[3]) - 1
    shown, low, high = (float(cell.rstrip("%")) / 100 for cell in (large[-5], large[-4], large[-2]))
    assert shown == pytest.approx(change, abs=2e-3)
    assert 0 < low < shown < high
    assert "<svg" in page.read_text()
    assert report.main([str(tmp_path / "small"), str(tmp_path / "small" / ".")]) == 2
    assert "named twice" in capsys.readouterr().err
    assert report.main([str(tmp_path / "small"), str(tmp_path / "large"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| split | context | model |")


def test_without_momentum(data, tmp_path, capsys):
    from momentum_lm.model import Decoder, DecoderConfig

    cfg = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2,
           "activation_fn": "gelu", "position": "sinusoidal", "max_target_positions": 32, "momentum_kind": "ema",
           "momentum_eta": 0.7}  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(64, 16, 16, 2, 2, max_positions=32, momentum_kind="ema", momentum_eta=0.7))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"decoder.{key}": value for key, value in model.state_dict().items()}
    torch.save({"cfg": {"model": cfg}, "model": state}, tmp_path / "m.pt")
    torch.save({"cfg": {"model": cfg | {"momentum_kind": "none"}}, "model": state}, tmp_path / "v.pt")

    def perplexity(out, *more, path="m.pt"):
        words = ["--task", "lm_perplexity", str(data), "--path", str(tmp_path / path), "--context-lengths", "16"]
        assert evaluate.main([*words, "--results-dir", str(tmp_path / out), *more]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / out / "results.json").read_text())["runs"][0]["perplexity"]

    found = {
        name: perplexity(name or "with", *(["--without-momentum", name] if name else [])) for name in ("", "all", "0")
    }
    assert len(set(found.values())) == 3
    assert found["all"] == perplexity("vanilla", path="v.pt") == perplexity("all", "--without-momentum", "0,1")
    words = ["--task", "lm_perplexity", data, "--path", tmp_path / "m.pt", "--results-dir", tmp_path / "all"]
    assert evaluate.main(list(map(str, [*words, "--context-lengths", 16]))) == 2  # with the filters: other results
    assert "without_momentum" in capsys.readouterr().err
    assert "without the filters layers.0.self_attn.momentum" in (tmp_path / "0/report.html").read_text()


def test_interrupted_evaluation_goes_on(data, models, tmp_path, monkeypatch, capsys):
    from momentum_lm.studies import perplexity

    words = [
        "--task",
        "lm_perplexity",
        data,
        "--path",
        models / "small.pt",
        "--context-lengths",
        "8,16",
        "--results-dir",
        tmp_path / "out",
    ]
    stock = perplexity.score_documents

    def interrupted(lm, dataset, length, *rest):
        if length == 16:
            raise KeyboardInterrupt
        return stock(lm, dataset, length, *rest)

    monkeypatch.setattr(perplexity, "score_documents", interrupted)
    assert evaluate.main(list(map(str, words))) == 130
    assert "go on" in capsys.readouterr().err
    first = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [run["context_length"] for run in first] == [8]
    monkeypatch.setattr(perplexity, "score_documents", stock)
    assert evaluate.main(list(map(str, words))) == 0
    runs = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    assert [run["context_length"] for run in runs] == [8, 16]
    assert runs[0] == first[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--task": "lm_perplexty"}, "--task lm_perplexty: choose one of lm_perplexity"),
        ({"--task": None}, "--task is missing"),
        ({"--context-lengths": "8,x"}, "--context-lengths 8,x"),
        ({"--context-lengths": "0"}, "--context-lengths 0"),
        ({"--context-lengths": "33"}, "from 1 to 32 tokens"),
        ({"--path": "absent.pt"}, "absent.pt"),
        ({"--split": "test"}, "no split 'test'"),
        ({"--model-overrides": "{"}, "--model-overrides"),
        ({"--model-overrides": "{'momentum_eta': 'a'}"}, "small.pt: momentum_eta='a': must be a number"),
        ({"--batch-tokens": "0"}, "--batch-tokens 0"),
        ({"--without-momentum": "2"}, "--without-momentum 2: "),
        ({"--without-momentum": "first"}, "--without-momentum first: give whole numbers"),
        ({"--seed": "-1"}, "--seed -1: must not be negative"),
        pytest.param(
            {"--device": "cuda"},
            "--device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_errors_are_one_line(data, models, tmp_path, capsys, changes, message):
    options = {
        "--task": "lm_perplexity",
        "--path": str(models / "small.pt"),
        "--context-lengths": "8",
        "--results-dir": str(tmp_path / "o"),
    }
    words = [word for pair in (options | changes).items() if pair[1] is not None for word in pair]
    assert evaluate.main([*words, str(data)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]
    assert not (tmp_path / "o").exists()


def test_help(capsys):
    for arguments in (["--help"], ["--task", "lm_perplexity", "--help"]):
        with contextlib.suppress(SystemExit):  # argparse's way to end
            assert evaluate.main(arguments) == 0
        text = capsys.readouterr().out
        assert "lm_perplexity" in text
        assert "example:" in text
    assert "--context-lengths" in text
    assert "default: 256,512,1024" in text


def test_report_refuses_what_does_not_compare(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(
        json.dumps({"task": "icl_classification", "model": {}, "config": {}, "runs": []})
    )
    assert report.main([str(tmp_path)]) == 2
    assert "icl_classification" in capsys.readouterr().err


def test_data_made_with_another_dictionary_of_the_same_size_is_refused(data, checkpoint, tmp_path, capsys):
    """The checkpoint of fairseq-train has no dictionary beside it, but keeps its digest, or names its data."""
    shutil.copytree(data, tmp_path / "other")
    lines = (tmp_path / "other" / "dict.txt").read_text().splitlines()
    (tmp_path / "other" / "dict.txt").write_text("\n".join(reversed(lines)) + "\n")
    words = ["--path", str(checkpoint), "--context-lengths", "7", "--results-dir", str(tmp_path / "out")]
    assert evaluate.main(["--task", "lm_perplexity", str(tmp_path / "other"), *words]) == 2
    said = capsys.readouterr().err
    # Our task records the dictionary's digest, the stock one the data's folder.
    ours, stock = "one that the checkpoint was trained with", "dictionary of the data that the model was trained on"
    assert any(f"other/dict.txt is not the {what}" in said for what in (ours, stock))
    assert "data made with the model's own dictionary" in said
    assert not (tmp_path / "out").exists()
