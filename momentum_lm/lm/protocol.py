"""The interface between language models and the studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Prefix(Protocol):
    """What a model remembers of tokens that many rows begin with. Reading never changes it."""

    @property
    def length(self) -> int: ...


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

    @property
    def bos(self) -> tuple[int, ...]:
        """What every prompt begins with; nothing for a model that was trained without."""
        ...

    @property
    def separator(self) -> str | tuple[int, ...]:
        """What stands between demonstrations: text, or token ids that no text gives."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of all that makes token ids of texts."""
        ...

    def check_unchanged(self) -> None:
        """Raises UserError where the files of the weights are no longer those that were read: their pages may be of two
        models."""
        ...

    def describe(self) -> dict[str, Any]:
        """Path, digest and architecture, for a record's ``model``."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def row_bytes(self, prefix: int, length: int) -> int:
        """About how much memory a row of ``length`` tokens after a prefix takes in :meth:`log_probs`."""
        ...

    def encode_prefix(self, ids: Sequence[int]) -> Any:
        """Runs the model over tokens that rows are to begin with: a :class:`Prefix` for :meth:`log_probs`."""
        ...

    def log_probs(self, tokens: Tensor, padding: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, prefix: Any = None) -> Tensor:
        """log p(targets[n] | row ``rows[n]`` up to and with column ``positions[n]``), (N,) fp32 on the CPU, in nats.

        tokens (B, T) int64, following ``prefix`` in every row; padding (B, T) True at padding, which is all on the left or all on the
        right and changes nothing; rows, positions and targets (N,) int64.
        """
        ...


class PerplexityModel(LanguageModel, Protocol):
    """A model that scores binarised text as well."""

    def token_losses(self, tokens: Tensor, targets: Tensor, packed_documents: bool = False) -> Tensor:
        """-log p of each target (B, T) given the tokens (B, T) up to its place: nats, fp32, on the CPU; 0 at padding
        targets."""
        ...
