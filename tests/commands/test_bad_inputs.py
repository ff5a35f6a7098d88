"""Bad input gets one clear line that names the file or flag, a non-zero exit, and leaves what was there as it was."""

import gzip
import json
import re
import shutil

import pytest
import torch

from momentum_lm.cli import evaluate as fairseq_eval
from momentum_lm.cli import main as momentum_lm


@pytest.fixture(scope="module")
def trained(data, run_cli, flags, tmp_path_factory):
    """A folder with a checkpoint, and broken copies of the checkpoint and of the data."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_cli(
        flags(data, folder / "run", "--arch", "momentum_lm_tiny", "--disable-validation", task="ours", updates=2)
    )
    assert result.returncode == 0, result.stderr
    good = folder / "run" / "checkpoint_last.pt"
    (folder / "torn.pt").write_bytes(good.read_bytes()[:5000])
    (folder / "text.pt").write_text("not a checkpoint")
    state = torch.load(good, weights_only=True)
    state["model"]["decoder.layers.0.fc1.weight"][0, 0] = float("nan")
    torch.save(state, folder / "nan.pt")
    state["cfg"]["anything"] = print
    torch.save(state, folder / "hostile.pt")
    for name in ("no_dict", "no_train", "short", "garbled", "empty"):
        shutil.copytree(data, folder / name)
    (folder / "no_dict" / "dict.txt").unlink()
    (folder / "no_train" / "train.idx").unlink()
    short = folder / "short" / "train.bin"
    short.write_bytes(short.read_bytes()[:-10])
    (folder / "garbled" / "train.idx").write_bytes(b"garbage" * 100)
    from momentum_lm.text.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(folder / "empty" / "valid", 500):
        pass
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sources that `momentum-lm prepare` must refuse."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "good.txt").write_text("\n".join(f"line {i} of a text" for i in range(50)))
    (folder / "empty.txt").write_text("")
    (folder / "bytes.txt").write_bytes(b"some text \xff\xfe and more")
    (folder / "good.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"some text " * 1000)[:30])
    (folder / "file").write_text("in the way")
    return folder


def prepare(*words):
    return lambda p: ["momentum-lm", "prepare", *words, *(["--output", "{out}"] if "--output" not in words else [])]


def train(*words, data="{data}", task="ours", arch="momentum_lm_tiny"):
    return lambda p: ["TRAIN", data, task, "--arch", arch, *words]


def evaluate(*words, path="{run}/run/checkpoint_last.pt", lengths="16"):
    return lambda p: ["fairseq-eval", "--task", "lm_perplexity", "{data}", "--path", path, "--context-lengths", lengths,
                      "--results-dir", "{out}", *words]  # fmt: skip


CASES = {
    # momentum-lm prepare
    "missing source": (prepare("{texts}/nowhere.txt"), "nowhere.txt"),
    "empty source": (prepare("{texts}/empty.txt"), "empty.txt"),
    "not UTF-8": (prepare("{texts}/bytes.txt"), "bytes.txt"),
    "wrong column": (prepare("{texts}/good.jsonl", "--column", "body"), "body"),
    "malformed JSONL": (prepare("{texts}/bad.jsonl"), "bad.jsonl:2"),
    "truncated gz": (prepare("{texts}/cut.txt.gz"), "cut.txt.gz"),
    "vocabulary too large": (prepare("{texts}/good.jsonl", "--vocab-size", "50000"), "--vocab-size"),
    "impossible share": (prepare("{texts}/good.jsonl", "--valid", "-1"), "--valid"),
    "output is a file": (prepare("{texts}/good.jsonl", "--output", "{texts}/file"), "file"),
    "not a SentencePiece model": (prepare("{texts}/good.jsonl", "--sentencepiece", "{texts}/good.txt"), "good.txt"),
    # fairseq-train
    "decay of one": (train("--momentum-eta", "1.0"), "--momentum-eta"),
    "negative decay": (train("--momentum-eta", "-0.5"), "--momentum-eta"),
    "unknown kind of momentum": (train("--momentum-kind", "cubic"), "--momentum-kind"),
    "learned decay of nothing": (train("--momentum-learned", arch="gpt_lm_tiny"), "--momentum-learned"),
    "heads that do not divide": (train("--decoder-attention-heads", "5"), "--decoder-attention-heads"),
    "criterion for other models": (train(arch="transformer_lm_gpt"), "--criterion"),
    "packed documents for other models": (
        train("--packed-documents", "--criterion", "cross_entropy", arch="transformer_lm_gpt"),
        "--packed-documents",
    ),
    "bad betas": (train("--adam-betas", "(2, 3)"), "--adam-betas"),
    "no apex": (train("--adam-backend", "apex"), "apex"),
    "no dictionary": (train(data="{run}/no_dict"), "dict.txt"),
    "no training data": (train(data="{run}/no_train"), "train.idx"),
    "data cut short": (train(data="{run}/short"), "train.bin"),
    "garbled index": (train(data="{run}/garbled"), "train.idx"),
    "empty split": (train(data="{run}/empty"), "valid"),
    "torn checkpoint": (train("--restore-file", "{run}/torn.pt"), "torn.pt"),
    "missing checkpoint": (train("--restore-file", "{run}/none.pt"), "none.pt"),
    "hostile checkpoint": (train("--restore-file", "{run}/hostile.pt"), "hostile.pt"),
    # fairseq-eval
    "evaluation without a checkpoint": (evaluate(path="{run}/none.pt"), "none.pt"),
    "evaluation of a text file": (evaluate(path="{run}/text.pt"), "text.pt"),
    "evaluation of NaN weights": (evaluate("--results-dir", "{run}/results", path="{run}/nan.pt"), "nan.pt"),
    "results of something else": (evaluate(), "results.json"),
    "longer than the model": (evaluate(lengths="16,4096"), "4096"),
    "lengths that are no numbers": (evaluate(lengths="16,many"), "--context-lengths"),
    "split that is not there": (evaluate("--split", "exam"), "exam"),
    "malformed overrides": (evaluate("--model-overrides", "{{'decoder_layers': "), "--model-overrides"),
    "a shape that is no number": (evaluate("--model-overrides", "{{'decoder_layers': 'x'}}"), "decoder_layers='x'"),
    "a seed that NumPy does not take": (evaluate("--seed", "-1"), "--seed -1"),
    "results that cannot be written": (evaluate("--results-dir", "{texts}/file/out"), "--results-dir"),
    "unknown evaluation": (lambda p: ["fairseq-eval", "--task", "nonsense"], "nonsense"),
    # the rest
    "report of nothing": (lambda p: ["momentum-lm", "report", "{texts}/nowhere"], "nowhere"),
    "unknown command": (lambda p: ["momentum-lm", "prepair"], "prepair"),
}


# All that may stand before the error: how far a command got.
PROGRESS = re.compile(r"|training SentencePiece: .*|(valid, context 16: +)? *0%\|.*tok/s\]")


MAINS = {"fairseq-eval": fairseq_eval.main, "momentum-lm": momentum_lm.main}
PROCESSES = (
    "empty source",
    "evaluation of NaN weights",
    "unknown command",
)  # the rest of these commands' cases call their mains


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, data, trained, texts, run_cli, flags, capsys, tmp_path):
    make, word = CASES[case]
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("precious")
    places = {"data": data, "run": trained, "texts": texts, "out": out}
    words = [str(w).format(**places) for w in make(places)]
    if words[0] == "TRAIN":
        words = flags(words[1], out, *words[3:], task=words[2], updates=1)
    before = (texts / "file").read_text()
    if words[0] in MAINS and case not in PROCESSES:
        status, said = MAINS[words[0]](words[1:]), capsys.readouterr().err
    else:
        result = run_cli(words)
        status, said = result.returncode, result.stderr
    *before_it, error = said.splitlines()
    assert status, said[-2000:]
    assert error.startswith("error: ") and word in error, said[-3000:]
    assert all(PROGRESS.fullmatch(line) for line in before_it), said[-3000:]
    assert (out / "results.json").read_text() == "precious" and (texts / "file").read_text() == before
    # crash.pt: what fairseq itself saves when a training step raises
    left = {p.name for p in out.iterdir()} - {"results.json"}
    assert left <= ({"crash.pt"} if case in ("criterion for other models", "data cut short") else set()), left
