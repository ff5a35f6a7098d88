"""Stage of gpu_checks.py that trains with ``fairseq-train`` on the device, beside losses of a CPU made beforehand."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_job import ROOT, Job
from scaling import make_data

import fairseq_compat  # noqa: F401  (before fairseq: no .pth file may be read here)

TRAINING = """--user-dir {root}/momentum_lm --task momentum_language_modeling --criterion chunked_cross_entropy
    --optimizer fused_adamw --arch momentum_lm_tiny --momentum-learned --clip-norm 1.0 --lr 3e-3
    --lr-scheduler inverse_sqrt --warmup-updates 10
    --tokens-per-sample {length} --batch-size 8 --max-update {updates} --num-workers 0 --disable-validation --no-save
    --log-interval 1 --log-format json --seed 1"""
# Flags of a run, the reference that its losses are compared with, and whether it needs a GPU; by value.
VARIANTS = {
    "fp32": ("--autocast none", "fp32", False),
    "bf16": ("--autocast bf16", "fp32", False),
    "compiled": ("--autocast bf16 --compile", "fp32", True),
    "packed": ("--autocast none --packed-documents", "packed", False),
    "fp16": ("--fp16 --fp16-no-flatten-grads --fp16-init-scale 4", "fp32", True),
}
SMALL = "--decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2"


def sizes(smoke: bool) -> tuple[int, int]:
    """Updates and tokens of a sample."""
    return (4, 16) if smoke else (40, 256)


class Losses(logging.Handler):
    """What fairseq logs of every update."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "train_inner":  # as fairseq calls its progress bar's logger meanwhile
            self.losses.append(float(json.loads(record.getMessage())["loss"]))


def train(folder: Path, flags: Sequence[str], smoke: bool) -> list[float]:
    """Losses of a run of ``fairseq-train`` in this process."""
    from fairseq import checkpoint_utils, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.distributed import utils as distributed
    from fairseq.logging import metrics
    from fairseq_cli import train as command

    updates, length = sizes(smoke)
    words = [
        str(folder),
        *TRAINING.format(root=ROOT, updates=updates, length=length).split(),
        *SMALL.split() * smoke,
        *flags,
    ]
    metrics.reset()
    for function in (
        checkpoint_utils.save_checkpoint,
        command.should_stop_early,
    ):  # both remember things in their attributes
        vars(function).clear()
    handler = Losses()
    logger = logging.getLogger("fairseq.logging.progress_bar")
    logger.addHandler(handler)
    try:
        arguments = options.parse_args_and_arch(options.get_training_parser(), words)
        distributed.call_main(convert_namespace_to_omegaconf(arguments), command.main)
    finally:
        logger.removeHandler(handler)
    return handler.losses


def device_flags(device: str) -> list[str]:
    return ["--cpu"] if device == "cpu" else []


def references(job: Job) -> None:
    """Writes BUNDLE/references: data and losses of a CPU in fp32; in miniature also tokens for ``quality``."""
    folder = job.bundle / "references" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    updates, length = sizes(job.smoke)
    make_data(folder, max(600, length * 8 * (updates + 5)))
    losses = {}
    for name in ("fp32", "packed"):
        losses[name] = train(
            folder, ["--cpu", *VARIANTS[name][0].split(), "--save-dir", str(job.work / name)], job.smoke
        )
        assert len(losses[name]) == updates, f"{len(losses[name])} losses of {updates} updates"
        job.record(losses=losses, updates=updates, torch=torch.__version__)
    (job.bundle / "references" / "losses.json").write_text(json.dumps({"losses": losses, "smoke": job.smoke}))
    if job.smoke and not (job.bundle / "tokens").exists():
        (job.bundle / "tokens").mkdir()
        make_data(job.bundle / "tokens", 2000)


def training(job: Job) -> None:
    """Each variant's losses beside the reference's."""
    stored = json.loads((job.bundle / "references" / "losses.json").read_text())
    assert stored["smoke"] == job.smoke, "the references are of another size: make them again"
    folder = job.bundle / "references" / "data"
    found: dict[str, Any] = {"differences": {}, "losses": {}, "seconds": {}}
    for name, (flags, reference, needs_gpu) in VARIANTS.items():
        if needs_gpu and job.device == "cpu":
            continue
        with job.part(name):
            began = time.monotonic()
            words = [*device_flags(job.device), *flags.split(), "--save-dir", str(job.work / name)]
            losses = train(folder, words, job.smoke)
            expected = stored["losses"][reference]
            found["losses"][name], found["seconds"][name] = losses, time.monotonic() - began
            assert len(losses) == len(expected), f"{len(losses)} and {len(expected)} losses"
            found["differences"][name] = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            if name == "compiled":
                found["compilations"] = compilations()
            job.record(**found)


def compilations() -> dict[str, int]:
    """How often torch compiled, by what it counts."""
    from torch._dynamo.utils import counters

    return {
        "frames": counters["frames"]["total"],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
