"""The interface between language models and the studies."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class LanguageModel(Protocol):
    """A causal language model over token ids, with whatever holds its weights behind it."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """Path, digest and architecture, for a record's ``model``."""
        ...

    def token_losses(self, tokens: Tensor, targets: Tensor, packed_documents: bool = False) -> Tensor:
        """-log p of each target (B, T) given the tokens (B, T) up to its place: nats, fp32, on the CPU; 0 at padding
        targets."""
        ...
