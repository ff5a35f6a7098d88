"""The benchmark of ICL against finetuning, on a small random model: the authors' procedure, written anew, finds what
ours finds.
"""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "analysis.py"


@pytest.mark.nightly
def test_both_find_the_same(model_and_data, tmp_path):
    flags = [
        "--shots",
        "4",
        "--examples",
        "6",
        "--learning-rate",
        "0.5",
        "--threads",
        "1",
        "--json",
        tmp_path / "out.json",
    ]
    paths = ["--model", model_and_data / "model", "--data-dir", model_and_data]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, [*paths, *flags])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ratio: time" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())
    ours, authors = results["ours"], results["authors"]
    for name, values in authors["metrics"].items():
        assert ours["metrics"][name] == pytest.approx(values, abs=1e-5), name
    assert len(authors["metrics"]["simaou"]) == 2 and min(map(abs, authors["metrics"]["simaou"])) > 0.001
    assert ours["predictions"] == authors["predictions"] and authors["bytes"] > 0 < ours["bytes"]


def test_what_differs_is_found():
    spec = importlib.util.spec_from_file_location("analysis_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    mine = {
        "metrics": {name: [0.1, 0.2] for name in benchmark.METRICS},
        "rec2ftp": 0.5,
        "predictions": {"zero_shot": [0, 1]},
    }
    assert benchmark.compare(mine, copy.deepcopy(mine)) == []
    theirs = copy.deepcopy(mine) | {"rec2ftp": None, "predictions": {"zero_shot": [1, 1]}}
    theirs["metrics"]["simam"][1] = float("nan")
    failures = benchmark.compare(mine, theirs)
    assert [line.split(":")[0] for line in failures] == ["zero_shot", "Rec2FTP", "simam"]
