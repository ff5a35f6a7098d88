"""Results folders of an older version (tests/fixtures/results): read, compared, continued, and equal to what is
measured now.

The fixtures are what ``measure`` wrote into them before the studies had a registry.
"""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from momentum_lm.cli import evaluate, report
from momentum_lm.results.records import read_results
from momentum_lm.text.indexed import IndexedDatasetWriter

TESTS = Path(__file__).parent.parent
GOLDEN, BEFORE = TESTS / "golden", TESTS / "fixtures" / "results"
MODEL = ["--path", "model.pt", "--model-overrides", "{'decoder_attention_heads': 4}"]
PROMPTS = ["--datasets", "mr", "--data-dir", "golden", "--limit", "6"]
COMMANDS = {
    "lm_perplexity": ["data", *MODEL, "--context-lengths", "16,32"],
    "icl_classification": [
        *(*MODEL, *PROMPTS, "--shots", "0,2", "--seeds", "1,2", "--calibration", "none,batch", "--batch-tokens", "300"),
    ],
    "icl_finetune_analysis": [
        *(*MODEL, *PROMPTS, "--shots", "2", "--seeds", "1", "--controls", "untrained,lcgd"),
        *("--finetune-lr", "0.05,0.01", "--lr-examples", "4"),
    ],
}


def prepare(folder):
    """The model of tests/golden and a few documents in its vocabulary."""
    for name in ("model.pt", "dict.txt"):
        shutil.copy(GOLDEN / name, folder)
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
    shutil.copytree(GOLDEN / "mr", folder / "golden" / "mr")
    (folder / "data").mkdir()
    shutil.copy(GOLDEN / "dict.txt", folder / "data")
    size = len((GOLDEN / "dict.txt").read_text().splitlines()) + 4
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data" / "valid", size) as writer:
        for length in (5, 40, 2, 18):
            writer.add(np.append(draw.integers(4, size, size=length), 2))


def measure(task, out, *more):
    """In the folder of :func:`prepare`."""
    assert evaluate.main(["--task", task, *COMMANDS[task], "--results-dir", str(out), *more]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    prepare(folder)
    for task in COMMANDS:
        shutil.copytree(BEFORE / task, folder / task)
    return folder


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)


def close(old, new, where=""):
    """Numbers to rounding, everything else exactly; keys may have come. What depends on the clock or the versions is
    left out."""
    if isinstance(old, dict):
        for name in old.keys() - {"seconds", "versions", "command", "digest"}:
            close(old[name], new[name], f"{where}.{name}")
    elif isinstance(old, list):
        assert len(old) == len(new), where
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            close(one, other, f"{where}[{i}]")
    else:
        assert new == (pytest.approx(old, rel=1e-3, abs=2e-4) if isinstance(old, float) else old), where


@pytest.mark.parametrize("task", COMMANDS)
def test_what_is_measured_now_is_what_was_measured(task, home, capsys):
    measure(task, f"{task}-now")
    old, new = (read_results(home / name) for name in (task, f"{task}-now"))
    close(old, new)
    if task != "lm_perplexity":
        lines = [
            [json.loads(line) for line in (home / name / "predictions.jsonl").open()] for name in (task, f"{task}-now")
        ]
        close(*lines)
    assert report.main([task, f"{task}-now", "--output", "compare.html"]) == 0
    assert f"vs {task}" in capsys.readouterr().out or task == "icl_finetune_analysis"


@pytest.mark.parametrize("task", COMMANDS)
def test_an_older_folder_is_continued(task, home, capsys):
    before = (home / task / "results.json").read_bytes()
    measure(task, task)
    assert "holds all of these results already" in capsys.readouterr().out
    assert (home / task / "results.json").read_bytes() == before
    assert (home / task / "report.html").exists()


def test_an_older_journal_is_continued(home, capsys):
    """Scores are there, whole for one unit and in part for another; the runs are not."""
    out = home / "journal"
    (out / "scores").mkdir(parents=True)
    for path in (BEFORE / "icl_classification" / "scores").glob("*.npz"):
        shutil.copy(path, out / "scores")
    shutil.copy(BEFORE / "unfinished" / "mr-2shot-seed1-order0.0.jsonl", out / "scores")
    (out / "scores" / "mr-2shot-seed1-order0.npz").unlink()
    kept = {path.name: path.read_bytes() for path in (out / "scores").glob("*.npz")}
    measure("icl_classification", out)
    assert all(
        (out / "scores" / name).read_bytes() == content for name, content in kept.items()
    )  # none was scored again
    assert not list((out / "scores").glob("*.jsonl"))
    close(read_results(BEFORE / "icl_classification"), read_results(out))
    assert capsys.readouterr().out
