"""What a fairseq checkpoint of a decoder holds besides its parameters and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momentum_lm.model import Decoder, DecoderConfig


def extras(config: DecoderConfig) -> dict[str, Tensor]:
    """What stock ``transformer_lm`` asks for in a strict load, two tensors (1,): its format version, and a buffer that
    only tells the device.
    """
    table = {"embed_positions._float_tensor": torch.zeros(1)} if config.position == "sinusoidal" else {}
    return {"version": torch.tensor([3.0]), **table}


def drop_extras(module: Decoder, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A hook before ``load_state_dict``, which takes them out."""
    for name in extras(module.config):
        state.pop(f"{prefix}{name}", None)
