"""A model with another's architecture and tokenizer, and weights as they are before training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from momentum_lm.lm.anatomy import untrained_copy

from .traces import TracedModel


def untrained(lm: TracedModel, seed: int = 0) -> TracedModel:
    """The control of Deutch et al. (arXiv 2311.07772): weights freshly drawn, by the architecture's own initialisation.

    The same seed gives the same weights; the caller's random state stays as it was.
    """
    fresh: Any = copy.copy(lm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained_copy(lm.model)
    fresh.model = model.to(device=lm.device, dtype=lm.dtype).eval().requires_grad_(False)
    return fresh
