"""Position embeddings, sinusoidal and rotary, and the documents of packed sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import Float32


class Rotary(Float32):
    """Rotary position embedding (arXiv 2104.09864): dimension pairs (i, i + D/2) turn by position * 10000^(-2i/D)."""

    frequency: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T) -> cos, sin (B, 1, T, D/2) in fp32."""
        angle = positions[:, None, :, None].float() * self.frequency.float()
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, D), rotated in fp32."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


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
