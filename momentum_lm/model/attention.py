"""Causal self-attention with momentum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packed
from .config import DecoderConfig
from .filters import Around, make_filter
from .norms import make_norm
from .positions import Rotary
from .precision import autocast_once
from .state import LayerCache


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, ``Attn`` or, with ``momentum``, ``MoAttn = Attn + EMA(V)`` (arXiv 2212.10559,
    section 5).

    H query heads in G groups share G heads of keys and values (arXiv 2305.13245), and so the average of their group's
    values. Parameter names are those of fairseq's MultiheadAttention. ``momentum`` is a module that maps (values
    (B, G, T, D), state, segment_ids, padding, addend (B, H, T, D)) to (an average plus the addend, state).
    """

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        momentum = make_filter(config, "output")  # first: of one seed its numbers are drawn before the projections'
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        queries, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, queries, bias=config.bias != "none")
        self.k_proj = nn.Linear(config.dim, shared, bias=config.bias != "none")
        self.v_proj = nn.Linear(config.dim, shared, bias=config.bias != "none")
        self.out_proj = nn.Linear(queries, config.dim, bias=config.bias == "all")
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else None
        self.momentum = momentum
        self.momentum_values = make_filter(config, "values")
        self.momentum_keys = make_filter(config, "keys")
        self.momentum_queries = make_filter(config, "queries")
        self.momentum_depth: Any = make_filter(config, "depth") if layer > 0 else None
        self.measure = False  # when set, forward leaves rms(EMA)/rms(attention) in `momentum_ratio`
        self.momentum_ratio: Tensor | None = None
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | packed.BlockMask | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        padding: Tensor | None = None,
        segment_ids: Tensor | None = None,
        below: Tensor | None = None,
    ) -> Any:
        """x (B, T, C) -> (B, T, C), and with ``below`` what heads gave, (B, H, T, D), for the layer above.

        mask: (B, 1, T, S) True where attention is allowed, or FlexAttention's; None: causal, which must fit T = S, or
        T = 1 and everything allowed.
        padding: (B, T) True at padding on the left, which filters must not see. cache is updated in place.
        below: what the heads of the layer below gave, for momentum across layers; in the first layer of no meaning.
        """
        x = autocast_once(x)
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        around = Around(segment_ids, padding, cache)
        if self.momentum_queries is not None:
            q = around.filtered("queries", self.momentum_queries, q)
        if self.momentum_keys is not None:
            k = around.filtered("keys", self.momentum_keys, k)
        if self.momentum_values is not None:
            v = around.filtered("values", self.momentum_values, v)
        if self.q_norm is not None and self.k_norm is not None:  # under autocast in the precision of their weights
            q, k = (norm(y.to(norm.weight.dtype)).to(y.dtype) for y, norm in ((q, self.q_norm), (k, self.k_norm)))
        if rotation is not None:
            q, k = Rotary.rotate(q, *rotation), Rotary.rotate(k, *rotation)

        keys, values = k, v
        if cache is not None:
            if cache.keys is not None and cache.values is not None:
                keys, values = torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2)
            if not cache.frozen:
                cache.keys, cache.values = keys, values
        if isinstance(mask, packed.BlockMask):
            out = packed.attend(q, keys, values, mask)
        else:
            out = F.scaled_dot_product_attention(
                q,
                keys,
                values,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=mask is None and q.shape[2] > 1,
                enable_gqa=self.kv_heads != self.heads,
            )

        if self.momentum is not None:
            if self.measure:
                self._measure(v, around, out)
            out = around.filtered("output", self.momentum, v, out)
        if below is not None and self.momentum_depth is not None:
            out = self.momentum_depth.across(out, below)
        result = self.out_proj(out.transpose(1, 2).flatten(2))
        return result if below is None else (result, out)

    @torch.no_grad()
    def _measure(self, v: Tensor, around: Around, out: Tensor) -> None:
        """v (B, G, T, D), out (B, H, T, D): leaves the ratio of the norms in ``momentum_ratio``."""
        momentum: Any = self.momentum
        state = None if around.cache is None else around.cache.filters.get("output")
        average, _ = momentum(v, state, around.segment_ids, around.padding)
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in (average, out)]
        # of the average each of the group's query heads gets a copy
        self.momentum_ratio = norms[0] * (self.heads / self.kv_heads) ** 0.5 / norms[1]
