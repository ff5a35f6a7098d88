"""What oneDNN keeps for each shape must not add up over an evaluation."""

import subprocess
import sys

CODE = """
import resource
import torch
import torch.nn.functional as F
from momentum_lm.lm.cpu_fast import OneDNNLinear, limit_onednn_caches
limit_onednn_caches()
weight, rows = torch.randn(576, 576), torch.randn(800, 576)
def run(lengths):
    with torch.inference_mode(), OneDNNLinear():
        for length in lengths:
            F.linear(rows[:length], weight)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run([800, *range(10, 110)])
print(run(range(110, 700)) - before)
"""


def test_hundreds_of_shapes_cost_no_memory():
    grown = int(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
    assert grown < 250_000, (
        f"{grown} KiB for 590 shapes"
    )  # 580,000 where oneDNN keeps all; the outputs' own memory is 100,000
