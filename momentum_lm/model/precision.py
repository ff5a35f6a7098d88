"""fp32 islands in half-precision models, and what autocast does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .marks import keep_fp32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names that flags have


class Float32(nn.Module):
    """A module whose parameters and buffers stay in fp32, also through ``.half()`` and ``.bfloat16()``: bf16 rounds a
    decay of 0.999 to 1.
    """

    def __init__(self) -> None:
        super().__init__()
        keep_fp32(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if half else moved

        return super()._apply(keep_precision, *args, **kwargs)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes matrix products in on ``device``; None where it is off, and on ``meta``,
    which has none.
    """
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def autocast_once(x: Tensor) -> Tensor:
    """``x``, of any shape, as autocast casts it for a matrix product: for several products it would make as many
    copies, and autograd
    keep them all."""
    dtype = autocast_dtype(x.device)
    return x if dtype is None else x.to(dtype)
