"""When a function must be plain torch operations, because who calls it looks through them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.autograd import forward_ad


def under_transforms() -> bool:
    """Whether torch.func's transformations (grad, vmap, jvp, hessian, ...) or forward-mode differentiation are at work.

    They cannot look into a ``torch.autograd.Function`` of ours, nor into a kernel. A compiler can, and is not meant
    here.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def of_any_length(length: Any) -> bool:
    """Whether a graph for inputs of any ``length`` is being exported, where no number of chunks can be counted.

    ``torch.export(strict=True)`` does not tell such a length from a number: there, every length counts as one.
    """
    return isinstance(length, torch.SymInt) or (torch.compiler.is_dynamo_compiling() and _exporting())


def _exporting() -> bool:
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()  # torch 2.7


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on ``device``; nothing on ``meta``, which has none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
