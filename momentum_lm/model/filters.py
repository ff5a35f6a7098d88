"""What momentum attention adds to attention: an exponential moving average of the values."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_lm import ops

from .config import DecoderConfig
from .marks import no_matrices, no_weight_decay
from .precision import Float32
from .state import LayerCache


def make_filter(config: DecoderConfig, place: str) -> nn.Module | None:
    """The filter at one of :data:`.config.PLACES`, of one layer; None where the configuration has none there.

    Values, keys and queries have heads; other places are divided into as many groups as there are attention heads, each
    with a decay and a gate of its own, or are one group where that does not divide them.
    """
    if place not in config.places:
        return None
    count, size = heads_at(config, place)
    gate = config.momentum_gate == "zero"
    if config.momentum_kind == "ema":
        kind = MomentumDepth if place == "depth" else MomentumEMA
        return kind(count, config.momentum_eta, config.momentum_learned, config.momentum_normalize, gate)
    if config.momentum_kind == "multi_ema":
        return MomentumMultiEMA(count * size, gate)
    return MomentumFIR(count, size, config.momentum_taps, config.momentum_eta, config.momentum_current, gate)


def heads_at(config: DecoderConfig, place: str) -> tuple[int, int]:
    """The heads, or groups of channels, of what is filtered at a place, and the channels of each."""
    if place in ("output", "values", "keys"):
        return config.kv_heads, config.head_dim
    if place in ("queries", "depth"):
        return config.heads, config.head_dim
    width = config.ffn_dim if place == "ffn_hidden" else config.dim
    groups = config.heads if width % config.heads == 0 else 1
    return groups, width // groups


def is_of_filter(name: str) -> bool:
    """Whether a parameter of this name, in a decoder or in a checkpoint of one, belongs to a filter."""
    return re.search(r"(^|\.)momentum(_[a-z]+)*\.", name) is not None


class Around(NamedTuple):
    """What stands around the tokens that are filtered: see :meth:`MomentumEMA.forward`."""

    segment_ids: Tensor | None = None
    padding: Tensor | None = None
    cache: LayerCache | None = None

    def filtered(self, place: str, module: Any, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """x (B, G, T, D) -> its filter plus ``addend`` (None: ``x`` itself), whose state goes on in the cache."""
        state = None if self.cache is None else self.cache.filters.get(place)
        out, state = module(x, state, self.segment_ids, self.padding, x if addend is None else addend)
        if self.cache is not None and not self.cache.frozen and state is not None:
            self.cache.filters[place] = state
        return out

    def wide(self, place: str, module: Any, x: Tensor) -> Tensor:
        """x (B, T, C) plus its filter, if there is one, in groups of channels."""
        if module is None:
            return x
        grouped = x.unflatten(-1, (module.groups(), -1)).transpose(1, 2)
        return self.filtered(place, module, grouped).transpose(1, 2).flatten(2)


def _added(average: Tensor, addend: Tensor | None) -> Tensor:
    """average (B, G, T, D) plus addend (B, H, T, D), each of the H heads that of its group."""
    if addend is None:
        return average
    groups = average.shape[1]
    if addend.shape[1] == groups:
        return average + addend
    return (average[:, :, None] + addend.unflatten(1, (groups, -1))).flatten(1, 2)


class _Momentum(Float32):
    """What all kinds share: fp32, no matrices, and what they take from a checkpoint."""

    gate: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        no_matrices(self)

    def groups(self) -> int:
        """Into how many groups the filter divides channels without heads."""
        raise NotImplementedError

    def decays(self) -> Tensor:
        """The decays, (n,)."""
        raise NotImplementedError

    def logged(self) -> dict[str, Tensor]:
        """What to log of the filter, by name, (n,) each."""
        return {"decay": self.decays().float()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict(prefix=prefix)
        if self.gate is not None and not any(name in state_dict for name in own):
            state_dict.update(own)  # a model that was trained without momentum, which a gate of 0 leaves as it is
        for name in ("fixed_log_decay", "normalized"):  # checkpoints had them once; a model goes by its options
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MomentumEMA(_Momentum):
    """``gate[h] * scale[h] * sum_{i<t} eta[h]^(t-i) v_i``, one decay per head.

    Source: arXiv 2212.10559, section 5 (one fixed eta, scale 1, no gate). ``learned`` makes eta a parameter, kept as a
    logit; ``normalize`` sets scale = (1 - eta) / eta, so that the weights sum to 1; ``gate`` adds a learned factor that
    starts at 0.
    """

    fixed_log_decay: Tensor

    def __init__(
        self, heads: int, eta: float, learned: bool = False, normalize: bool = False, gate: bool = False
    ) -> None:
        super().__init__()
        self.normalize = normalize
        logit = torch.full((heads,), math.log(eta) - math.log1p(-eta))
        self.decay_logit = nn.Parameter(logit) if learned else None
        self.register_buffer(
            "fixed_log_decay", None if learned else torch.full((heads,), math.log(eta)), persistent=False
        )
        self.gate = nn.Parameter(torch.zeros(heads)) if gate else None

    def groups(self) -> int:
        return len(self.log_decay())

    def log_decay(self) -> Tensor:
        """log(eta), (H,), fp32."""
        return self.fixed_log_decay if self.decay_logit is None else F.logsigmoid(self.decay_logit)

    def forward(
        self,
        values: Tensor,
        state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """values (B, G, T, D), state (B, G, D) or None -> (EMA, plus ``addend`` (B, H, T, D) if given, whose heads are
        G groups, state after the last token).

        padding: (B, T) True at padding on the left, which is neither seen nor any time to the average.
        """
        log_decay = self.log_decay()
        factor = torch.expm1(-log_decay) if self.normalize else None
        if self.gate is not None:
            factor = self.gate if factor is None else factor * self.gate
        if padding is None and factor is None:
            return ops.ema(values, log_decay, state, segment_ids, addend)
        if padding is None:
            out, state = ops.ema(values, log_decay, state, segment_ids)
        else:
            out, final = ops.ema(values.masked_fill(padding[:, None, :, None], 0.0), log_decay, None, segment_ids)
            if state is not None:  # it meets each row at that row's first real token
                elapsed = torch.exp((~padding).cumsum(1)[:, None] * log_decay[:, None])  # (B, H, T), own token included
                before = elapsed * torch.exp(-log_decay)[:, None]
                out = out + (before[..., None] * state[:, :, None]).to(out.dtype)
                final = final + elapsed[:, :, -1:] * state
            state = final
        if factor is not None:
            out = out * factor.to(out.dtype)[:, None, None]
        return _added(out, addend), state

    def decays(self) -> Tensor:
        """The decays, (n,), for logging."""
        return self.log_decay().detach().exp()


class MomentumMultiEMA(_Momentum):
    """Eight learned decays per channel with signed learned weights, the current token included.

    Source: the class that an author of arXiv 2212.10559 posted (microsoft/LMOps, issue 9): decay ``sigmoid(delta)``
    with delta ~ N(0, 0.2), weight ``gamma / sqrt(dim)`` with gamma ~ N(0, 1).
    """

    ORDER = 8

    def __init__(self, dim: int, gate: bool = False) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.randn(dim, self.ORDER) * 0.2)
        self.gamma = nn.Parameter(torch.randn(dim, self.ORDER))
        self.gate = nn.Parameter(torch.zeros(dim)) if gate else None
        no_weight_decay(self, "delta", "gamma")

    def groups(self) -> int:
        return 1

    def forward(
        self,
        values: Tensor,
        state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """values (B, G, T, D), state (B, G*D, 8) or None -> as MomentumEMA, with its padding and addend."""
        heads = values.shape[1]
        merged = values.transpose(1, 2).flatten(2)  # (B, T, G*D)
        weight = self.gamma / math.sqrt(self.gamma.shape[0])
        if self.gate is not None:
            weight = weight * self.gate[:, None]
        log_decay = F.logsigmoid(self.delta)
        if padding is not None:
            out, final = ops.multi_ema(
                merged.masked_fill(padding[..., None], 0.0), log_decay, weight, None, segment_ids
            )
            if state is not None:
                count = (~padding).cumsum(1)[..., None, None]  # (B, T, 1, 1)
                elapsed = torch.exp(count * log_decay) * state[:, None]  # (B, T, C, 8)
                out = out + (weight * elapsed).sum(-1).to(out.dtype)
                final = final + elapsed[:, -1]
            state = final
        elif merged.shape[1] == 1 and state is not None:
            out, state = ops.multi_ema_step(merged[:, 0], log_decay, weight, state)
            out = out[:, None]
        else:
            out, state = ops.multi_ema(merged, log_decay, weight, state, segment_ids)
        out = out.contiguous().unflatten(2, (heads, -1)).transpose(1, 2)  # channels last, as projections read them
        return _added(out, addend), state

    def decays(self) -> Tensor:
        """The decays, (n,), for logging."""
        return torch.sigmoid(self.delta.detach()).flatten()


class MomentumDepth(MomentumEMA):
    """``a_l + gate * scale * eta * a_{l-1}``, an average over the layers below at the same token (l: the layer).

    ``a_{l-1}`` holds the average already, so that this is sum_{k>=0} eta^k Attn_{l-k}; with ``normalize`` the layer
    below counts (1 - eta). It has no state: tokens do not meet.
    """

    def across(self, out: Tensor, below: Tensor) -> Tensor:
        """out, below (B, H, T, D): attention's output, and the layer's below with its own average -> the sum."""
        weight = -torch.expm1(self.log_decay()) if self.normalize else self.log_decay().exp()
        weight = weight if self.gate is None else weight * self.gate
        return out + weight.to(out.dtype)[:, None, None] * below


class MomentumFIR(_Momentum):
    """``gate[h] * sum_{k=1..K} w[k] x_{t-k}``, K learned weights per channel, that begin as ``eta^k``.

    ``current``: one more for the token itself, that begins as 0. ``gate``: a learned factor per head that starts at 0.
    Sources: Canon layers (arXiv 2512.17351), KV shifting (2411.19574), Primer (2109.08668): by place and K.
    """

    def __init__(self, heads: int, size: int, taps: int, eta: float, current: bool = False, gate: bool = False) -> None:
        super().__init__()
        lags = torch.arange(1, taps + 1, dtype=torch.float64)
        self.weights = nn.Parameter((eta**lags).float()[:, None, None].repeat(1, heads, size))
        self.current = nn.Parameter(torch.zeros(heads, size)) if current else None
        self.gate = nn.Parameter(torch.zeros(heads)) if gate else None
        no_weight_decay(self, "weights", "current")

    def groups(self) -> int:
        return self.weights.shape[1]

    def forward(
        self,
        values: Tensor,
        state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """values (B, G, T, D), state (B, G, K, D) or None -> as MomentumEMA, with its padding and addend."""
        gate = 1.0 if self.gate is None else self.gate[:, None]
        weights = self.weights * gate
        current = None if self.current is None else self.current * gate
        if padding is None:
            return ops.fir(values, weights, state, segment_ids, addend, current)
        values = values.masked_fill(padding[:, None, :, None], 0.0)
        if state is None:  # what is before a row's first token is 0, as padding is now
            return ops.fir(values, weights, None, segment_ids, addend, current)
        # the state meets each row at its first real token: padding goes to the end, and back
        missing, length, taps = padding.sum(1), values.shape[2], len(weights)
        there = torch.arange(length, device=values.device) + missing[:, None]  # (B, T)
        moved = _taken(values, there.remainder(length))
        out, _ = ops.fir(moved, weights, state, None, None, current)
        out = _taken(out, (there - 2 * missing[:, None]).remainder(length))
        seen = torch.cat([state.to(values.dtype), moved], 2)  # of which each row's last K real ones are left
        last = torch.arange(taps, device=values.device) + (length - missing)[:, None]
        return _added(out, addend), _taken(seen, last)

    def logged(self) -> dict[str, Tensor]:
        """The weights by lag, (G,) each, averaged over a head's channels, for logging."""
        by_lag = self.weights.detach().mean(-1)
        return {f"weight_of_lag_{lag}": weight for lag, weight in enumerate(by_lag[:8], 1)}


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x (B, G, T, D), index (B, n) -> (B, G, n, D), token ``index[b, i]`` of row b."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
