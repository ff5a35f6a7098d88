"""The norms of the decoder: LayerNorm and RMSNorm."""

from __future__ import annotations

from torch import nn

from .config import DecoderConfig


def make_norm(config: DecoderConfig, dim: int | None = None) -> nn.Module:
    """The configuration's norm over the last dimension, of size ``dim`` (default: the width); (..., dim) -> the same.

    RMSNorm, ``x / sqrt(mean(x^2) + eps) * weight``, has no bias (arXiv 1910.07467).
    """
    size = config.dim if dim is None else dim
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)
