"""Choosing the next token from logits: the likeliest, or one drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each row of logits (N, V): (N,)."""
    return logits.argmax(1)


def sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A token for each row of logits (N, V), drawn with torch's global generator: (N,).

    ``top_k``: among so many likeliest; 0: all. ``top_p``: among the fewest of those that hold this share of the
    probability (Holtzman et al., arXiv 1904.09751).
    """
    values, tokens = (logits.float() / temperature).sort(1, descending=True)
    if top_k:
        values, tokens = values[:, :top_k], tokens[:, :top_k]
    shares = values.softmax(1)
    before = shares.cumsum(1) - shares
    drawn = torch.multinomial(shares.masked_fill(before >= top_p, 0.0), 1)
    return tokens.gather(1, drawn)[:, 0]
