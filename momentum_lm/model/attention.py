"""Causal self-attention with momentum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packed
from .config import DecoderConfig
from .filters import make_momentum
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

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        momentum = make_momentum(config)  # first: of one seed its numbers are drawn before those of the projections
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
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        mask: (B, 1, T, S) True where attention is allowed, or FlexAttention's; None: causal, which must fit T = S, or
        T = 1 and everything allowed.
        padding: (B, T) True at padding on the left, which the EMA must not see. cache is updated in place.
        """
        x = autocast_once(x)
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
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
            past = (v, None if cache is None else cache.momentum, segment_ids, padding)
            if self.measure:
                with torch.no_grad():  # of the average each of the group's query heads gets a copy
                    norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in (self.momentum(*past)[0], out)]
                    self.momentum_ratio = norms[0] * (self.heads / self.kv_heads) ** 0.5 / norms[1]
            out, state = self.momentum(*past, addend=out)
            if cache is not None and not cache.frozen:
                cache.momentum = state
        return self.out_proj(out.transpose(1, 2).flatten(2))
