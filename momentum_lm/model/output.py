"""The last layer: hidden states to logits, of which some tokens may have none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .marks import no_matrices


class OutputProjection(nn.Linear):
    """Hidden states (..., C) -> logits (..., V), those of ``absent`` tokens -inf."""

    absent: Tensor | None

    def __init__(self, dim: int, vocab_size: int, absent: Sequence[int] = ()) -> None:
        super().__init__(dim, vocab_size, bias=False)
        no_matrices(self)
        self.register_buffer("absent", torch.tensor(absent) if absent else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.absent is None else logits.index_fill_(-1, self.absent, -math.inf)
