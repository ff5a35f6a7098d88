"""The last layer: hidden states to logits, of which some tokens may have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from momentum_lm.errors import UserError


class OutputProjection(nn.Linear):
    """Hidden states (..., C) -> logits (..., V), those of ``absent`` tokens -inf."""

    absent: Tensor | None

    def __init__(self, dim: int, vocab_size: int, absent: Sequence[int] = ()) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.register_buffer("absent", torch.tensor(absent) if absent else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.absent is None else logits.index_fill_(-1, self.absent, -math.inf)


def token_ids(value: Any) -> tuple[int, ...]:
    """``0,1,3`` or numbers -> (0, 1, 3). Raises UserError naming --absent-tokens for anything else."""
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError, OverflowError) as error:
        given = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:79]}…"
        raise UserError(f"--absent-tokens {given}: must be token ids with commas between, such as 0,1,3") from error
