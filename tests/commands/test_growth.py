"""examples/momentum_vs_vanilla/growth.py on rows made up so that the right differences are known."""

import importlib
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from momentum_lm.analysis.statistics import Interval

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
    assert lines[0][:7] == ["results in", "form", "variant", "against", "context", "tokens", "seeds"]
    assert lines[0][7:] == ["1/10", "2/10", "4/10", "6/10", "8/10", "10/10"]
    assert [line[:7] for line in lines[2:]] == [
        [tmp_path.name, form, "ema", "vanilla", "256", "1.02e+06", "3"] for form in ("llama", "llama_10m")
    ]
    for line, parts in ((lines[2], [0.2, 0.1, 0.06, 0.04, 0.02, 0.01]), (lines[3], [0.05] * 6)):
        for cell, gap in zip(line[7:], parts, strict=True):
            half = 4.302653 * gap / 2 / math.sqrt(3)  # Student's 97.5% point with two degrees of freedom
            low, mean, high = (f"{math.expm1(-gap + shift):+.1%}" for shift in (-half, 0, half))
            assert cell == f"{mean} ({low} to {high})"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: [*found[1:], found[0] | {"training_loss": [7.0]}],
            "the training losses of ema and vanilla (llama)",
        ),
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


def test_curves_are_told_apart_by_what_differs_in_them(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    growth = importlib.import_module("growth")
    gap = Interval(0.0, -0.1, 0.1, 3)
    made = [
        growth.Curve("llama", "ema", "vanilla", source, 256, [tokens / 10, tokens], [gap, gap])
        for source, tokens in (("study", 1e6), ("study", 8e6), ("news", 1e6))
    ]
    assert growth.names(made[:1]) == ["llama, n = 3"]
    assert growth.names(made) == [
        "llama, tokens 1e+06, results in study, n = 3",
        "llama, tokens 8e+06, results in study, n = 3",
        "llama, tokens 1e+06, results in news, n = 3",
    ]
    axes = Figure().subplots()
    growth.panel(made, "")(axes)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert [*lines["llama, tokens 8e+06, results in study, n = 3"].get_ydata()] == [0.0]  # all parts but the first
    (low, high) = axes.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((100 * math.expm1(-0.1), 100 * math.expm1(0.1)))
