"""The benchmark of the data path, on little data: the two tasks' batches are the same, and what is too slow is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "data_path.py"


@pytest.mark.nightly
def test_both_tasks_give_the_same_batches(tmp_path):
    flags = [
        "--tokens",
        "3e5",
        "--documents",
        "400",
        "--length",
        "64",
        "--vocab",
        "500",
        "--workers",
        "0",
        "--seconds",
        "0.1",
    ]
    command = [sys.executable, SCRIPT, *flags, "--json", tmp_path / "out.json", "--consumed"]
    done, slow = (
        subprocess.run([*map(str, command), n], capture_output=True, text=True, check=False) for n in ("1", "1e15")
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "start at 90%, ms" in done.stdout and "tokens/s from the disk" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["results"]["400"]
    assert results["stock"]["batches"] == results["ours"]["batches"]
    assert (
        results["ours"]["read"] < 2e5 < 6e5 < results["stock"]["read"]
    )  # the index and the dictionary, and all the tokens
    assert slow.returncode == 1 and "less than 5 times what is consumed" in slow.stderr
