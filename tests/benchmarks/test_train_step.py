"""The benchmark of a training step, on a tiny shape: every variant runs, and the ratio over pairs of
steps is theirs.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "train_step.py"


@pytest.mark.nightly
@pytest.mark.parametrize("family,variants", [("gpt", 5), ("llama", 3)])
def test_every_variant_is_measured(family, variants, tmp_path):
    flags = f"--family {family} --shape tiny --length 16 --batch 2 --vocab 99 --rounds 1 --steps 1 --pairs 2".split()
    command = [sys.executable, SCRIPT, *flags, "--threads", "1", "--json", tmp_path / "out.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    rows = [row for rows in found["results"].values() for row in rows]
    assert len(rows) == variants and all(
        len(row["seconds"]) == 1 and min(row["seconds"]) > 0 < row["peak_mib"] for row in rows
    )
    assert [len(times["seconds"]) for times in found["pairs"].values()] == [2, 2] and min(found["ratios"].values()) > 0
    assert "2 pairs of 1 x 16 tokens" in done.stdout
    few = subprocess.run([sys.executable, SCRIPT, "--pairs", "1"], capture_output=True, text=True, check=False)
    assert few.returncode != 0 and "--pairs: at least 2" in few.stderr


@pytest.mark.nightly
def test_the_cost_of_filters(tmp_path):
    flags = "--shape tiny --length 16 --batch 1 --vocab 99 --pairs 2 --threads 1 --json".split()
    command = [sys.executable, SCRIPT, *flags, tmp_path / "out.json", "--filters", "fir@values,ema@depth"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[3:]]
    assert [row[:2] for row in rows] == [["| fir", "values"], ["| ema", "depth"]]
    found = json.loads((tmp_path / "out.json").read_text())["filters"]
    assert [(found[name]["times"], len(found[name]["seconds"])) for name in ("fir@values", "ema@depth")] == [
        (3, 2),
        (2, 2),
    ]
    share = 1 + 3 * sum(cpu for _, cpu in found["fir@values"]["seconds"]) / 2 / min(cpu for _, cpu in found["step"])
    assert float(rows[0][3].rstrip(" |")) == pytest.approx(share, abs=1e-3)
    command[-1] = "fir@depth"
    refused = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and refused.stderr.startswith("error: --filters fir@depth: choose from ema@")


def test_the_ratio_is_of_the_pairs():
    spec = importlib.util.spec_from_file_location("train_step_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    drifting = {"gpt_lm": {"seconds": [1.0, 2.0, 4.0]}, "momentum_lm": {"seconds": [1.02, 2.0, 4.08]}}
    ratio, low, high = benchmark.ratio_of_pairs(drifting, "seconds")
    assert ratio == pytest.approx((1.02**2) ** (1 / 3)) and 0.98 < low < ratio < high < 1.05
