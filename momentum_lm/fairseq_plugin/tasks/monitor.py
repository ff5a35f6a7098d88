"""What a training run shows beyond fairseq's own numbers: speed, momentum's size and decays, and hparams with final
metrics.
"""

from __future__ import annotations

import atexit
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from omegaconf import OmegaConf

from momentum_lm.model import CausalSelfAttention, Decoder
from momentum_lm.model.config import recorded
from momentum_lm.planning.costs import flops_per_token
from momentum_lm.planning.hardware import peak_flops

# What the Custom Scalars tab opens on: titles, and patterns of tags
CHARTS = {"loss": ["^loss$"], "perplexity": ["^ppl$"], "decay": ["^decay/"], "gradient norm": ["^gnorm$"]}


class TrainingMonitor:
    """Measures at every ``--log-interval`` updates, without waiting for the device in between.

    Per layer and as pictures these go to ``<tensorboard-logdir>/model`` (rank 0 only); averages are returned for
    fairseq's own log.
    """

    def __init__(self, model: Any, model_config: Any, task_config: Any) -> None:
        self.attentions = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
        self.filters = [(_where(name), module) for name, module in model.named_modules() if hasattr(module, "logged")]
        self.interval = max(1, task_config.log_interval)
        self.tokens = 0
        self.started: float | None = None
        self.update = -1
        self.due = False
        embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
        looked_up = embedding.weight.numel() if embedding is not None else 0
        tied = any(
            embedding is not None and m.weight is embedding.weight
            for m in model.modules()
            if isinstance(m, torch.nn.Linear)
        )
        self.parameters = sum(p.numel() for p in model.parameters()) - (0 if tied else looked_up)
        self.model = model
        width = getattr(model_config, "decoder_embed_dim", 0)
        heads, size = getattr(model_config, "decoder_attention_heads", 0), getattr(model_config, "decoder_head_dim", 0)
        self.shape = getattr(model_config, "decoder_layers", 0), heads * size or width
        self.length = task_config.tokens_per_sample
        self.logdir = task_config.tensorboard_logdir
        self.hparams = {"arch": getattr(model_config, "_name", None), **_plain(task_config)}
        self.hparams |= _options(model, model_config)
        self.hparams.pop("tensorboard_logdir", None)  # another one for each run
        self.log: Any = None

    def before_step(self, update: int, optimizer: Any) -> None:
        """Call before each forward pass of training."""
        if self.update < 0 and self.logdir:
            self.hparams |= _plain(optimizer.cfg) | {"optimizer": getattr(optimizer.cfg, "_name", None)}
            self.hparams["lr"] = getattr(optimizer.cfg, "lr", [None])[0]  # not where the schedule stands
        self.due = update != self.update and update % self.interval == 0
        self.update = update
        for attention in self.attentions:
            if attention.momentum is not None:
                attention.measure = self.due

    def after_step(self, tokens: int) -> dict[str, float]:
        """Call after each backward pass with the number of this process's tokens; the averages, when they are due."""
        self.tokens += int(tokens)
        if not self.due:
            return {}
        for attention in self.attentions:
            attention.measure = False
        values = self._speed()
        ratios = []
        for index, attention in enumerate(self.attentions):
            if attention.momentum is not None:
                assert attention.momentum_ratio is not None  # it was measured
                ratios.append(float(attention.momentum_ratio))
                self.record({f"ema_over_attention/layer_{index}": ratios[-1]}, self.update)
        decays = [decay for where, module in self.filters for decay in self._log_filter(where, module)]
        if decays:
            values["decay"] = sum(decays) / len(decays)
        if ratios:
            values["ema_over_attention"] = sum(ratios) / len(ratios)
        if self._writer() is not None:
            self._writer().scalars(values, self.update)
        return values

    def _log_filter(self, where: str, module: Any) -> list[float]:
        """Logs what a filter says of itself; its mean decay, if it has decays."""
        means = {}
        for name, value in module.logged().items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value  # fully sharded
            means[name] = float(value.mean())
            self.record({f"{name}/{where}": means[name]}, self.update)
            if self._writer() is not None:
                self._writer().histogram(f"{name}s/{where}", value, self.update)
        return [means["decay"]] if "decay" in means else []

    def record(self, values: dict[str, float], update: int) -> None:
        """Other numbers for our TensorBoard log."""
        if self._writer() is not None:
            self._writer().scalars(values, update)

    def leave_out(self, seconds: float) -> None:
        """Time that is not training's, and does not count for its speed."""
        if self.started is not None:
            self.started += seconds

    def _speed(self) -> dict[str, float]:
        device = next(self.model.parameters()).device
        now = time.monotonic()
        values = {"peak_memory_gib": _peak_memory(device) / 2**30}
        if self.started is not None:
            rate = self.tokens / (now - self.started) * distributed_utils.get_data_parallel_world_size()
            values["tokens_per_second"] = rate
            peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
            if peak is not None:
                peak *= distributed_utils.get_data_parallel_world_size()
                values["mfu"] = rate * flops_per_token(self.parameters, *self.shape, self.length) / peak
        self.started, self.tokens = now, 0
        return values

    def _writer(self) -> Any:
        """The TensorBoard log, opened when first needed: validation of a checkpoint builds a model too,
        and needs none.
        """
        if self.log is None and self.logdir and distributed_utils.get_global_rank() == 0:
            from momentum_lm.report.tensorboard import TrainingLog

            self.log = TrainingLog(f"{self.logdir}/model", self.hparams)
            self.log.layout(CHARTS)
            atexit.register(self.log.close)
            _listen(self._after_validation)
        return self.log

    def _after_validation(self, stats: dict[str, Any], tag: str | None, step: int | None) -> None:
        if tag and tag.startswith("valid") and self.log is not None:
            numbers = {f"{tag}/{k}": float(getattr(v, "avg", v)) for k, v in stats.items() if k in ("loss", "ppl")}
            self.log.hparams_with_metrics(numbers, step)


def _where(name: str) -> str:
    """``decoder.layers.3.self_attn.momentum_keys`` -> ``keys/layer_3``; at attention's output ``layer_3``."""
    place = name.rpartition(".momentum")[2].lstrip("_")
    layer = re.search(r"layers\.(\d+)\.", name)
    return "/".join([*([place] if place else []), *([f"layer_{layer[1]}"] if layer else [])])


def _listen(listener: Callable[[dict[str, Any], str | None, int | None], None]) -> None:
    """Hears what fairseq writes to TensorBoard: there is no other place where a task learns a validation's result."""
    bar = progress_bar.TensorboardProgressBarWrapper
    stock = bar._log_to_tensorboard

    def log(self: Any, stats: dict[str, Any], tag: str | None = None, step: int | None = None) -> None:
        stock(self, stats, tag, step)
        listener(stats, tag, step)

    bar._log_to_tensorboard = log


def _options(model: Any, config: Any) -> dict[str, Any]:
    """A model's options, by the names that records of evaluations have."""
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    return _plain(config) if decoder is None else recorded(decoder.config)


def _plain(config: Any) -> dict[str, Any]:
    is_config = OmegaConf.is_config(config)
    values: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True) if is_config else vars(config)
    return {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str)) and not k.startswith("_")}


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
