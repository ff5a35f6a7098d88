"""Stages of gpu_checks.py that look at the device and at the kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
from clock import seconds_each
from gpu_job import ROOT, Job

import fairseq_compat  # noqa: F401  (before fairseq: no .pth file may be read here)

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "transformers",
    "hydra",
    "omegaconf",
    "fairseq",
    "bitarray",
    "sentencepiece",
    "matplotlib",
)

KERNELS = "tests/ops/triton_kernel.py"
# Representative checks, those first that training uses.
CHOSEN = (
    "test_shapes_of_training[8-16-2048-64-False-False]",
    "test_is_the_equation[33-True-True-bfloat16]",
    "test_the_public_function_takes_the_kernel",
    "test_is_the_equation[64-False-False-float32]",
    "test_shapes_of_training[3-25-1023-80-True-True]",
    "test_is_the_equation[130-True-False-float16]",
    "test_is_the_equation[1000-False-True-bfloat16]",
    "test_strides[dtype1]",
    "test_heads_that_share_values[True-3-bfloat16]",
    "test_state_splits_a_sequence_anywhere",
    "test_a_segment_is_blind_to_those_around_it_bit_for_bit[bfloat16]",
    "test_gradient_of_a_sum_comes_without_strides",
    "test_decay_and_state_of_other_precisions",
    "test_compiles_without_graph_breaks[True]",
    "test_blocks_of_a_decoder_compile_without_graph_breaks[options0]",
)
MINIATURE = ("test_once_differentiable", "test_is_the_equation[1-True-False-bfloat16]")


def device(job: Job) -> None:
    """The device, versions, copy bandwidth and the bf16 matrix product."""
    job.record(cpus=os.cpu_count())
    versions: dict[str, Any] = {"Python": platform.python_version(), "CUDA": torch.version.cuda}
    for name in PACKAGES[: 2 if job.smoke else None]:
        with job.part(f"import {name}"):
            module = importlib.import_module(name)
            versions[name] = str(getattr(module, "__version__", "")) or importlib.metadata.version(name)
            job.record(versions=versions)
    if job.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        job.record(
            capability=f"{properties.major}.{properties.minor}",
            memory_gib=properties.total_memory / 2**30,
            multiprocessors=properties.multi_processor_count,
        )
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            job.record(driver=done.stdout.strip())
    with job.part("copy"):
        source = torch.randn(2**14 if job.smoke else 2**30, device=job.device).bfloat16()
        source.clone()
        seconds = statistics.median(seconds_each([source.clone] * 10, job.device))
        job.record(copy_tb_per_s=2 * source.nbytes / seconds / 1e12)
    with job.part("matrix product"):
        size = 64 if job.smoke else 8192
        a, b = (torch.randn(size, size, device=job.device).bfloat16() for _ in range(2))
        for _ in range(3):
            a @ b
        seconds = statistics.median(seconds_each([lambda: a @ b] * 10, job.device))
        job.record(matmul_tflops=2 * size**3 / seconds / 1e12)


class Recorder:
    """A plugin of pytest: runs the tests of these names (None: all), in their order, and records each as it ends."""

    def __init__(self, job: Job, names: Sequence[str] | None) -> None:
        self.job, self.names = job, names
        self.tests: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.names is None:
            return
        known = {item.name: item for item in items}
        items[:] = [known[name] for name in self.names if name in known]
        missing = [name for name in self.names if name not in known]
        if missing:
            self.job.errors["there is no test"] = ", ".join(missing)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("::")[2]
        if report.outcome == "failed":
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.tests[name] = "failed: " + " ".join(str(reason).split())[:300]
        elif report.when == "call" or report.outcome == "skipped":
            self.tests.setdefault(name, report.outcome)
        outcomes = list(self.tests.values())
        failed = {name: outcome for name, outcome in self.tests.items() if outcome.startswith("failed")}
        counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "skipped")}
        self.job.record(**counts, failed=len(failed), failures=failed)


def run_tests(job: Job, path: str, names: Sequence[str] | None) -> None:
    """Tests of the repository on the device."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed there
    import pytest

    os.chdir(ROOT)
    flags = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "--tb=short"]
    flags += ["-o", "filterwarnings=default"]  # there may be another torch, whose warnings say nothing of kernels
    recorder = Recorder(job, names)
    code = pytest.main([*flags, path], plugins=[recorder])
    if code not in (0, 1):
        job.errors["pytest"] = f"status {code}"
    if job.results.get("failed"):
        job.errors["tests"] = f"{job.results['failed']} failed"


def kernels(job: Job) -> None:
    """The chosen tests of the kernels."""
    run_tests(job, KERNELS, MINIATURE if job.smoke else CHOSEN)


def all_kernels(job: Job) -> None:
    """All of them."""
    run_tests(job, KERNELS, MINIATURE[:1] if job.smoke else None)


def ema_speed(job: Job) -> None:
    """The shapes of ema_kernel.py, one after the other; the first is the one with a goal."""
    import ema_kernel

    shapes, count = ([ema_kernel.SMALL], 2) if job.smoke else (ema_kernel.SHAPES, ema_kernel.SETS)
    found: dict[str, Any] = {}
    for shape in shapes:
        label = ema_kernel.label(shape)
        if job.left() < 5:
            print(f"no time for {label}")
            break
        with job.part(label):
            for name, row in ema_kernel.measure(shape, torch.device(job.device), count):
                found.setdefault(label, {})[name] = row
                first = found[ema_kernel.label(shapes[0])]
                of_copy = {name: row["of_copy"] for name, row in first.items() if "of_copy" in row}
                job.record(shapes=found, of_copy=of_copy, speedup=first.get("both ways", {}).get("speedup"))
        if job.device == "cuda":
            torch.cuda.empty_cache()


def launch(job: Job) -> None:
    """Other launch parameters for the first shape."""
    import ema_kernel

    shape, count, tried = (ema_kernel.SMALL, 2, [None]) if job.smoke else (ema_kernel.SHAPES[0], ema_kernel.SETS, None)
    rows: list[Any] = []
    for row in ema_kernel.tune(torch.device(job.device), shape, count, tried):
        rows.append(row)
        best, ours = (min(rows, key=lambda row: row[0]), next(row for row in rows if row[1] == "chosen"))
        job.record(
            rows=sorted(rows, key=lambda row: row[0])[:20], best=str(best[1]), gain=ours[0] / best[0], tried=len(rows)
        )
    assert rows, "no launch parameters ran"
