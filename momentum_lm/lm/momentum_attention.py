"""Momentum in a causal model of ``transformers`` that was trained without: for studies of what it does at inference time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momentum_lm import ops
from momentum_lm.errors import UserError, arg

from .inference import grouped_attention, register_attention

ROWS = 256  # of attention's mask that become weights at a time
_ATTENTIONS = ("sdpa", "sdpa_grouped")  # implementations, by their names in transformers, that may have momentum added


@dataclass(frozen=True)
class Added:
    """What :func:`add_momentum` added, and to which implementation of attention."""

    base: str
    eta: float
    normalize: bool
    gate: float


_added: dict[str, Added] = {}  # by the name of the implementation with momentum


def add_momentum(model: Any, eta: float, normalize: bool = False, gate: float = 1.0) -> None:
    """From now on each attention head of ``model`` gives ``attention + gate * scale * sum_{i<t} eta^(t-i) v_i``, in place.

    The sum is over what attention sees: no padding, which is no time either, and with a sliding window only what is in it. Its past is
    the cache's values, so every cache of keys and values will do, beams and prefixes that rows share included. ``normalize`` sets scale =
    (1 - eta) / eta instead of 1, as in :class:`momentum_lm.model.MomentumEMA`. A second call changes the values; ``gate`` 0 leaves the
    model as it was, bitwise. Gradients flow as through any other operation. The values belong to the implementation of attention that the
    model's configuration names, so that models that share it have them too. Another one that is set afterwards is without, as is a saved
    copy.

    Source: arXiv 2212.10559, section 5. Raises UserError, naming the command line's flag, for a decay that is none, and
    for a model with momentum of its own, another attention than SDPA, attention that transformers' interface does not
    reach, or one that does not see what its masks show: each is tried on a few tokens.
    """
    from .tracing import attention_modules, check_attention  # which itself needs this module

    name = type(model).__name__
    check_eta(eta)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "momentum_kind", "none") != "none":
        raise UserError(arg("eta"), f": {name} has momentum of its own")
    added = added_momentum(model)
    base = config._attn_implementation if added is None else added.base
    if base not in _ATTENTIONS:
        raise UserError(
            arg("eta"),
            f" needs SDPA through transformers' attention interface, but the attention of {name} is {base}",
        )
    try:
        modules = attention_modules(model)
    except UserError as error:
        raise UserError(
            arg("eta"), f": {name} does not use transformers' attention interface, so momentum cannot be added",
        ) from error
    if not all(getattr(module, "is_causal", True) for module in modules):
        raise UserError(arg("eta"), f": the attention of {name} is not causal")
    try:
        check_attention(model)
    except UserError as error:
        raise UserError(arg("eta"), ": ", error) from error
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    added = Added(base, float(eta), normalize, float(gate))
    implementation = f"{base}_momentum_{added.eta}_{normalize}_{added.gate}"
    _added[implementation] = added
    attention = with_momentum(sdpa_attention_forward if base == "sdpa" else grouped_attention, added)
    model.set_attn_implementation(register_attention(implementation, attention))


def added_momentum(model: Any) -> Added | None:
    """What was added to the attention that ``model`` has now."""
    return _added.get(model.config.get_text_config(decoder=True)._attn_implementation)


def check_eta(eta: float) -> None:
    """Raises UserError for a decay that is none."""
    if not 0 < eta < 1:
        raise UserError(arg(eta=eta), ": the decay must lie strictly between 0 and 1, such as 0.3")


def with_momentum(attention: Callable[..., Any], added: Added | None) -> Callable[..., Any]:
    """``attention``, a function of transformers' attention interface with SDPA's masks, and momentum after it; itself where none is
    added, or its gate is 0."""
    if added is None or added.gate == 0:
        return attention
    factor = added.gate * ((1 - added.eta) / added.eta if added.normalize else 1.0)

    @functools.wraps(attention)
    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any) -> Any:
        out, weights = attention(module, query, key, value, attention_mask, *given, **options)
        average = _average(value, attention_mask, query.shape[2], added.eta)
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
