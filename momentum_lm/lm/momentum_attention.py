"""Momentum in a causal model of ``transformers`` that was trained without: for studies of what it does at inference
time."""

from __future__ import annotations

from typing import Any

from momentum_lm.errors import UserError, arg
from momentum_lm.model.config import DEFAULT_ETA, FILTER_KINDS

from .attention_interface import MomentumAttention, added_momentum, attention_modules
from .cpu_fast import grouped_attention, register_attention
from .tracing import check_attention

_ATTENTIONS = ("sdpa", "sdpa_grouped")  # implementations, by their names in transformers, that may have momentum added


def add_momentum(
    model: Any,
    eta: float = DEFAULT_ETA,
    normalize: bool = False,
    gate: float = 1.0,
    kind: str = "ema",
    at: str = "output",
    taps: int = 3,
) -> None:
    """From now on each attention head of ``model`` gives ``attention + gate * scale * sum_{i<t} eta^(t-i) v_i``, in
    place; with ``kind`` "fir" over the last ``taps`` values alone.

    The sum is over what attention sees: no padding, which is no time either, and with a sliding window only what is in
    it. Its past is the cache's values, so every cache of keys and values will do, beams and prefixes that rows share
    included. ``normalize`` sets scale = (1 - eta) / eta instead of 1, as in :class:`momentum_lm.model.MomentumEMA`. A
    second call changes the values; ``gate`` 0 leaves the model as it was, bitwise. Gradients flow as through any other
    operation. The values belong to the implementation of attention that the model's configuration names, so that models
    that share it have them too. Another one that is set afterwards is without, as is a saved copy.

    There is no training, so a kind that is nothing without its learned weights is refused, as is another place than
    ``output``: this interface sees keys after positions turned them, and of a cache only what it holds.

    Source: arXiv 2212.10559, section 5. Raises UserError, naming the command line's flag, for a decay that is none, and
    for a model with momentum of its own, another attention than SDPA, attention that transformers' interface does not
    reach, or one that does not see what its masks show: each is tried on a few tokens.
    """
    check_eta(eta)
    _check_kind(kind, at, taps, normalize)
    base = _attention_that_takes_momentum(model)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = sdpa_attention_forward if base == "sdpa" else grouped_attention
    last = None if kind == "ema" else taps
    with_momentum = MomentumAttention(attention, base, float(eta), normalize, float(gate), last)
    name = f"{base}_momentum_{float(eta)}_{normalize}_{float(gate)}" + ("" if last is None else f"_{last}")
    model.set_attn_implementation(register_attention(name, with_momentum))


def _check_kind(kind: str, at: str, taps: int, normalize: bool) -> None:
    """Raises UserError for a kind of momentum or a place that :func:`add_momentum` does not have."""
    if kind not in ("ema", "fir"):
        known = kind in FILTER_KINDS and kind != "none"
        problem = ": has weights that training must find" if known else ": there is no such kind of momentum"
        raise UserError(arg(kind=kind), f"{problem}; use ema or fir")
    if at != "output":
        raise UserError(arg(at=at), ": momentum is added to the output of somebody else's attention, at=output")
    if normalize and kind != "ema":
        raise UserError(arg(normalize=True), " needs ", arg(kind="ema"), f", not {kind}")
    if taps < 1:
        raise UserError(arg(taps=taps), ": must be at least 1")


def _attention_that_takes_momentum(model: Any) -> str:
    """The name of the attention that the model has, without momentum; raises UserError where that takes none."""
    name = type(model).__name__
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
            arg("eta"),
            f": {name} does not use transformers' attention interface, so momentum cannot be added",
        ) from error
    if not all(getattr(module, "is_causal", True) for module in modules):
        raise UserError(arg("eta"), f": the attention of {name} is not causal")
    try:
        check_attention(model)
    except UserError as error:
        raise UserError(arg("eta"), ": ", error) from error
    return str(base)


def check_eta(eta: float) -> None:
    """Raises UserError for a decay that is none."""
    if not 0 < eta < 1:
        raise UserError(arg(eta=eta), ": the decay must lie strictly between 0 and 1, such as 0.3")
