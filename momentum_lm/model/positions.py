"""Position embeddings, sinusoidal and rotary, and the documents of packed sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import RotaryScaling
from .precision import Float32


class Rotary(Float32):
    """Rotary position embedding (arXiv 2104.09864): dimension pairs (i, i + R/2) turn by position * base^(-2i/R), for
    the first R of a head's dimensions; the others stay as they are.
    """

    frequency: Tensor

    def __init__(self, dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None) -> None:
        """dim: R, even."""
        super().__init__()
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if scaling is not None:
            frequency = _stretched(frequency, scaling)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T) -> cos, sin (B, 1, T, R/2) in fp32."""
        angle = positions[:, None, :, None].float() * self.frequency.float()
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, D), rotated in fp32."""
        turned = 2 * cos.shape[-1]
        x_turned, rest = (x, None) if turned == x.shape[-1] else (x[..., :turned], x[..., turned:])
        a, b = x_turned.float().chunk(2, dim=-1)
        parts = [a * cos - b * sin, b * cos + a * sin]
        return torch.cat(parts if rest is None else [*parts, rest.float()], -1).to(x.dtype)


def _stretched(frequency: Tensor, scaling: RotaryScaling) -> Tensor:
    """frequency (R/2,) -> the same: see :class:`.config.RotaryScaling`."""
    turns = scaling.original * frequency / (2 * math.pi)  # over the original length
    unchanged = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return torch.lerp(frequency / scaling.factor, frequency, unchanged)


def sinusoids(rows: Tensor, dim: int) -> Tensor:
    """fairseq's sinusoidal embedding of table rows (B, T) -> (B, T, dim) fp32: sines, then cosines, 10000^(-k / (dim/2
    - 1)).
    """
    half = dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float, device=rows.device) * -(math.log(10000) / (half - 1)))
    angle = rows[..., None].float() * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, dim % 2))


def document_ids(tokens: Tensor, eos_idx: int) -> Tensor:
    """Segment ids (B, T) of packed inputs, in which each document begins with the end-of-sentence token that its text
    follows.
    """
    return tokens.eq(eos_idx).cumsum(1)
