"""examples/momentum_vs_vanilla/growth.py on rows made up so that the right differences are known."""

import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/momentum_vs_vanilla/growth.py"


def rows(form, gaps, seeds=(1, 2, 3)):
    """ema is better than vanilla by ``gaps`` nats, a tenth each: in seed 1 by half of it, in seed 3 by 1.5 times."""
    made = []
    for variant, share in (("vanilla", 0.0), ("ema", -1.0)):
        for seed in seeds:
            losses = [7 - part / 3 + seed / 10 + share * gap * seed / 2 for part, gap in enumerate(gaps)]
            made.append({
                "form": form, "variant": variant, "lr": 6e-3, "seed": seed, "split": "test", "context_length": 256,
                "perplexity": 200.0, "training_loss": losses,
            })  # fmt: skip
    return made


def write(path, rows, **settings):
    path.write_text(json.dumps({"settings": settings, "runs": rows}))
    return path


def test_differences_by_tenths_of_training(run_cli, tmp_path):
    gaps = [0.2, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01]
    results = write(tmp_path / "r.json", [*rows("llama", gaps), *rows("llama_10m", [0.05] * 10)], tokens=1.024e6)
    picture = tmp_path / "growth.png"
    done = run_cli(["python", SCRIPT, results, "--picture", picture], warm=True)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert lines[0] == [
        "form",
        "variant",
        "against",
        "context",
        "tokens",
        "seeds",
        "2/10",
        "4/10",
        "6/10",
        "8/10",
        "10/10",
    ]
    assert [line[:6] for line in lines[2:]] == [
        [form, "ema", "vanilla", "256", "1.02e+06", "3"] for form in ("llama", "llama_10m")
    ]
    for line, parts in ((lines[2], [0.1, 0.06, 0.04, 0.02, 0.01]), (lines[3], [0.05] * 5)):
        for cell, gap in zip(line[6:], parts, strict=True):
            half = 4.302653 * gap / 2 / math.sqrt(3)  # Student's 97.5% point with two degrees of freedom
            low, mean, high = (f"{math.expm1(-gap + shift):+.1%}" for shift in (-half, 0, half))
            assert cell == f"{mean} ({low} to {high})"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:2], "no two seeds of ema and vanilla,fir3 on test in"),
        (lambda found: [*found, found[0] | {"lr": 3e-3}], "vanilla (llama) has test results at the learning rates"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run_cli, tmp_path, change, message):
    results = write(tmp_path / "r.json", change(rows("llama", [0.1] * 10)), tokens=1.024e6)
    failed = run_cli(["python", SCRIPT, results], warm=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)
    assert failed.stderr.startswith(f"error: {message}")
    failed = run_cli(["python", SCRIPT, write(tmp_path / "s.json", rows("llama", [0.1] * 10))], warm=True)
    assert failed.returncode == 2 and "does not say on how many tokens" in failed.stderr
    failed = run_cli(["python", SCRIPT, tmp_path / "none.json"], warm=True)
    assert failed.returncode == 2 and "does not exist" in failed.stderr
