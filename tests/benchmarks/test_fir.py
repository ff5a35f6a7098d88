"""The benchmark of the filter of a few taps: what it times is the filter."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "fir.py"
CALLS = """
import importlib.util, sys, torch
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
spec = importlib.util.spec_from_file_location("fir_benchmark", sys.argv[1])
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
from momentum_lm.ops import fir_naive
for length, channels in ((1, 6), (9, 128)):
    x, weights = torch.randn(2, length, channels, requires_grad=True), torch.randn(4, channels, requires_grad=True)
    expected = fir_naive(x[:, None], weights[:, None])[0][:, 0]
    gradients = torch.autograd.grad(expected, (x, weights), torch.ones_like(expected))
    for name, form in benchmark.FORMS.items():
        torch.testing.assert_close(form(x, weights), expected)
        torch.testing.assert_close(benchmark.both_ways(form, x, weights, torch.ones_like(expected)), gradients)
"""


def test_it_times_the_filter(run_cli):
    done = run_cli(["python", "-c", CALLS, SCRIPT])
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_its_table_and_file(run_cli, tmp_path):
    small = "--lengths 1,8 --taps 3 --channels 8 --batch 1 --rounds 3 --json".split()
    done = run_cli(["python", SCRIPT, *small, tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["length"] for row in rows] == [1, 8] and len(rows[0]["ms"]) == 5
    assert len(done.stdout.splitlines()) == 4 and "channels last" in done.stdout
