"""Stage of gpu_checks.py that trains language models with and without momentum on real text.

As many tokens and seeds as there is time for. Every variant of a seed starts from the same weights, where it has the
same, and sees the same tokens in the same order.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import seconds_each
from gpu_job import Job, keep_compiled
from torch import Tensor

from momentum_lm.analysis.statistics import t_interval
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.marks import decayed
from momentum_lm.text.indexed import IndexedDataset

VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "ema_0.3": {"momentum_kind": "ema", "momentum_eta": 0.3},
    "fir_3": {"momentum_kind": "fir"},  # three taps, the nearest rival
    "multi_ema": {"momentum_kind": "multi_ema"},
    "ema_learned": {"momentum_kind": "ema", "momentum_eta": 0.5, "momentum_learned": True},
}
LEAST_SEEDS, MOST_SEEDS = 3, 10
EVALUATION = 0.08  # share of the time that goes into validation and building models


@dataclass(frozen=True)
class Setting:
    dim: int = 512
    layers: int = 8
    heads: int = 8
    length: int = 512
    batch: int = 32  # 16,384 tokens an update
    lr: float = 2e-3
    timed: int = 6  # updates that tell how long one takes
    compile: bool = True


SMALL = Setting(dim=16, layers=1, heads=2, length=16, batch=2, timed=1, compile=False)


def blocks(prefix: Path, length: int, device: str) -> Tensor:
    """(N, length + 1) token ids: the documents in a row, in pieces that begin with the last token of the one before."""
    data = IndexedDataset(prefix)
    tokens = torch.from_numpy(data.tokens(0, data.num_tokens).astype("int64"))
    count = (len(tokens) - 1) // length
    return tokens[: count * length + 1].unfold(0, length + 1, length).contiguous().to(device)


class Run:
    """One model in training."""

    def __init__(self, options: dict[str, Any], seed: int, setting: Setting, vocab: int, device: str) -> None:
        torch.manual_seed(seed)
        shape = {"dim": setting.dim, "ffn_dim": 4 * setting.dim, "layers": setting.layers, "heads": setting.heads}
        self.model = Decoder(
            DecoderConfig(vocab, max_positions=setting.length, position="rotary", **shape, **options)
        ).to(device)
        if setting.compile and device == "cuda":
            self.model.compile_blocks()
        self.setting, self.device = setting, device
        self.parameters = list(self.model.parameters())
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}  # whether weight decay applies
        applies = decayed(self.model)
        for name, parameter in self.model.named_parameters():
            kinds[applies[name]].append(parameter)
        groups = [{"params": kinds[True], "weight_decay": 0.1}, {"params": kinds[False], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=setting.lr, betas=(0.9, 0.98), fused=True)

    def loss(self, rows: Tensor) -> Tensor:
        """Nats per token of rows (B, T + 1)."""
        with torch.autocast(self.device, torch.bfloat16):
            return self.model.loss(rows[:, :-1], rows[:, 1:], left_padded=False) / rows[:, 1:].numel()

    def update(self, rows: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.setting.lr
        self.optimizer.zero_grad()
        self.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def validate(self, rows: Tensor) -> float:
        parts = rows.split(self.setting.batch)
        with torch.compiler.set_stance("force_eager"):  # compiling for so little would take longer
            return float(sum(self.loss(part) * len(part) for part in parts)) / len(rows)


def rate(update: int, updates: int) -> float:
    """Of the peak: warm-up over a twentieth, then a cosine to a tenth."""
    warm = max(1, updates // 20)
    if update < warm:
        return (update + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (update - warm) / max(1, updates - warm))


def order(rows: int, seed: int, device: str) -> Tensor:
    """The same for every variant of a seed."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(device)


def quality(job: Job) -> None:
    """Plans by the measured time of an update, then trains seed by seed; whole seeds count."""
    keep_compiled(job.device)
    setting = SMALL if job.smoke else Setting()
    folder = job.bundle / "tokens"
    vocab = 4 + len((folder / "dict.txt").read_text("utf-8").splitlines())
    train, valid = (blocks(folder / split, setting.length, job.device) for split in ("train", "valid"))
    valid = valid[: 4 if job.smoke else None]
    per_update: dict[str, float] = {}
    parameters = {}
    for name, options in VARIANTS.items():
        with job.part(f"timing {name}"):
            one = Run(options, 0, setting, vocab, job.device)
            parameters[name] = sum(p.numel() for p in one.parameters)
            rows = train[: setting.batch]
            for _ in range(2):
                one.update(rows, 0.0)
            times = seconds_each([lambda one=one, rows=rows: one.update(rows, 0.0)] * setting.timed, job.device)
            per_update[name] = statistics.median(times)
            job.record(seconds_per_update=per_update, parameters=parameters)
            del one
    ours = {name: options for name, options in VARIANTS.items() if name in per_update}
    a_round = sum(per_update.values())  # an update of each
    most = len(train) // setting.batch
    affordable = job.left() * (1 - EVALUATION) / a_round / LEAST_SEEDS
    updates = max(1, min(3 if job.smoke else most, int(affordable)))
    seeds = 2 if job.smoke else MOST_SEEDS
    job.record(updates=updates, tokens_per_run=updates * setting.batch * setting.length, setting=vars(setting))
    losses: dict[str, list[float]] = {name: [] for name in ours}
    for seed in range(1, seeds + 1):
        began = time.monotonic()
        found = {}
        for name, options in ours.items():
            with job.part(f"{name}, seed {seed}"):
                found[name] = trained(Run(options, seed, setting, vocab, job.device), train, valid, updates, seed)
        if len(found) == len(ours):
            for name, value in found.items():
                losses[name].append(value)
            job.record(**summary(losses))
        if job.left() < 1.05 * (time.monotonic() - began) + 2:
            break


def trained(run: Run, train: Tensor, valid: Tensor, updates: int, seed: int) -> float:
    """Trains for an epoch at most; the validation loss."""
    rows = order(len(train), seed, run.device)
    for update in range(updates):
        chosen = rows[update * run.setting.batch : (update + 1) * run.setting.batch]
        run.update(train[chosen], rate(update, updates))
    return run.validate(valid)


def summary(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexities (geometric means) and, with Student's interval over paired seeds, their ratio to vanilla's."""
    against = {}
    for name, values in losses.items():
        differences = [a - b for a, b in zip(values, losses.get("vanilla", []), strict=False)]
        if name != "vanilla" and len(differences) > 1:
            found = t_interval(differences)
            share = {key: math.expm1(getattr(found, key)) for key in ("estimate", "low", "high")}
            against[name] = {**share, "n": len(differences)}
    perplexity = {name: math.exp(statistics.mean(values)) for name, values in losses.items()}
    return {
        "losses": losses,
        "seeds": len(next(iter(losses.values()))),
        "perplexity": perplexity,
        "against_vanilla": against,
    }
