"""examples/momentum_vs_vanilla/sweep.py on a small text: what it trains, what it does not train again, and what it
refuses.
"""

import json
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/momentum_vs_vanilla/sweep.py"
TWO_UPDATES = ["--tokens", "4096", "--splits", "valid", "--context-lengths", "16"]


@pytest.fixture(scope="module")
def swept(data, run_cli, tmp_path_factory):
    """The output folder of a sweep over one variant, trained and no more."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    done = run_cli(
        ["python", SCRIPT, data, "--output", output, "--variants", "vanilla", "--train-only", *TWO_UPDATES], warm=True
    )
    assert done.returncode == 0, done.stderr
    return output


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--lr", "1e-3"], "another lr (0.006 there, 0.001 now)"),
        (["--autocast", "bf16"], 'another autocast ("none" there, "bf16" now)'),
        (["--tokens", "4097"], "another tokens (4096.0 there, 4097.0 now)"),
        (["--variants", "ema_0.3", "--lr", "1e-3"], "another lr"),  # a variant that has not been trained yet
        (["DATA"], "another data"),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(swept, data, run_cli, tmp_path, change, difference):
    if change == ["DATA"]:
        shutil.copytree(data, tmp_path / "data")
        for end in ("bin", "idx"):
            shutil.copy(data / f"valid.{end}", tmp_path / "data" / f"train.{end}")
        data, change = tmp_path / "data", []
    before = stamps(swept)
    words = ["python", SCRIPT, data, "--output", swept, "--variants", "vanilla", *TWO_UPDATES, *change]
    failed = run_cli(words, warm=True)
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {swept / '4.1e+03' / 'config.json'} is of a sweep with {difference}")
    assert line.endswith(f"choose another --output, or remove {swept / '4.1e+03'}")
    assert stamps(swept) == before


def test_a_run_that_fails_ends_the_sweep_at_once(data, run_cli, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "dict.txt").unlink()
    words = ["python", SCRIPT, tmp_path / "data", "--output", tmp_path / "out", "--jobs", "1", *TWO_UPDATES]
    failed = run_cli(words, warm=True)
    assert failed.returncode == 1
    assert "error: train (" in failed.stderr and "dict.txt" in failed.stderr and "Traceback" not in failed.stderr
    assert [path.parts[-3] for path in tmp_path.glob("out/*/*/seed1/train.log")] == ["vanilla"]
    assert not list(tmp_path.glob("out/results*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "vanila"], "--variants vanila: choose from vanilla, ema_0.1"),
        (["--seeds", "x"], "--seeds x"),
        (["--tokens", "100"], "--tokens 100: must be at least 2048"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_bad_flags_are_one_line(data, run_cli, tmp_path, words, message):
    failed = run_cli(["python", SCRIPT, data, "--output", tmp_path / "out", *words], warm=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1) and failed.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_trained_is_kept_and_compared(swept, data, run_cli):
    words = ["python", SCRIPT, data, "--output", swept, "--variants", "vanilla,ema_0.3", *TWO_UPDATES]
    checkpoint = swept / "4.1e+03" / "vanilla" / "seed1" / "checkpoint_last.pt"
    trained = checkpoint.stat().st_mtime_ns
    for _ in range(2):
        done = run_cli(words, warm=True)
        assert done.returncode == 0, done.stderr
        assert checkpoint.stat().st_mtime_ns == trained
        results = json.loads((swept / "results_4.1e+03.json").read_text())
        assert [(r["variant"], r["split"], r["context_length"]) for r in results["runs"]] == [
            ("vanilla", "valid", 16),
            ("ema_0.3", "valid", 16),
        ]
        assert results["lr"] == 0.006
        vanilla, ema = (r["perplexity"] for r in results["runs"])
        assert f"| vanilla | 1 | {vanilla:.1f} |" in done.stdout
        assert f"| ema_0.3 | 1 | {ema:.1f} | {ema / vanilla - 1:+.1%} |" in done.stdout
