"""Functions of ``transformers``' attention interface: with more than SDPA knows, with momentum, and watched.

A function of the interface maps (module, query (B, H, T, D), key and value (B, H or fewer, S, D), mask, options) to
(output (B, T, H, D), weights or None). A model calls the one that its configuration names.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from momentum_lm import ops
from momentum_lm.errors import UserError

from .cpu_fast import grouped_attention, register_attention

ROWS = 256  # queries whose weights are held at a time, where SDPA does not compute an attention
_NAME = "momentum_lm_watched"


def implementation(model: Any) -> str:
    """The name of the attention function that a model calls."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def split_mask(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """A mask of transformers' attention interface (..., T, S) -> what it adds to logits, if anything, and True at what
    is seen.
    """
    if mask.dtype == torch.bool:
        return None, mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    return mask.float().masked_fill(~seen, 0.0), seen


def full_mask(
    attention_mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, bias: Tensor | None
) -> Tensor | None:
    """What an attention of transformers' interface sees, (B or 1, H or 1, T, S) as of :func:`split_mask`; None:
    everything up to the query's own place, where there are as many keys as queries. bias: what is added to logits
    beside the mask.
    """
    length, total = query.shape[2], key.shape[2]
    if attention_mask is None and (bias is not None or length != total or not causal):
        attention_mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=query.device)
        if causal and length > 1:
            attention_mask = attention_mask.tril()
    elif attention_mask is not None:
        attention_mask = attention_mask[..., :total]
    if bias is None or attention_mask is None:
        return attention_mask
    added, seen = split_mask(attention_mask)
    bias = bias[..., :total].float()
    return (bias if added is None else bias + added).masked_fill(~seen, torch.finfo(torch.float32).min)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention (B, T, H, D) as :meth:`momentum_lm.lm.tracing.AttentionTrace.attention` describes it, where SDPA knows
    no soft-capping and no sinks.
    """
    groups, parts = query.shape[1] // key.shape[1], []
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    column = torch.arange(key.shape[2], device=key.device)
    for first in range(0, query.shape[2], ROWS):
        rows = slice(first, min(first + ROWS, query.shape[2]))
        logits = (query[:, :, rows] @ key.transpose(2, 3)).float() * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        added, seen = (None, column <= column[rows, None]) if mask is None else split_mask(mask[:, :, rows])
        logits = (logits if added is None else logits + added).masked_fill(~seen, torch.finfo(logits.dtype).min)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        parts.append(logits.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value)
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def logit_scale(query: Tensor, options: dict[str, Any]) -> float:
    """What queries (B, H, T, D) are multiplied with."""
    scale = options.get("scaling")
    return query.shape[-1] ** -0.5 if scale is None else scale


def is_causal(module: Any, options: dict[str, Any]) -> bool:
    """Whether an attention without a mask sees nothing of the future."""
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any
) -> Any:
    """What a model's own attention computes, SDPA or what that does not know: query (B, H, T, D), key and value (B, H
    or fewer, S, D) -> (output (B, T, H, D), weights or None)."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return grouped_attention(module, query, key, value, attention_mask, *given, **options)
    mask = full_mask(attention_mask, query, key, is_causal(module, options), options.get("position_bias"))
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    return softmax_attention(query, key, value, mask, logit_scale(query, options), softcap, sinks), None


@dataclass(frozen=True)
class MomentumAttention:
    """A function of the interface: ``attention``, one with SDPA's masks, called ``base``, and momentum after it."""

    attention: Callable[..., Any]
    base: str
    eta: float
    normalize: bool
    gate: float
    taps: int | None = None  # how many of the last values count; None: all

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *given: Any,
        **options: Any,
    ) -> Any:
        out, weights = self.attention(module, query, key, value, attention_mask, *given, **options)
        return self.add_to(out, query, value, attention_mask), weights

    def add_to(self, out: Tensor, query: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """out (B, T, H, D), what attention gave, plus ``gate * scale * sum_{i<t} eta^(t-i) v_i``, of ``taps`` the last
        ones alone; itself for a gate of 0.
        """
        if self.gate == 0:
            return out
        factor = self.gate * ((1 - self.eta) / self.eta if self.normalize else 1.0)
        average = _average(value, mask, query.shape[2], self.eta, self.taps)
        average = average.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
        return (out + factor * average).to(out.dtype)


def added_momentum(model: Any) -> MomentumAttention | None:
    """What :func:`momentum_lm.lm.momentum_attention.add_momentum` added to the attention that ``model`` has now."""
    from transformers import AttentionInterface

    attention = AttentionInterface().get(implementation(model))
    return attention if isinstance(attention, MomentumAttention) else None


def _average(values: Tensor, mask: Tensor | None, length: int, eta: float, taps: int | None) -> Tensor:
    """values (B, H, S, D) and SDPA's mask (B, 1, T, S) -> the averages (B, H, T, D) at the T = ``length`` last tokens,
    or, without a mask, the first ones, as SDPA has it."""
    batch, heads, total, size = values.shape
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if mask is None and length > 1 and taps is not None:
        weights = eta ** torch.arange(1, taps + 1, dtype=values.dtype, device=values.device)
        return ops.fir(values[:, :, :length], weights[:, None, None].expand(-1, heads, size))[0]
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
        lag = (
            seen.flip(-1).cumsum(-1, dtype=values.dtype).flip(-1) - 1
        )  # by what is seen; 0 at a query's own token, the last
        counted = seen & (lag > 0) if taps is None else seen & (lag > 0) & (lag <= taps)
        weight = torch.where(counted, torch.exp(lag * math.log(eta)), 0.0)
        parts.append(weight.expand(batch, -1, -1) @ merged)
    return torch.cat(parts, 1).unflatten(2, (heads, -1)).transpose(1, 2)


_attend: ContextVar[Callable[..., Any] | None] = ContextVar("attend", default=None)


def is_watched() -> bool:
    """Whether this runs within :func:`watched`."""
    return _attend.get() is not None


@contextlib.contextmanager
def watched(model: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Within it ``attend``, a function of the interface, computes every attention of ``model`` that goes through it.
    Masks are of the kind that the model's own attention takes."""
    from transformers.masking_utils import eager_mask

    def watch(*given: Any, **options: Any) -> Any:
        return (_attend.get() or plain_attention)(*given, **options)

    before = implementation(model)
    eager = before == "eager"
    name = register_attention(f"{_NAME}_eager", watch, eager_mask) if eager else register_attention(_NAME, watch)
    model.set_attn_implementation(name)
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)
        model.set_attn_implementation(before)


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention modules of a transformers model, in the order in which they run, found by running it on two tokens;
    one that stands in several layers comes as often.

    Raises UserError for a model whose attention does not go through transformers' attention interface.
    """
    found: list[nn.Module] = []

    def attend(module: Any, *given: Any, **options: Any) -> Any:
        found.append(module)
        return plain_attention(module, *given, **options)

    with torch.no_grad(), watched(model, attend):
        model(torch.ones(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    if not found:
        kind = type(model).__name__
        raise UserError(f"{kind} does not use transformers' attention interface, so its attention cannot be read")
    return found
