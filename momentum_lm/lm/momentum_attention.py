"""Momentum in a causal model of ``transformers`` that was trained without: for studies of what it does at inference time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from momentum_lm import ops
from momentum_lm.errors import UserError

from .inference import grouped_attention, register_attention

ROWS = 256  # of attention's mask that become weights at a time
_IMPLEMENTATIONS = {name: f"{name}_momentum" for name in ("sdpa", "sdpa_grouped")}  # by that of a model without


def add_momentum(model: Any, eta: float, normalize: bool = False, gate: float = 1.0) -> None:
    """From now on each attention head of ``model`` gives ``attention + gate * scale * sum_{i<t} eta^(t-i) v_i``, in place.

    The sum is over what attention sees: no padding, which is no time either, and with a sliding window only what is in it. Its past is
    the cache's values, so every cache of keys and values will do, beams and prefixes that rows share included. ``normalize`` sets scale =
    (1 - eta) / eta instead of 1, as in :class:`momentum_lm.modules.MomentumEMA`. A second call changes the values; ``gate`` 0 leaves the
    model as it was, bitwise. Gradients flow as through any other operation. The values are kept in the model's configuration, so that
    its description and models that share it have them too. Another attention that is set afterwards is without it, as is a saved copy.

    Source: arXiv 2212.10559, section 5. Raises UserError, naming the command line's flag, for a decay that is none, and for a model with
    momentum of its own, another attention than SDPA, or attention that transformers' interface does not reach.
    """
    from .tracing import attention_modules  # which itself needs this module

    name = type(model).__name__
    check_eta(eta)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "momentum_kind", "none") != "none":
        raise UserError(f"--hf-momentum-eta: {name} has momentum of its own")
    base = config._attn_implementation
    if base not in _IMPLEMENTATIONS and base not in _IMPLEMENTATIONS.values():
        raise UserError(f"--hf-momentum-eta needs SDPA through transformers' attention interface, but the attention of {name} is {base}")
    try:
        modules = attention_modules(model)
    except UserError as error:
        raise UserError(f"--hf-momentum-eta: {name} does not use transformers' attention interface, so momentum cannot be added") from error
    if not all(getattr(module, "is_causal", True) for module in modules):
        raise UserError(f"--hf-momentum-eta: the attention of {name} is not causal")
    config.added_momentum_eta, config.added_momentum_normalize, config.added_momentum_gate = float(eta), normalize, float(gate)
    if base in _IMPLEMENTATIONS:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        attention = sdpa_attention_forward if base == "sdpa" else grouped_attention
        model.set_attn_implementation(register_attention(_IMPLEMENTATIONS[base], with_momentum(attention)))


def check_eta(eta: float) -> None:
    """Raises UserError for a decay that is none."""
    if not 0 < eta < 1:
        raise UserError(f"--hf-momentum-eta {eta}: the decay must lie strictly between 0 and 1, such as 0.3")


def has_momentum(module: Any) -> bool:
    """Whether an attention module of transformers gives more than attention: by :func:`add_momentum`, or as one of our own models."""
    return bool(getattr(module.config, "added_momentum_gate", 0)) or getattr(module, "momentum", None) is not None


def with_momentum(attention: Callable[..., Any]) -> Callable[..., Any]:
    """``attention``, a function of transformers' attention interface with SDPA's masks, with the momentum that a model's configuration
    says, which may be none."""

    @functools.wraps(attention)
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any) -> Any:
        out, weights = attention(module, query, key, value, attention_mask, *given, **options)
        config = module.config
        factor = getattr(config, "added_momentum_gate", 0.0)
        if factor == 0:
            return out, weights
        eta = config.added_momentum_eta
        if config.added_momentum_normalize:
            factor *= (1 - eta) / eta
        average = _average(value, attention_mask, query.shape[2], eta)
        average = average.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
        return (out + factor * average).to(out.dtype), weights

    return attend


def _average(values: Tensor, mask: Tensor | None, length: int, eta: float) -> Tensor:
    """values (B, H, S, D) and SDPA's mask (B, 1, T, S) -> the averages (B, H, T, D) at the T = ``length`` last tokens, or, without a mask,
    the first ones, as SDPA has it."""
    batch, heads, total, _ = values.shape
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if mask is None and length > 1:
        log_decay = torch.full((heads,), math.log(eta), device=values.device)
        return ops.ema(values[:, :, :length], log_decay)[0]
    if mask is None:
        mask = torch.ones(1, 1, 1, total, dtype=torch.bool, device=values.device)
    elif mask.dtype != torch.bool:  # what is added to scores
        mask = mask > torch.finfo(mask.dtype).min / 2
    merged = values.transpose(1, 2).flatten(2)  # (B, S, H * D)
    parts = []
    for seen in mask[:, 0].split(ROWS, 1):
        lag = seen.flip(-1).cumsum(-1, dtype=values.dtype).flip(-1) - 1  # by what is seen; 0 at a query's own token, the last
        weight = torch.where(seen & (lag > 0), torch.exp(lag * math.log(eta)), 0.0)
        parts.append(weight.expand(batch, -1, -1) @ merged)
    return torch.cat(parts, 1).unflatten(2, (heads, -1)).transpose(1, 2)
