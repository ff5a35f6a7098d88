"""Attention within the documents of a packed row, on GPUs: by FlexAttention, which needs no T x T mask."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def usable(device: torch.device, head_dim: int, dropout: bool) -> bool:
    """Whether FlexAttention computes this attention there: it has no dropout, and its kernels no heads below 16."""
    return device.type == "cuda" and head_dim >= 16 and not dropout


def document_mask(segment_ids: Tensor) -> BlockMask:
    """What each token of rows (B, T) sees: itself and what is before it in its document, which has a number of its own.

    Blocks of 128 x 128 tokens of which no token sees another are left out, so that memory and time grow with the
    documents' lengths.
    """
    batch, length = segment_ids.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (segment_ids[row, query] == segment_ids[row, key])

    return create_block_mask(sees, batch, None, length, length, device=segment_ids.device)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attention as scaled_dot_product_attention's: query (B, H, T, D), key and value (B, G, T, D) -> (B, H, T, D)."""
    function = flex_attention if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled()
    out: Tensor = function(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    return out


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
