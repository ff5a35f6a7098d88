"""The interface between language models and the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class State(Protocol):
    """What tokens leave behind in a model (keys and values, filter states, a recurrent state), for one row or several.

    Tokens that follow it are read as if all of them had been read at once.
    """

    @property
    def length(self) -> int:
        """Tokens read so far, padding included."""
        ...

    def rows(self, count: int) -> State:
        """``count`` rows that go on from this state of one row, which itself stays as it is."""
        ...

    def select(self, index: Tensor) -> None:
        """Replaces row b by row ``index[b]``, in place; index (B,). The number of rows may change."""
        ...


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

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by their names. Text that spells a name is ordinary text to :meth:`encode`,
        wherever it comes from: data, templates, separators; but for tokenizers that cannot tell one from the other."""
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

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens of which each ends a generated text."""
        ...

    def row_bytes(self, prefix: int, length: int, keeps: bool = False) -> int:
        """About how much memory a row of ``length`` tokens after a prefix takes in :meth:`log_probs`; ``keeps``: and
        what it leaves behind in all layers."""
        ...

    def start(self, ids: Sequence[int]) -> Any:
        """The :class:`State`, of one row, after the first tokens of a text."""
        ...

    def log_probs(
        self, tokens: Tensor, padding: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        """log p(targets[n] | row ``rows[n]`` up to and with column ``positions[n]``), (N,) fp32 in nats, and whether
        ``targets[n]`` is the token that greedy decoding chooses there, (N,) bool; both on the CPU.

        tokens (B, T) int64, following ``state`` (of one row, which is only read) in every row; padding (B, T) True at
        padding, which is all on the left or all on the right and changes nothing; rows, positions and targets (N,)
        int64.
        """
        ...

    def step(self, tokens: Tensor, padding: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, V) of what follows each row, -inf for tokens that no text holds, and the state after the tokens.

        tokens (B, T) int64 go on from ``state``, which has B rows and is used up; padding (B, T) True at padding, all
        of it on the left, and none where the rows have been begun.
        """
        ...


class PerplexityModel(LanguageModel, Protocol):
    """A model that scores binarised text as well."""

    def token_losses(self, tokens: Tensor, targets: Tensor, packed_documents: bool = False) -> Tensor:
        """-log p of each target (B, T) given the tokens (B, T) up to its place: nats, fp32, on the CPU; 0 at padding
        targets."""
        ...
