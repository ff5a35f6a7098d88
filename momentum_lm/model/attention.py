"""Causal self-attention with momentum, and the cache that lets it go on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import Float32, autocast_once


@dataclass
class LayerCache:
    """One layer's past: keys and values (B, H, S, D), keys already rotated, and the momentum state. ``frozen``: nothing is added."""

    keys: Tensor | None = None
    values: Tensor | None = None
    momentum: Tensor | None = None
    frozen: bool = False


@dataclass
class Cache:
    """What a decoder remembers of a prefix: keys, values and EMA state per layer, which keys are padding, and each row's next position."""

    layers: list[LayerCache]
    length: int = 0
    padding: Tensor | None = None  # (B, S) True at padding; None when there is none
    positions: Tensor | None = None  # (B,) number of real tokens so far
    frozen: bool = False  # only ever read: the tokens of a call follow it, and are forgotten

    def select(self, index: Tensor) -> None:
        """Replaces row b by row ``index[b]`` (beam search), in place. The number of rows may change."""
        self._map(lambda tensor: tensor.index_select(0, index))

    def rows(self, count: int, frozen: bool = False) -> Cache:
        """A new cache for ``count`` rows that share this one-row prefix, without copying it. This one stays as it is.

        ``frozen``: the new one is only read. No layer then keeps its rows' keys and values, and rows may be padded on the right.
        """
        layers = [LayerCache(c.keys, c.values, c.momentum, frozen) for c in self.layers]
        copy = Cache(layers, self.length, self.padding, self.positions, frozen)
        copy._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))
        return copy

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.keys, layer.values, layer.momentum = (None if t is None else fn(t) for t in (layer.keys, layer.values, layer.momentum))
        self.padding = None if self.padding is None else fn(self.padding)
        self.positions = None if self.positions is None else fn(self.positions)


class Rotary(Float32):
    """Rotary position embedding (arXiv 2104.09864): dimension pairs (i, i + D/2) turn by position * 10000^(-2i/D)."""

    frequency: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (B, T) -> cos, sin (B, 1, T, D/2) in fp32."""
        angle = positions[:, None, :, None].float() * self.frequency.float()
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, D), rotated in fp32."""
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, ``Attn`` or, with ``momentum``, ``MoAttn = Attn + EMA(V)`` (arXiv 2212.10559, section 5).

    Parameter names are those of fairseq's MultiheadAttention. ``momentum`` is a module that maps
    (values (B, H, T, D), state, segment_ids, padding, addend) to (an average of the same shape plus the addend, state).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, momentum: nn.Module | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.momentum = momentum
        self.measure = False  # when set, forward leaves rms(EMA)/rms(attention) in `momentum_ratio`
        self.momentum_ratio: Tensor | None = None
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: LayerCache | None = None,
        padding: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        mask: (B, 1, T, S) True where attention is allowed; None: causal, which must fit T = S, or T = 1 and everything allowed.
        padding: (B, T) True at padding on the left, which the EMA must not see. cache is updated in place.
        """
        x = autocast_once(x)
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rotation is not None:
            q, k = Rotary.rotate(q, *rotation), Rotary.rotate(k, *rotation)

        keys, values = k, v
        if cache is not None:
            if cache.keys is not None and cache.values is not None:
                keys, values = torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2)
            if not cache.frozen:
                cache.keys, cache.values = keys, values
        out = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1,
        )

        if self.momentum is not None:
            past = (v, None if cache is None else cache.momentum, segment_ids, padding)
            if self.measure:
                with torch.no_grad():
                    norms = [torch.linalg.vector_norm(t, dtype=torch.float32) for t in (self.momentum(*past)[0], out)]
                    self.momentum_ratio = norms[0] / norms[1]
            out, state = self.momentum(*past, addend=out)
            if cache is not None and not cache.frozen:
                cache.momentum = state
        return self.out_proj(out.transpose(1, 2).flatten(2))
