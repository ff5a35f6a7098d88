"""Rows that follow one prefix, for models of ``transformers``: its keys and values are kept once, and on a CPU read in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .inference import grouped_attention, register_attention
from .states import TokenRows

PACKED_ATTENTION = "sdpa_grouped"  # the name, for ``set_attn_implementation``, of SDPA that knows packed rows
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias")  # options of an attention that :func:`_attend` does not know
# before, its kernel read past the end of keys of fewer heads
_FLASH_SHARES_KEYS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


class SharedPrefix:
    """Keys and values of one row, which rows of any number read, and which none adds to; ``ids``: its tokens."""

    def __init__(self, cache: Any, ids: Sequence[int] = ()) -> None:
        self.cache, self.ids = cache, ids
        self.length: int = cache.get_seq_length()
        for layer in cache.layers:
            layer.update = functools.partial(_read, layer.keys, layer.values)  # not of the layer, which would refer to itself

    def rows(self, count: int) -> TokenRows:
        """Rows that go on from it."""
        return TokenRows([self.ids] * count, self)

    def select(self, index: Tensor) -> None:
        raise NotImplementedError("there is one row")


class PackedRows:
    """Rows of unequal length, behind one another as a single row of N tokens, none of them padding.

    seen (B, T) bool: False at the padding, which is on the right.
    """

    def __init__(self, seen: Tensor, prefix: SharedPrefix) -> None:
        self.prefix = prefix
        self.shape = seen.shape
        self.places = seen.flatten().nonzero()[:, 0]  # (N,) among the B * T
        self.number = (seen.flatten().cumsum(0) - 1).view(seen.shape)  # (B, T) of each token among the N; padding repeats a row's last

    @property
    def positions(self) -> Tensor:
        """(1, N) places in the whole sequence."""
        return (self.prefix.length + self.places % self.shape[1])[None]

    def pad(self, packed: Tensor) -> Tensor:
        """(1, H, N, D) -> (B, H, T, D)."""
        return packed[0].transpose(0, 1)[self.number].transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        return padded.flatten(0, 1)[self.places]


_rows: ContextVar[PackedRows | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def packed(rows: PackedRows) -> Iterator[None]:
    """Within it a model with :data:`PACKED_ATTENTION` takes ``rows`` for its tokens (1, N), after their prefix."""
    before = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(before)


def register_packed_attention() -> str:
    """Makes :data:`PACKED_ATTENTION` known to ``transformers``; returns its name."""
    from transformers.masking_utils import sdpa_mask

    def mask(*given: Any, **options: Any) -> Any:
        return sdpa_mask(*given, **options) if _rows.get() is None else None

    return register_attention(PACKED_ATTENTION, _attend, mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any
) -> tuple[Tensor, None]:
    """As :func:`momentum_lm.lm.inference.grouped_attention`. Packed rows (1, H, N, D) attend to the prefix, all at once, and each to
    itself; the softmax over both is the mean of the two, each weighted by its sum of exponentials.

    Source: Juravsky et al., "Hydragen", arXiv 2402.05099, section 3.1. Raises NotImplementedError for an attention that is not plain.
    """
    rows = _rows.get()
    if rows is None:
        return grouped_attention(module, query, key, value, attention_mask, *given, **options)
    refused = [name for name in _REFUSED if options.get(name) is not None]
    if query.shape[1] != key.shape[1] and not _FLASH_SHARES_KEYS:
        refused.append("fewer heads of keys")
    if refused or attention_mask is not None:
        raise NotImplementedError(f"packed rows with {refused or 'a mask'}")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # unlike SDPA it returns the logarithm of the sums
    layer, scale = rows.prefix.cache.layers[module.layer_idx], options.get("scaling")
    shared, shared_log_sum = flash(query, layer.keys, layer.values, scale=scale)
    own, own_log_sum = flash(rows.pad(query), rows.pad(key), rows.pad(value), is_causal=True, scale=scale)
    weight = torch.sigmoid(shared_log_sum[0].t() - rows.pack(own_log_sum.transpose(1, 2)))  # (N, H)
    return torch.lerp(rows.pack(own.transpose(1, 2)), shared[0].transpose(0, 1), weight[..., None])[None], None


def _read(kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, *unused: Any, **unused_too: Any) -> tuple[Tensor, Tensor]:
    """A cache layer's ``update`` that adds nothing to it: what it kept and what is given, or that alone of packed rows."""
    if _rows.get() is not None:
        return keys, values
    rows = len(keys)
    return torch.cat([kept_keys.expand(rows, -1, -1, -1), keys], -2), torch.cat([kept_values.expand(rows, -1, -1, -1), values], -2)
