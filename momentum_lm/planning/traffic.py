"""What momentum moves to and from memory, which is what it costs: its operations are few."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.config import default


def kernel_traffic(config: DecoderConfig, tokens: int, bf16: bool = True) -> int:
    """Bytes that ``ema`` or ``fir`` at attention's output moves in one block, forward and backward, in its kernel
    (``multi_ema`` has none).

    Forward, twice with checkpointing: values and attention's output are read, their sum is written. Backward: the
    gradient is read, summed first over the heads that share values (one written and read), that of the values is
    written, and autograd adds it to attention's (two read, one written); for what is learned the values are read again.
    """
    forward = 1 + config.checkpoint_activations
    of_queries = 2 * forward + 1
    learned = config.momentum_learned or config.momentum_kind == "fir"
    of_values = forward + 4 + learned + 2 * (config.kv_heads != config.heads)
    channels = (of_queries * config.heads + of_values * config.kv_heads) * config.head_dim
    return tokens * channels * (2 if bf16 else 4)


def torch_traffic(config: DecoderConfig, batch: int, length: int, bf16: bool = True) -> int:
    """Bytes that momentum moves in one block, forward and backward, by torch's operations one after another, each of
    which reads its inputs and writes its outputs: those with momentum less those without, over all blocks, divided by
    their number, since a filter may stand once for all of them, or in all but the first.
    """
    options = [f.name for f in fields(config) if f.name.startswith("momentum_")]
    plain = replace(config, **{name: default(name) for name in options})

    def added(layers: int) -> int:
        return _moved(replace(config, layers=layers), batch, length, bf16) - _moved(
            replace(plain, layers=layers), batch, length, bf16
        )

    first = added(1)
    return round((first + (config.layers - 1) * (added(2) - first)) / config.layers)


def _moved(config: DecoderConfig, batch: int, length: int, bf16: bool) -> int:
    """Bytes that a decoder's layers move, forward and backward."""
    with FakeTensorMode():
        decoder = Decoder(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
        with _Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = decoder.features(tokens, left_padded=False).sum()
            loss.backward()
    return traffic.bytes


class _Traffic(TorchDispatchMode):
    """Bytes read and written by operations that make or change a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        there = {t.untyped_storage()._cdata for t in inputs}
        if func._schema.is_mutable or any(t.untyped_storage()._cdata not in there for t in outputs):
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in inputs + outputs)
        return out
