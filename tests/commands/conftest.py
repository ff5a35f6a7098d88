"""Real text, binarised by stock ``fairseq-preprocess``, and the flags of a model that trains in seconds."""

import importlib
import inspect
import json
import re

import pytest

MODULES = ["argparse", "collections", "csv", "datetime", "difflib", "email.message", "functools", "heapq", "http.client", "itertools",
           "json", "logging", "os", "pathlib", "random", "re", "shutil", "statistics", "string", "subprocess", "textwrap", "threading"]
SHAPE = ["--decoder-layers", "2", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-attention-heads", "2"]
STOCK_TASK = ["--task", "language_modeling", "--criterion", "cross_entropy", "--optimizer", "adam"]
OUR_TASK = ["--task", "momentum_language_modeling", "--criterion", "chunked_cross_entropy", "--optimizer", "fused_adamw"]


@pytest.fixture(scope="session")
def documents():
    """English documents: the docstrings of Python's standard library, one line of lower-case words each."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for item in [module, *(getattr(module, n) for n in sorted(dir(module)))]:
            text = inspect.getdoc(item) or ""
            words = re.findall(r"[a-z']+", text.lower())
            if len(words) >= 20:
                found.append(" ".join(words))
    found = list(dict.fromkeys(found))
    assert len(found) > 300
    return found


@pytest.fixture(scope="session")
def data(documents, tmp_path_factory, run_cli):
    """A folder of binarised data, made by fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "valid.txt").write_text("\n".join(documents[::10]) + "\n")
    (folder / "train.txt").write_text("\n".join(d for i, d in enumerate(documents) if i % 10) + "\n")
    out = folder / "bin"
    result = run_cli(["fairseq-preprocess", "--only-source", "--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt",
                      "--destdir", out, "--nwordssrc", "500", "--workers", "1"])
    assert result.returncode == 0, result.stderr
    return out


def flags(data, save_dir, *more, task=STOCK_TASK, updates=6):
    """A fairseq-train command line; words in ``more`` come last and so win."""
    words = ["fairseq-train", data, *task, "--lr", "1e-2", "--tokens-per-sample", "32", "--batch-size", "4", "--max-update", updates,
             "--cpu", "--num-workers", "0", "--seed", "7", "--log-format", "json", "--log-interval", "1", "--no-epoch-checkpoints",
             "--save-dir", save_dir, *SHAPE, *more]
    return [str(w) for w in words]


def json_lines(output, kind="train_inner"):
    """The dicts that fairseq logs as ``... | kind | {...}``."""
    return [json.loads(line.split(" | ")[-1]) for line in output.splitlines() if f"| {kind} | {{" in line]
