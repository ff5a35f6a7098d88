"""A training run worked out before it starts: which strategy, which batch, how long, at what cost of memory, links and
momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from momentum_lm.errors import Argument, UserError, arg
from momentum_lm.model import DecoderConfig

from .costs import Parameters, count_parameters, flops_per_token, momentum_flops_per_token, multiplying
from .hardware import GPUS, Gpu
from .memory import StepMemory, step_memory
from .traffic import kernel_traffic, torch_traffic

# Of the data sheet's memory; the rest is left to the CUDA context, NCCL and gaps between tensors. An assumption, not a
# measurement.
USABLE = 0.94
# A micro-batch of fewer tokens feeds a GPU badly, so more memory per GPU is worth some communication. Also an
# assumption.
ENOUGH_TOKENS = 8192
RECOMPUTATION = 4 / 3  # a forward pass is a third of a step, and checkpointing has a second one


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what. Raises UserError, naming the argument, for what cannot be."""

    config: DecoderConfig
    gpu: str
    gpus: int
    tokens: int
    length: int
    batch_tokens: int
    micro_batch: int | None = None  # sequences; None: found
    bf16: bool = True
    strategy: str = "auto"
    checkpointing: bool = False  # only with it
    mfu: float = 0.45
    gpus_per_node: int = 8
    node_bandwidth: float = 400e9  # bytes/s in one direction between nodes

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(arg(gpu=self.gpu), f": choose one of {', '.join(GPUS)}")
        for name in ("gpus", "tokens", "length", "batch_tokens", "micro_batch", "gpus_per_node"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(Argument(name, number), ": must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            node = arg(gpus_per_node=self.gpus_per_node)
            raise UserError(arg(gpus=self.gpus), ": must be a multiple of the GPUs of a node, ", node)
        if not 0 < self.mfu <= 1:
            raise UserError(arg(mfu=self.mfu), ": must lie between 0 and 1, such as 0.45")
        if not 0 < self.node_bandwidth < math.inf:
            raise UserError(
                arg(node_bandwidth=self.node_bandwidth), ": must be above 0, such as ", arg(node_bandwidth=400e9)
            )
        if self.bf16 and not self.hardware.bf16:
            raise UserError(arg(gpu=self.gpu), " has no bf16; use ", arg(bf16=False))
        if self.strategy != "auto" and (self.strategy == "single") != (self.gpus == 1):
            needed = [arg(gpus=1)] if self.strategy == "single" else [arg("gpus"), " 2 or more"]
            raise UserError(arg(strategy=self.strategy), ": needs ", *needed)

    @property
    def hardware(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def peak_flops(self) -> float:
        return self.hardware.flops if self.bf16 else self.hardware.fp32_flops


@dataclass(frozen=True)
class Option:
    """One way to train, at the micro-batch that it would take."""

    strategy: str
    checkpointing: bool
    memory: StepMemory
    fits: bool
    largest_micro_batch: int  # 0 where not even one sequence fits
    micro_batch: int
    update_freq: int
    tokens_per_update: int
    compute_seconds: float  # of an update
    communication_bytes: float  # that a GPU sends for an update
    communication_seconds: float
    exposed_seconds: float  # of these, what computing cannot hide

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds


@dataclass(frozen=True)
class Momentum:
    """What momentum adds to an update."""

    parameters: int
    flops_share: float
    bytes_per_block: int  # and micro-batch, forward and backward: the mean over blocks
    seconds: float  # of an update, at the data sheet's memory bandwidth
    kernel: bool  # whether a fused kernel is counted, or torch's own operations


@dataclass(frozen=True)
class Plan:
    """``chosen`` is one of ``options``, or None where nothing fits."""

    job: Job
    parameters: Parameters
    flops_per_token: float
    options: list[Option]
    chosen: Option | None
    momentum: Momentum | None
    hints: list[dict[str, Any]] = field(default_factory=list)  # arguments of Job with which it would fit

    @property
    def tokens_per_second(self) -> float:
        return self.chosen.tokens_per_update / self.chosen.step_seconds if self.chosen else 0.0

    @property
    def updates(self) -> int:
        return math.ceil(self.job.tokens / self.chosen.tokens_per_update) if self.chosen else 0

    @property
    def days(self) -> float:
        return self.updates * self.chosen.step_seconds / 86400 if self.chosen else math.inf


def make_plan(job: Job) -> Plan:
    """Every strategy that the job allows, and the fastest of those that fit.

    Speed is the assumed MFU of the data sheet's peak, less a third more work where activations are computed again,
    plus what of the
    communication cannot hide behind it. Where strategies are equally fast, DDP comes before FSDP.
    """
    parameters = count_parameters(job.config)
    config = job.config
    queries = config.heads * config.head_dim
    flops = flops_per_token(multiplying(config, parameters), config.layers, queries, job.length)
    strategies = [job.strategy] if job.strategy != "auto" else ["single"] if job.gpus == 1 else ["ddp", "fsdp"]
    options = [
        _option(job, strategy, checkpointing, parameters, flops)
        for checkpointing in ([True] if job.checkpointing else [False, True])
        for strategy in strategies
    ]
    fitting = [option for option in options if option.fits]
    enough = min(ENOUGH_TOKENS, job.batch_tokens // job.gpus)
    fed = [option for option in fitting if option.micro_batch * job.length >= enough]
    if not fed and fitting:
        most = max(option.micro_batch for option in fitting)
        fed = [option for option in fitting if option.micro_batch == most]
    chosen = min(fed, key=lambda option: option.step_seconds / option.tokens_per_update, default=None)
    momentum = None
    if chosen is not None and job.config.momentum_kind != "none":
        momentum = _momentum(job, chosen, parameters, flops)
    return Plan(job, parameters, flops, options, chosen, momentum, [] if chosen else _hints(job, options))


def _option(job: Job, strategy: str, checkpointing: bool, parameters: Parameters, flops: float) -> Option:
    config = replace(job.config, checkpoint_activations=checkpointing)

    def memory(batch: int, accumulate: bool = True) -> StepMemory:
        return step_memory(config, batch, job.length, job.bf16, True, accumulate, strategy, job.gpus)

    usable = USABLE * job.hardware.memory
    largest = _largest(memory, usable)
    share = max(1, round(job.batch_tokens / (job.gpus * job.length)))  # sequences of an update that one GPU sees
    micro_batch = job.micro_batch or _micro_batch(share, max(1, min(share, largest)))
    update_freq = max(1, round(share / micro_batch))
    needed = memory(micro_batch, update_freq > 1)

    tokens = micro_batch * update_freq * job.length
    compute = tokens * flops * (RECOMPUTATION if checkpointing else 1) / (job.mfu * job.peak_flops)
    sent = _sent(strategy, parameters, job, update_freq)
    seconds = sent / (
        job.hardware.link if job.gpus <= job.gpus_per_node else min(job.hardware.link, job.node_bandwidth)
    )
    # DDP sums while the last micro-batch goes backward, two thirds of its time or three quarters; FSDP gathers and
    # sums all the time
    hidden = compute if strategy == "fsdp" else compute / update_freq * (3 / 4 if checkpointing else 2 / 3)
    return Option(
        strategy,
        checkpointing,
        needed,
        needed.total <= usable,
        largest,
        micro_batch,
        update_freq,
        tokens * job.gpus,
        compute,
        sent,
        seconds,
        max(0.0, seconds - hidden),
    )


def _largest(memory: Callable[[int], StepMemory], limit: float) -> int:
    """The largest batch that stays within ``limit``, as far as memory grows in proportion to the batch between those
    that are tried.
    """
    first = memory(1)
    if first.total > limit:
        return 0
    slope: float = first.activations + first.backward
    fits, needed, too_many = 1, first.total, math.inf
    while fits + 1 < too_many and (more := int((limit - needed) / slope)):
        batch = int(min(fits + more, too_many - 1))
        total = memory(batch).total
        slope = (total - needed) / (batch - fits)
        if total > limit:
            too_many = batch
        else:
            fits, needed = batch, total
    return fits


def _micro_batch(share: int, largest: int) -> int:
    """Of the upper half of what fits, what divides ``share`` best."""
    return min(range(largest, (largest - 1) // 2, -1), key=lambda batch: abs(batch * round(share / batch) - share))


def _sent(strategy: str, parameters: Parameters, job: Job, update_freq: int) -> float:
    """Bytes that each GPU sends for one update, in rings: (n-1)/n of what is gathered or summed, twice that to sum on
    every GPU.

    Between nodes, every node sends as much. DDP sums fp32 gradients once an update; FSDP gathers each block forward
    and backward, and
    the embeddings once in fp32, and sums fp32 gradients, for every micro-batch.
    """
    ring = (job.gpus - 1) / job.gpus
    if strategy != "fsdp":
        return 2 * ring * 4 * parameters.total
    in_blocks = job.config.layers * parameters.block
    gathered = 2 * (2 if job.bf16 else 4) * in_blocks + 4 * (parameters.total - in_blocks)
    return update_freq * ring * (gathered + 4 * parameters.total)


def _momentum(job: Job, option: Option, parameters: Parameters, flops: float) -> Momentum:
    config = replace(job.config, checkpoint_activations=option.checkpointing)
    kernel = config.momentum_kind in ("ema", "fir") and config.places == ("output",)
    if kernel:
        moved = kernel_traffic(config, option.micro_batch * job.length, job.bf16)
    else:
        moved = torch_traffic(config, option.micro_batch, job.length, job.bf16)
    seconds = option.update_freq * config.layers * moved / job.hardware.bandwidth
    return Momentum(parameters.momentum, momentum_flops_per_token(config) / flops, moved, seconds, kernel)


def _hints(job: Job, options: list[Option]) -> list[dict[str, Any]]:
    """Arguments of Job with which it would fit, where nothing does: smaller micro-batches, or with checkpointing more
    GPUs, or others.
    """
    config = replace(job.config, checkpoint_activations=True)
    usable = USABLE * job.hardware.memory

    def total(strategy: str, processes: int) -> int:
        return step_memory(config, job.micro_batch or 1, job.length, job.bf16, True, True, strategy, processes).total

    hints: list[dict[str, Any]] = []
    if largest := max(option.largest_micro_batch for option in options):
        hints.append({"micro_batch": largest})
    fixed = 2 * total("fsdp", 2) - total("fsdp", 1)  # what is not divided: total(n) = fixed + divided / n
    if fixed < usable:
        needed = max(2, math.ceil((total("fsdp", 1) - fixed) / (usable - fixed)))
        if needed > job.gpus_per_node:
            needed = -(-needed // job.gpus_per_node) * job.gpus_per_node
        hints.append({"gpus": max(needed, job.gpus), "strategy": "fsdp", "checkpointing": True})
    strategy = {"strategy": "fsdp"} if job.gpus > 1 else {}
    for name, gpu in GPUS.items():
        if (gpu.bf16 or not job.bf16) and usable < total(
            strategy.get("strategy", "single"), job.gpus
        ) <= USABLE * gpu.memory:
            hints.append({"gpu": name, "checkpointing": True, **strategy})
    return hints
