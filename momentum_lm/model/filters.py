"""What momentum attention adds to attention: an exponential moving average of the values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_lm import ops

from .config import DecoderConfig
from .marks import no_matrices, no_weight_decay
from .precision import Float32


def make_momentum(config: DecoderConfig) -> nn.Module | None:
    """The momentum of one layer's attention; None where the configuration has none."""
    gate = config.momentum_gate == "zero"
    if config.momentum_kind == "ema":
        learned, normalize = config.momentum_learned, config.momentum_normalize
        return MomentumEMA(config.kv_heads, config.momentum_eta, learned, normalize, gate)
    if config.momentum_kind == "multi_ema":
        return MomentumMultiEMA(config.kv_heads * config.head_dim, gate)
    return None


def _added(average: Tensor, addend: Tensor | None) -> Tensor:
    """average (B, G, T, D) plus addend (B, H, T, D), each of the H heads that of its group."""
    if addend is None:
        return average
    groups = average.shape[1]
    if addend.shape[1] == groups:
        return average + addend
    return (average[:, :, None] + addend.unflatten(1, (groups, -1))).flatten(1, 2)


class _Momentum(Float32):
    """What both kinds share: fp32, no matrices, and what they take from a checkpoint."""

    gate: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        no_matrices(self)

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
        out = out.unflatten(2, (heads, -1)).transpose(1, 2)
        return _added(out, addend), state

    def decays(self) -> Tensor:
        """The decays, (n,), for logging."""
        return torch.sigmoid(self.delta.detach()).flatten()
