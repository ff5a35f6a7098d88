"""The benchmark of in-context scoring, on a small random model: it agrees with plain transformers, and says so where it
does not.
"""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "icl_eval.py"


@pytest.mark.nightly
def test_ours_and_plain_transformers_agree(model_and_data, tmp_path):
    flags = ["--shots", "4", "--examples", "6", "--plain-examples", "3", "--repeats", "1", "--threads", "1"]
    paths = ["--model", model_and_data / "model", "--data-dir", model_and_data, "--json", tmp_path / "out.json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, paths), *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "a prompt per choice" in done.stdout and "(first 3)" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    ours, plain = results["ours"]["scores"], results["plain"]["scores"]
    assert len(ours) == 6 and len(plain) == 3 and all(len(row) == 2 for row in ours)
    assert [value for row in plain for value in row] == pytest.approx(
        [value for row in ours[:3] for value in row], abs=1e-4
    )
    assert len(results["ours"]["rows"][0]["wall"]) == 2 and all(
        row["ratio"] > 0 < row["cpu_ratio"] for row in results["plain"]["rows"]
    )


def test_what_differs_is_found():
    spec = importlib.util.spec_from_file_location("icl_eval", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    row = {"name": "one", "wall": [0.3, 0.1, 0.1], "cpu": [0.1]}
    ours = {"rows": [row], "scores": [[-1.0, -2.0], [-2.0, -1.999]]}
    theirs = {"rows": [{"name": "two", "wall": [0.5], "cpu": [0.4]}], "scores": [[-1.0005, -2.0], [-2.0, -1.999]]}
    examples = [{"gold": 0}, {"gold": 0}]
    table, failures = benchmark.compare(copy.deepcopy({"ours": ours, "lm_eval": theirs}), examples)
    assert failures == [] and "5.0x" in table and "4.0x" in table
    assert benchmark.compare(copy.deepcopy({"ours": ours, "plain": theirs}), examples)[1] == [
        "plain: a log-probability differs by 5.0e-04"
    ]
    theirs["scores"][1] = [-1.9985, -1.999]
    failures = benchmark.compare({"ours": ours, "lm_eval": theirs}, examples)[1]
    assert failures == ["lm_eval: the accuracies differ", "lm_eval: a log-probability differs by 1.5e-03"]
    theirs["scores"][1] = [float("nan"), -1.999]
    assert any(
        "log-probability" in failure for failure in benchmark.compare({"ours": ours, "lm_eval": theirs}, examples)[1]
    )
