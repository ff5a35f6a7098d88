"""The quickstart on a small text: whole, twice, killed in between, and with a stage that fails."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/quickstart.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Python's own standard library, one file a document: text that is there wherever the tests run."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:120]:
        text = path.read_text(encoding="utf-8", errors="ignore")[:4000]
        (folder / f"{path.stem}.txt").write_text(text)
    return folder


def arguments(corpus, output):
    return [
        "python",
        SCRIPT,
        "--corpus",
        corpus,
        "--output",
        output,
        "--skip",
        "icl,finetuning",
        "--seconds",
        "1",
        "--vocab-size",
        "400",
    ]


@pytest.mark.slow
def test_quickstart_survives_kill_dash_nine_and_reports(corpus, cli_command, run_cli, tmp_path):
    output = tmp_path / "out"
    command, environment = cli_command(arguments(corpus, output))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not list(output.glob("runs/*/train.log")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)  # the trainings that it started live on, and are waited for
    process.wait()

    done = run_cli(arguments(corpus, output))
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    config = json.loads((output / "config.json").read_text())
    page = (output / "report.html").read_text()
    assert summary["tokens_per_run"] == config["updates"] * 256 * 8
    assert config["updates"] == 10
    assert config["timing"]["seconds_per_update"] > 0
    assert list(summary["forms"]) == ["GPT form", "Llama form"]
    for rows in summary["forms"].values():
        assert [row["context_length"] for row in rows] == [64, 256]
    for row in (row for rows in summary["forms"].values() for row in rows):
        for model in row["models"].values():
            assert len(model["by_seed"]) == 2
            assert model["perplexity"] == pytest.approx(math.sqrt(model["by_seed"][0] * model["by_seed"][1]))
            assert f"{model['perplexity']:.1f}" in page
            assert row["context_length"] < 256 or f"{model['perplexity']:.1f}" in done.stdout
            assert model["perplexity"] < 404  # better than no knowledge at all
            assert 0 < model["bits_per_byte"] < 8
        plain, momentum = row["models"].values()
        assert row["difference"]["ratio"] == pytest.approx(momentum["perplexity"] / plain["perplexity"])
        assert row["difference"]["low"] <= row["difference"]["difference"] <= row["difference"]["high"]
    assert summary["unigram_perplexity"] < 404
    assert summary["verdict"] in done.stdout
    assert "tensorboard --logdir" in done.stdout
    assert page.count("<svg role") == 2 and page.count('class="forest"') == 1
    assert summary["verdict"] in page
    assert len(list(output.glob("tensorboard/*/model/events*"))) >= 8
    assert (output / "quickstart.png").read_bytes().startswith(b"\x89PNG")

    stamps = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/checkpoint_last.pt")}
    assert len(stamps) == 8
    start = time.time()
    again = run_cli(arguments(corpus, output))
    assert again.returncode == 0, again.stderr
    assert time.time() - start < 60
    assert stamps == {path: path.stat().st_mtime_ns for path in output.glob("runs/*/checkpoint_last.pt")}
    assert summary["verdict"] in again.stdout

    other = run_cli([*arguments(corpus, output)[:-1], "300"])
    assert other.returncode == 2
    assert "vocab_size" in other.stderr


def test_a_stage_that_fails_says_where_and_how_to_go_on(run_cli, tmp_path):
    (tmp_path / "empty").mkdir()
    failed = run_cli(arguments(tmp_path / "empty", tmp_path / "out"))
    assert failed.returncode == 1
    assert "stage 2, tokenizer and binarised data, failed" in failed.stderr
    assert "prepare.log" in failed.stderr
    assert str(tmp_path / "empty") in failed.stderr
    assert "same command again" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_pretrained_model_is_evaluated_and_every_number_can_be_traced(run_cli, tmp_path):
    """SmolLM2-135M on MR, out of packages; the pretraining is left out."""
    output = tmp_path / "out"
    command = ["python", SCRIPT, "--output", output, "--fast", "--skip", "pretraining"]
    done = run_cli(command, timeout=1200)
    assert done.returncode == 0, done.stderr
    page, summary = (output / "report.html").read_text(), json.loads((output / "summary.json").read_text())
    assert summary["in_context"] in done.stdout
    runs = json.loads((output / "icl/results.json").read_text())["runs"]
    zero = next(run for run in runs if run["shots"] == 0 and run["calibration"] == "none")
    assert f"is right about {100 * zero['accuracy']:.1f}% and " in summary["in_context"]
    (analysed,) = json.loads((output / "finetuning/results.json").read_text())["runs"]
    assert f"{100 * analysed['accuracy']['finetuned']:.1f}%" in page
    assert all(
        (output / name / "report.html").exists() and f'href="{name}/report.html"' in page
        for name in ("icl", "finetuning")
    )
    stamp = (output / "finetuning/results.json").stat().st_mtime_ns
    assert run_cli(command, timeout=120).returncode == 0
    assert (output / "finetuning/results.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seconds", "0"], "--seconds 0"),
        (["--corpus", "absent"], "--corpus absent"),
        (["--skip", "training"], "--skip training: choose from pretraining, icl, finetuning"),
        (["--skip", "icl,finetuning,pretraining"], "--skip icl,finetuning,pretraining: nothing is left"),
    ],
)
def test_bad_flags(run_cli, tmp_path, changes, message):
    failed = run_cli(["python", SCRIPT, "--output", tmp_path / "out", *changes])
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(run_cli, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    failed = run_cli(["python", SCRIPT, "--output", tmp_path, "--corpus", tmp_path])
    assert failed.returncode == 2
    assert "not a quickstart's folder" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
