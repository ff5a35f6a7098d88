"""The fused kernels: against the equation, in a process of their own, and compiled ahead of time for two generations of
GPUs.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from momentum_lm.ops import ema

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LARGEST_BLOCK = 99 * 1024  # bytes of shared memory that one program can have on every GPU since the A100

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def tool_exists(name):
    spec = importlib.util.find_spec("triton")
    return spec is not None and (Path(spec.origin).parent / "backends/nvidia/bin" / name).exists()


@needs_triton
@pytest.mark.parametrize(("file", "tests"), [("triton_kernel.py", 70), ("triton_fir_kernel.py", 20)])
def test_kernels_compute_the_equation(run_cli, file, tests):
    """Triton decides when it is imported whether to interpret, for the whole process: other tests compile."""
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": 1}
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", HERE / file]
    result = run_cli(command, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= tests


@pytest.mark.nightly
@pytest.mark.skipif(
    not (tool_exists("ptxas") and tool_exists("cuobjdump")), reason="Triton's compiler for CUDA is not installed"
)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_ahead_of_time_without_spilling(arch, run_cli, tmp_path):
    environment = {"TRITON_CACHE_DIR": tmp_path, "TRITON_INTERPRET": 0, "PYTHONPATH": ROOT}
    result = run_cli(["python", HERE / "triton_compile.py", arch], env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == 42
    for one in compiled:
        half = one["dtype"] != "torch.float32"
        assert one["cubin"] > 0 and one["spilled"] == 0, one
        if one["kernel"].startswith("fir"):
            continue
        assert one["shared"] <= LARGEST_BLOCK and one["copies_ahead"], one
        assert one["tensor_cores"] == ({80: "mma", 90: "wgmma"}[arch] if half else None), one


def test_a_cpu_never_imports_triton(run_cli):
    code = """
import sys, torch
from momentum_lm.model import Decoder, DecoderConfig
decoder = Decoder(DecoderConfig(50, 16, 32, 2, 2, momentum_kind="ema", momentum_learned=True))
decoder.loss(torch.randint(4, 50, (2, 9)), torch.randint(4, 50, (2, 9))).backward()
assert "triton" not in sys.modules and "momentum_lm.ops.triton" not in sys.modules
"""
    assert run_cli(["python", "-c", code], cwd=ROOT).returncode == 0


def test_without_a_gpu_plain_torch_computes():
    values = torch.randn(1, 2, 9, 4, requires_grad=True)
    assert "_EMA" in ema(values, torch.tensor([0.5, 0.9]).log())[0].grad_fn.name()
