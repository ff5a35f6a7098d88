"""What a fairseq checkpoint of a decoder holds besides its parameters and buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from momentum_lm.model import Decoder, DecoderConfig


def extras(config: DecoderConfig) -> dict[str, Tensor]:
    """What stock ``transformer_lm`` asks for in a strict load: its format version, and a buffer that only tells the
    device.
    """
    table = {"embed_positions._float_tensor": torch.zeros(1)} if config.position == "sinusoidal" else {}
    return {"version": torch.tensor([3.0]), **table}


def accept_fairseq_keys(module: Decoder, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A hook before ``load_state_dict``: takes out the extras, and puts in a tied output projection, which old
    checkpoints lack.
    """
    for name in ("version", "embed_positions._float_tensor"):
        state.pop(f"{prefix}{name}", None)
    embedding = state.get(f"{prefix}embed_tokens.weight")
    if embedding is not None and module.config.tie_embeddings:
        state.setdefault(f"{prefix}output_projection.weight", embedding)
