"""The kinds of momentum attention: moving averages of what came before, and sums over the last few tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_lm import ops

from .config import DecoderConfig
from .filters import FiniteFilter, MomentumFilter, added, register_filter


@register_filter("ema")
class MomentumEMA(MomentumFilter):
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

    @classmethod
    def make(cls, config: DecoderConfig, place: str, heads: int, size: int) -> MomentumFilter:
        kind = MomentumDepth if place == "depth" else cls
        gate = config.momentum_gate == "zero"
        return kind(heads, config.momentum_eta, config.momentum_learned, config.momentum_normalize, gate)

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
        """values (B, G, T, D), state (B, G, D) -> the average: see :meth:`MomentumFilter.forward`."""
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
        return added(out, addend), state

    def decays(self) -> Tensor:
        """The decays, (H,)."""
        return self.log_decay().detach().exp()

    def logged(self) -> dict[str, Tensor]:
        return {"decay": self.decays().float()}


@register_filter("multi_ema")
class MomentumMultiEMA(MomentumFilter):
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

    @classmethod
    def make(cls, config: DecoderConfig, place: str, heads: int, size: int) -> MomentumFilter:
        return cls(heads * size, config.momentum_gate == "zero")

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
        """values (B, G, T, D), state (B, G*D, 8) -> the averages: see :meth:`MomentumFilter.forward`."""
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
        return added(out, addend), state

    def decays(self) -> Tensor:
        """The decays, (C * 8,)."""
        return torch.sigmoid(self.delta.detach()).flatten()

    def logged(self) -> dict[str, Tensor]:
        return {"decay": self.decays().float()}


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


@register_filter("fir")
class MomentumFIR(FiniteFilter):
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

    @classmethod
    def make(cls, config: DecoderConfig, place: str, heads: int, size: int) -> MomentumFilter:
        gate = config.momentum_gate == "zero"
        return cls(heads, size, config.momentum_taps, config.momentum_eta, config.momentum_current, gate)

    def groups(self) -> int:
        return self.weights.shape[1]

    def taps(self) -> int:
        return len(self.weights)

    def after(
        self, values: Tensor, state: Tensor | None, segment_ids: Tensor | None, addend: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gate = 1.0 if self.gate is None else self.gate[:, None]
        current = None if self.current is None else self.current * gate
        return ops.fir(values, self.weights * gate, state, segment_ids, addend, current)

    def logged(self) -> dict[str, Tensor]:
        """The weights by lag, (G,) each, averaged over a head's channels, for logging."""
        by_lag = self.weights.detach().mean(-1)
        return {f"weight_of_lag_{lag}": weight for lag, weight in enumerate(by_lag[:8], 1)}
