"""Parameters and floating-point operations of a decoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from momentum_lm.model import Decoder, DecoderConfig, MomentumMultiEMA
from momentum_lm.model.filters import heads_at, is_of_filter
from momentum_lm.ops.chunked import CHUNK


class Parameters(NamedTuple):
    """Numbers of parameters. ``embedding``: tokens and learned positions, and the output projection if it is not the
    embedding.
    """

    embedding: int
    other: int
    momentum: int  # of other
    block: int  # of other, in one block

    @property
    def total(self) -> int:
        return self.embedding + self.other


def count_parameters(config: DecoderConfig) -> Parameters:
    """Counts those of the decoder itself, built without memory."""
    with torch.device("meta"):
        decoder = Decoder(config)
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    embedding = sum(size for name, size in sizes.items() if name.startswith(("embed_", "output_projection.")))
    momentum = sum(size for name, size in sizes.items() if is_of_filter(name))
    block = sum(parameter.numel() for parameter in decoder.layers[0].parameters())
    return Parameters(embedding, sum(sizes.values()) - embedding, momentum, block)


def multiplying(config: DecoderConfig, parameters: Parameters) -> int:
    """The parameters that multiply each token: all but an embedding that is only looked up."""
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
    if config.position == "learned":
        looked_up += (config.max_positions + config.padding_idx + 1) * config.dim
    return parameters.total - looked_up


def flops_per_token(parameters: int, layers: int, dim: int, length: int) -> float:
    """Forward and backward: 6 per parameter that multiplies, and 12 * layers * dim * length for attention (arXiv
    2204.02311, app. B), whose heads are ``dim`` wide together.
    """
    return 6 * parameters + 12 * layers * dim * length


def momentum_flops_per_token(config: DecoderConfig) -> int:
    """Forward and backward, of ops/chunked.py's matrix products, or of the taps of ``fir``. The EMA's kernel has four
    times as many, and waits for memory nevertheless.
    """
    kind = config.momentum_kind
    passes = 3 if config.momentum_learned or kind not in ("none", "ema") else 2
    per_channel = {
        "none": 0,
        "ema": CHUNK + 1,
        "multi_ema": CHUNK + 2 * MomentumMultiEMA.ORDER,
        "fir": config.momentum_taps + config.momentum_current,
    }.get(kind, config.momentum_taps + 1)  # of one's own: a window
    times = {"embedding": 1, "depth": 0}  # elsewhere once in each layer; over layers it is one product
    channels = sum(times.get(place, config.layers) * math.prod(heads_at(config, place)) for place in config.places)
    return passes * 2 * per_channel * channels
