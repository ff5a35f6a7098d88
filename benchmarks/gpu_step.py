"""Stages of gpu_checks.py that time a training step of 350M parameters: train_step.py's steps, in one process."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
import train_step
from clock import Clock
from gpu_job import Job, keep_compiled
from train_step import STOCK

OURS, MOMENTUM = train_step.OURS["gpt"]
Step = Callable[[int], None]
WARM = 4  # steps that compile and allocate
GIB = 2**30


def settings(job: Job, **changes: Any) -> argparse.Namespace:
    """What train_step.py calls its arguments."""
    full = {"family": "gpt", "shape": "350m", "length": 2048, "batch": 16, "vocab": 51200, "steps": 12, "pairs": 20}
    small = {"family": "gpt", "shape": "tiny", "length": 16, "batch": 2, "vocab": 99, "steps": 2, "pairs": 3}
    given = {
        **(small if job.smoke else full),
        "device": job.device,
        "compile": True,
        "by_blocks": True,
        "threads": 1,
        **changes,
    }
    return argparse.Namespace(**given)


def collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def prepare(make: Callable[[argparse.Namespace], Step], args: argparse.Namespace) -> Step:
    """A step that has run a few times; where the batch does not fit, ``args.batch`` is halved."""
    while True:
        try:
            step = make(args)
            for number in range(WARM if args.device == "cuda" else 1):
                step(number)
            return step
        except torch.OutOfMemoryError:
            if args.batch == 1:
                raise
            args.batch //= 2
            print(f"out of memory: {args.batch} sequences now", flush=True)
        step = None
        collect(args.device)


def run(steps: list[Step], args: argparse.Namespace) -> list[float]:
    """Seconds of each step, without waiting for the device in between."""
    clock = Clock(args.device)
    clock.mark()
    for number, step in enumerate(steps):
        step(WARM + number)
        clock.mark()
    return clock.seconds()


def measure(
    name: str, make: Callable[[argparse.Namespace], Step], job: Job, args: argparse.Namespace, found: dict[str, Any]
) -> Step:
    """Prepares and times a variant, records it as ``variants/NAME``, and returns its step."""
    held = 0
    if args.device == "cuda":
        collect(args.device)
        held = torch.cuda.memory_allocated()
    started = Clock("cpu")
    started.mark()
    step = prepare(make, args)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started.mark()
    seconds = run([step] * args.steps, args)
    rate = args.batch * args.length / statistics.median(seconds)
    row: dict[str, Any] = {
        "tokens_per_s": rate,
        "seconds": seconds,
        "batch": args.batch,
        "ready_after_s": started.seconds()[0],
    }
    if args.device == "cuda":
        row |= {"peak_gib": (torch.cuda.max_memory_allocated() - held) / GIB, "mfu": train_step.mfu(rate, args)}
    found[name] = row
    job.record(variants=found, shape=args.shape, length=args.length)
    return step


def kernels_of(step: Step, device: str) -> list[dict[str, Any]]:
    """The kernels that a step spends its time in: name, milliseconds, calls; the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as record:
        step(WARM)
        if device == "cuda":
            torch.cuda.synchronize()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [
        {"name": event.key[:120], "ms": round(getattr(event, kind) / 1000, 3), "calls": event.count}
        for event in record.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:40]


def ours(variant: str, *flags: str) -> Callable[[argparse.Namespace], Step]:
    return lambda args: train_step.fairseq_step(variant, args, flags)


def step(job: Job) -> None:
    """gpt_lm and momentum_lm, one by one and in pairs; then what they are compared with."""
    keep_compiled(job.device)
    args = settings(job)
    found: dict[str, Any] = {}
    profiles: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    for name, variant in (("gpt_lm", OURS), ("momentum_lm", MOMENTUM)):
        with job.part(name):
            steps[name] = measure(name, ours(variant), job, args, found)
    with job.part("pairs"):
        assert found["gpt_lm"]["batch"] == found["momentum_lm"]["batch"]
        # in turn, and the first of a pair changes, so that a drift favours neither
        order = [name for number in range(args.pairs) for name in (list(steps) if number % 2 else list(steps)[::-1])]
        taken = list(zip(order, run([steps[name] for name in order], args), strict=True))
        seconds = {name: [t for other, t in taken if other == name] for name in steps}
        ratio, low, high = train_step.ratio_of_pairs(
            {OURS: {"seconds": seconds["gpt_lm"]}, MOMENTUM: {"seconds": seconds["momentum_lm"]}}, "seconds"
        )
        share = {"estimate": ratio - 1, "low": low - 1, "high": high - 1, "n": args.pairs}
        job.record(momentum_share=share, pairs=seconds, pairs_batch=args.batch)
    with job.part("profiles"):
        for name in steps:
            profiles[name] = kernels_of(steps[name], args.device)
            job.record(profiles=profiles)
        flash = sum(row["calls"] for row in profiles["gpt_lm"] if "flash" in row["name"].lower())
        job.record(flash=flash if args.device == "cuda" else None)
    steps.clear()
    for name, make in (("plain", train_step.plain_step), ("stock", ours(STOCK))):
        collect(args.device)
        with job.part(name):
            other = measure(name, make, job, settings(job), found)
            against = found["gpt_lm"]["tokens_per_s"] / found[name]["tokens_per_s"]
            job.record(**{f"against_{name}": against})
            profiles[name] = kernels_of(other, args.device)
            job.record(profiles=profiles)
        other = None


def more(job: Job) -> None:
    """Ours again, and what the first call had no time for."""
    keep_compiled(job.device)
    found: dict[str, Any] = {}
    llama = {"family": "llama", "shape": "tiny" if job.smoke else "360m"}
    for name, make, changes in (
        ("gpt_lm", ours(OURS), {}),
        ("eager", ours(OURS), {"compile": False}),
        ("learned", ours(MOMENTUM, "--momentum-learned"), {}),
        ("llama_lm", ours("llama_lm"), llama),
        ("momentum_llama_lm", ours("momentum_llama_lm"), llama),
        ("whole", train_step.plain_step, {"by_blocks": False}),  # the last two: they take a minute or more to compile
        ("transformers", train_step.llama_step, llama),
    ):
        collect(job.device)
        with job.part(name):
            measure(name, make, job, settings(job, **changes), found)
            if name == "whole":
                job.record(against_whole=found["gpt_lm"]["tokens_per_s"] / found[name]["tokens_per_s"])
            if name == "transformers":
                job.record(against_transformers=found["llama_lm"]["tokens_per_s"] / found[name]["tokens_per_s"])
