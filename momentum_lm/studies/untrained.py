"""A model with another's architecture and tokenizer, and weights as they are before training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from momentum_lm.lm.native import NativeLM
from momentum_lm.model import Decoder

from .traces import TracedModel


def untrained(lm: TracedModel, seed: int = 0) -> TracedModel:
    """The control of Deutch et al. (arXiv 2311.07772): every weight freshly drawn, by the architecture's own initialisation.

    The same seed gives the same weights; the caller's random state stays as it was.
    """
    fresh: Any = copy.copy(lm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(lm, NativeLM):
            model: Any = Decoder(lm.config)
        else:
            from transformers import AutoModelForCausalLM

            # a model's own code, where it brings some, runs here already
            model = AutoModelForCausalLM.from_config(lm.model.config, trust_remote_code=True)
    fresh.model = model.to(device=lm.device, dtype=lm.dtype).eval().requires_grad_(False)
    return fresh
