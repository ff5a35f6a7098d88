"""The benchmark of the fused kernels: without a GPU it says so; the calls that it times are the EMA and
its gradient.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "ema_kernel.py"

CALLS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("ema_kernel_benchmark", sys.argv[1])
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
from momentum_lm.ops import ema, ema_naive
sets, log_decay = benchmark.make_sets((1, 2, 40, 8, torch.float32), "cpu", count=2)
calls = benchmark.kernel_calls(sets, log_decay, None)
assert calls["forward"][1] == 3 * calls["backward"][1] // 2 == 3 * sets[0][0].nbytes
for index, (values, addend, grad) in enumerate(sets):
    plain = benchmark.both_ways(ema_naive, values, addend, grad, log_decay)
    out, _ = ema_naive(values, log_decay, None, None, addend)
    for name in ("", ", learned"):
        torch.testing.assert_close(calls["forward" + name][0][index]()[0], out)
        torch.testing.assert_close(calls["backward" + name][0][index]()[0], plain[0])
    torch.testing.assert_close(benchmark.both_ways(ema, values, addend, grad, log_decay), plain)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.nightly
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.nightly
def test_it_times_the_ema(run_cli):
    pytest.importorskip("triton")
    done = run_cli(["python", "-c", CALLS, SCRIPT], env={"TRITON_INTERPRET": 1})
    assert done.returncode == 0, done.stderr
