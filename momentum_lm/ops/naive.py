"""The paper's equation, literally: the oracle that every other implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def run_numbers(ids: Tensor) -> Tensor:
    """(B, T) ids -> the number, from 0, of the run of equal ids that each lies in: equal ids in two places are two
    segments.
    """
    begins = ids != ids.roll(1, 1)  # of the first token that says nothing: the token before it is the last
    return begins.cumsum(1) - begins[:, :1].long()


def ema_naive(
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.ema`, in O(T^2) time and memory, by automatic
    differentiation.

    Source: arXiv 2212.10559, section 5: ``MoAttn_t = Attn_t + sum_{i<t} eta^(t-i) v_i``.
    """
    length = values.shape[2]
    dtype = torch.promote_types(values.dtype, torch.float32)
    v, log_eta = values.to(dtype), log_decay.to(dtype)
    t = torch.arange(length, device=values.device)

    lag = t[:, None] - t[None, :]
    weight_htt = torch.exp(lag.clamp(min=0) * log_eta[:, None, None]).masked_fill(lag <= 0, 0.0)
    weight_bhtt = weight_htt[None]
    if segment_ids is not None:
        segment_ids = run_numbers(segment_ids)
        same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
        weight_bhtt = weight_bhtt.masked_fill(~same_segment[:, None], 0.0)
    out = weight_bhtt @ v

    if initial_state is not None:
        weight_bht = torch.exp(t * log_eta[:, None])[None]
        if segment_ids is not None:
            weight_bht = weight_bht.masked_fill((segment_ids > 0)[:, None], 0.0)
        out = out + weight_bht[..., None] * initial_state.to(dtype)[:, :, None]

    final_state = torch.exp(log_eta)[:, None] * (out[:, :, -1] + v[:, :, -1])
    if addend is not None:
        out = out.repeat_interleave(addend.shape[1] // out.shape[1], 1) + addend
    return out.to(values.dtype if addend is None else addend.dtype), final_state


def multi_ema_naive(
    values: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.multi_ema`, one token at a time."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    batch, _, channels = values.shape
    decay, weight = log_decay.to(dtype).exp(), weight.to(dtype)
    state = values.new_zeros(batch, channels, log_decay.shape[1], dtype=dtype)
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t, v in enumerate(values.to(dtype).unbind(1)):
        if segment_ids is not None and t > 0:
            state = torch.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None], state, 0.0)
        state = decay * state + v[:, :, None]
        outputs.append((weight * state).sum(-1))
    return torch.stack(outputs, 1).to(values.dtype), state


def fir_naive(
    x: Tensor,
    weights: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
    current: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.fir`, tap by tap, by automatic differentiation."""
    batch, heads, length, dim = x.shape
    taps = weights.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(batch, heads, taps, dim) if initial_state is None else initial_state
    inputs = torch.cat([before.to(dtype), x.to(dtype)], 2)  # that of token t is at taps + t
    runs = torch.zeros(batch, taps + length, dtype=torch.long, device=x.device)
    if segment_ids is not None:
        runs = torch.cat([runs[:, :taps], run_numbers(segment_ids)], 1)

    out = torch.zeros_like(inputs[:, :, taps:])
    if current is not None:
        out = out + current.to(dtype)[:, None] * inputs[:, :, taps:]
    for lag in range(1, taps + 1):
        seen = slice(taps - lag, taps - lag + length)
        same = (runs[:, seen] == runs[:, taps:])[:, None, :, None]
        out = out + weights[lag - 1].to(dtype)[:, None] * torch.where(same, inputs[:, :, seen], 0.0)

    last = (runs[:, length:] == runs[:, -1:])[:, None, :, None]
    final_state = torch.where(last, inputs[:, :, length:], 0.0).to(x.dtype)
    if addend is not None:
        out = out.repeat_interleave(addend.shape[1] // heads, 1) + addend
    return out.to(x.dtype if addend is None else addend.dtype), final_state
