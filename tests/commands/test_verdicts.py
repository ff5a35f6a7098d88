"""examples/momentum_vs_vanilla/verdicts.py on rows made up so that the right verdicts are known."""

import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/momentum_vs_vanilla/verdicts.py"
LOSSES = {  # mean test loss against ema's, and how far seeds are from it
    "vanilla": (0.050, 0.005),  # gain
    "fir3": (0.001, 0.002),  # tie
    "shift": (0.012, 0.009),  # gain, its size not settled
    "smear": (-0.030, 0.02),  # never compared: not the best of one lag on valid
    "kv_shift": (0.1, 0.0),
    "shift_values": (0.1, 0.0),
}


def row(variant, lr, seed, split, loss, form="llama"):
    return {
        "form": form, "variant": variant, "lr": lr, "seed": seed, "split": split, "context_length": 256,
        "perplexity": math.exp(loss),
    }  # fmt: skip


@pytest.fixture
def rows():
    found = []
    for number, (variant, (gap, spread)) in enumerate({"ema": (0.0, 0.0), **LOSSES}.items()):
        best = 3e-3 * (1 + number % 2)  # on valid; the other rate is better on test, which must not count
        for lr in (3e-3, 6e-3):
            for seed in (101, 102):
                worse = 0.0 if lr == best else 0.1
                found.append(row(variant, lr, seed, "valid", 5 + 0.1 * (variant != "shift") + worse))
            for seed in range(1, 9):
                wobble = spread * (1 if seed % 2 else -1)
                found.append(row(variant, lr, seed, "test", 5 + seed / 10 + gap + wobble - (lr != best)))
    return found


def write(path, rows):
    path.write_text(json.dumps({"settings": {}, "runs": rows}))
    return path


def test_verdicts_by_the_plan(run_cli, tmp_path, rows):
    picture = tmp_path / "verdicts.png"
    results = write(tmp_path / "results.json", rows)
    done = run_cli(["python", SCRIPT, results, "--form", "llama", "--picture", picture], warm=True)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [line[:4] for line in cells] == [
        ["llama", "vanilla", "0.003, 0.006", "8"],
        ["llama", "fir3", "0.003, 0.003", "8"],
        ["llama", "shift", "0.003, 0.006", "8"],
    ]
    assert [line[4] for line in cells] == ["-4.9%", "-0.1%", "-1.2%"]
    assert [line[-1] for line in cells] == ["gain", "tie", "gain, its size not settled"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named_and_still_corrected_for(run_cli, tmp_path, rows):
    some = [r for r in rows if r["variant"] not in ("fir3", "smear")]
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", some), "--form", "llama,gpt"], warm=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("not there yet")] == [
        "not there yet: llama: ema against fir3",
        "not there yet: llama: ema against the best filter of one lag",
        "not there yet: gpt: ema against vanilla",
        "not there yet: gpt: ema against fir3",
        "not there yet: gpt: ema against the best filter of one lag",
    ]


def test_an_interval_that_is_too_wide_is_open_and_asks_for_seeds(run_cli, tmp_path, rows):
    for r in rows:
        if r["variant"] == "vanilla" and r["split"] == "test":
            r["perplexity"] *= math.exp(0.08 * (-1) ** r["seed"] - 0.05)
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", rows), "--form", "llama"], warm=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2].endswith("| open |")
    assert "llama, vanilla: the interval is +-" in done.stdout and "the plan adds seeds" in done.stdout


def test_refusals_are_one_line(run_cli, tmp_path, rows):
    theirs = tmp_path / "theirs.png"
    theirs.write_bytes(b"\x89PNG of someone")
    results = write(tmp_path / "results.json", rows)
    for words, message in (
        ([tmp_path / "none.json"], f"{tmp_path / 'none.json'} does not exist"),
        ([results, "--form", "gpt"], f"{results} has no comparison of the plan yet: gpt: ema against vanilla"),
        ([results, "--form", "bert"], "--form bert: choose from"),
        ([results, "--form", "llama", "--picture", theirs], f"--picture {theirs} is there and not our picture"),
    ):
        failed = run_cli(["python", SCRIPT, *words], warm=True)
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
        assert failed.stderr.startswith(f"error: {message}")
    assert theirs.read_bytes() == b"\x89PNG of someone"
