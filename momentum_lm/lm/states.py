"""States of ``transformers``' models while they generate: keys and values that grow, or the tokens themselves.

Both have the methods of :class:`momentum_lm.lm.protocol.State`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TokenRows:
    """The tokens of each row, for models that read a row as a whole again at every step; ``shared``: keys and values of
    the tokens, which all rows have in common, where the model may go on from them."""

    def __init__(self, tokens: Sequence[Sequence[int]], shared: Any = None) -> None:
        self.tokens, self.shared = [list(row) for row in tokens], shared

    @property
    def ids(self) -> list[int]:
        """Tokens of the first row."""
        return self.tokens[0]

    @property
    def length(self) -> int:
        return max(map(len, self.tokens))

    read_again = length  # tokens that the model reads again with each row, and that its traces then hold

    def rows(self, count: int) -> TokenRows:
        """``count`` rows that go on from the first."""
        return TokenRows(self.tokens * count, self.shared)

    def select(self, index: Tensor) -> None:
        """Row b becomes row ``index[b]``; index (B,)."""
        self.tokens = [self.tokens[row] for row in index.tolist()]


class KeyValueRows:
    """A cache of ``transformers`` for B rows; seen (B, S) bool: which of its tokens are not padding."""

    def __init__(self, count: int, device: torch.device, shared: Any = None) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()  # without a configuration it keeps every token: masks enforce sliding windows
        length = 0 if shared is None else shared.length
        for number, layer in enumerate([] if shared is None else shared.cache.layers):
            self.cache.update(*(x.expand(count, -1, -1, -1) for x in (layer.keys, layer.values)), number)
        self.seen = torch.ones(count, length, dtype=torch.bool, device=device)

    @property
    def length(self) -> int:
        return self.seen.shape[1]

    def rows(self, count: int) -> KeyValueRows:
        """Raises NotImplementedError: rows begin with a :class:`SharedPrefix`."""
        raise NotImplementedError("rows go on from the state of one row")

    def select(self, index: Tensor) -> None:
        """Row b becomes row ``index[b]``; index (B,)."""
        self.cache.batch_select_indices(index)
        self.seen = self.seen[index]

    def follow(self, padding: Tensor) -> Tensor:
        """Takes note of new columns (B, T), True at padding; returns their positions in their rows (B, T)."""
        self.seen = torch.cat([self.seen, ~padding.to(self.seen.device)], 1)
        return (self.seen.long().cumsum(1) - 1).clamp(min=0)[:, -padding.shape[1] :]
