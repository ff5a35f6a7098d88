"""Causal filters of attention values (momentum attention): moving averages and a few taps. README.md derives them."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .chunked import ema_chunked, multi_ema_chunked
from .naive import ema_naive, fir_naive, multi_ema_naive
from .shifted import fir_shifted
from .transforms import under_transforms

__all__ = ["ema", "ema_naive", "fir", "fir_naive", "multi_ema", "multi_ema_naive", "multi_ema_step"]

_TRITON = importlib.util.find_spec("triton") is not None


def ema(
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Strictly causal exponential moving average of attention values, per head.

    ``out[b,h,t] = sum_{i<t, same segment} exp((t-i) log_decay[h]) values[b,h,i]  (+ exp(t log_decay[h])
    initial_state[b,h])``, plus ``addend[b,h,t]``.

    A fused Triton kernel on GPUs of compute capability 8.0 or later, in fp32, bf16 and fp16; plain torch everywhere
    else. Under torch.func's transformations and forward-mode differentiation, and exported with any length, the naive
    form: O(T^2) memory.

    Args: values: (B, H, T, D), any floating dtype, any strides, T >= 1. log_decay: (H,), fp32 or fp64, finite and < 0
        (not checked: that would wait for the device). initial_state: (B, H, D), the state that an earlier call
        returned; it belongs to the first token's segment. segment_ids: (B, T) integers; a segment is a run of equal ids
        and the average starts anew with each. addend: (B, H, T, D), floating: attention's output. Sum and average are
        rounded together, once; it is left as it is. Of query heads that share the values' heads in groups it has more,
        (B, n H, T, D): the heads h n to h n + n - 1 are those of values' head h, and each gets its average.

    Returns: out in the dtype and of the shape of ``addend``, without one those of ``values``, and the state after the
        last token (B, H, D), fp32 (fp64 for fp64 values): ``exp(log_decay) (average[T-1] + values[T-1])``. Sums are
        kept in that dtype, under autocast too. Both are differentiable (once) in values, log_decay, initial_state and
        addend; memory is linear in T.

    Raises:
        ValueError: shapes that do not fit, T = 0, or a ``log_decay`` in half precision (0.999 would become 1).

    Source: arXiv 2212.10559, section 5, MoAttn.
    """
    if values.dim() != 4 or values.shape[2] == 0:
        raise ValueError(f"values must be (batch, heads, time >= 1, dim), got {tuple(values.shape)}")
    batch, heads, length, dim = values.shape
    _check("log_decay", log_decay, (heads,))
    _check_precision("log_decay", log_decay)
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, heads, dim))
    if segment_ids is not None:
        _check("segment_ids", segment_ids, (batch, length))
    _check_addend(addend, values)
    if _has_kernel(values, addend) and not under_transforms():
        from .triton import SUPPORTED, ema_triton  # only here: nothing but CUDA tensors needs Triton

        if SUPPORTED:
            return ema_triton(values, log_decay, initial_state, segment_ids, addend)
    return ema_chunked(values, log_decay, initial_state, segment_ids, addend)


def multi_ema(
    values: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Several damped averages per channel, weighted and summed, the current token included: the authors' posted
    variant.

    ``h[b,t,c,n] = exp(log_decay[c,n]) h[b,t-1,c,n] + values[b,t,c];   out[b,t,c] = sum_n weight[c,n] h[b,t,c,n]``

    Args:
        values: (B, T, C), any floating dtype: all heads' values side by side.
        log_decay: (C, N), fp32 or fp64, finite and < 0.
        weight: (C, N), signed.
        initial_state: (B, C, N), the state that an earlier call returned; it belongs to the first token's segment.
        segment_ids: (B, T) integers; a segment is a run of equal ids.

    Returns: out (B, T, C) in the dtype of ``values`` and the state after the last token (B, C, N), fp32 (fp64 for fp64
        values). Sums are kept in that dtype, under autocast too; those of the gradients if the backward pass runs
        outside autocast.

    Raises:
        ValueError: shapes that do not fit, T = 0, or a ``log_decay`` in half precision.

    Source: the code that an author of arXiv 2212.10559 posted (microsoft/LMOps, issue 9); there by FFT, here by chunks.
    """
    if values.dim() != 3 or values.shape[1] == 0:
        raise ValueError(f"values must be (batch, time >= 1, channels), got {tuple(values.shape)}")
    batch, length, channels = values.shape
    order = log_decay.shape[-1]
    _check("log_decay", log_decay, (channels, order))
    _check_precision("log_decay", log_decay)
    _check("weight", weight, (channels, order))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, channels, order))
    if segment_ids is not None:
        _check("segment_ids", segment_ids, (batch, length))
    return multi_ema_chunked(values, log_decay, weight, initial_state, segment_ids)


def multi_ema_step(values: Tensor, log_decay: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of :func:`multi_ema`: values (B, C), log_decay and weight (C, N), state (B, C, N) -> out
    (B, C), state.
    """
    state = log_decay.exp() * state + values.to(state.dtype)[..., None]
    return (weight * state).sum(-1).to(values.dtype), state


def fir(
    x: Tensor,
    weights: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
    current: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted sum of the last K tokens per channel: a causal filter with a finite impulse response.

    ``out[b,h,t] = sum_{k=1..K, same segment} weights[k-1,h] x[b,h,t-k]``, plus ``current[h] x[b,h,t]``, plus
    ``addend[b,h,t]``.

    Args:
        x: (B, H, T, D), any floating dtype, any strides, T >= 1.
        weights: (K, H, D), K >= 1: the weight of the token before first.
        initial_state: (B, H, K, D), the state that an earlier call returned; it belongs to the first token's segment.
        segment_ids: (B, T) integers; a segment is a run of equal ids, and nothing is seen of the one before.
        addend: (B, H, T, D), or (B, n H, T, D) for heads that share those of ``x``, as in :func:`ema`. Sum and addend
            are rounded together, once.
        current: (H, D), the weight of the token itself; None: 0.

    Returns: out in the dtype and of the shape of ``addend``, without one those of ``x``; and the last K inputs
        (B, H, K, D), the oldest first, in the dtype of ``x``: those of the last token's segment, 0 before them. Sums
        are kept in fp32 (fp64 for fp64 ``x``), under autocast too. Both are differentiable (once) in x, weights,
        initial_state, addend and current.

    Raises:
        ValueError: shapes that do not fit, T = 0 or K = 0.
    """
    if x.dim() != 4 or x.shape[2] == 0:
        raise ValueError(f"x must be (batch, heads, time >= 1, dim), got {tuple(x.shape)}")
    batch, heads, length, dim = x.shape
    if weights.dim() != 3 or weights.shape[0] == 0:
        raise ValueError(f"weights must be (taps >= 1, heads, dim), got {tuple(weights.shape)}")
    taps = weights.shape[0]
    _check("weights", weights, (taps, heads, dim))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, heads, taps, dim))
    if segment_ids is not None:
        _check("segment_ids", segment_ids, (batch, length))
    _check_addend(addend, x)
    if current is not None:
        _check("current", current, (heads, dim))
    if initial_state is None and _has_kernel(x, addend) and not under_transforms():
        from .triton import SUPPORTED
        from .triton_fir import fir_triton

        if SUPPORTED:
            return fir_triton(x, weights, segment_ids, addend, current)
    return fir_shifted(x, weights, initial_state, segment_ids, addend, current)


def _has_kernel(values: Tensor, addend: Tensor | None) -> bool:
    return (
        _TRITON
        and values.is_cuda
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (addend is None or addend.dtype == values.dtype)
    )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_addend(addend: Tensor | None, values: Tensor) -> None:
    """Whose heads are those of ``values`` (B, H, T, D), or groups that share them."""
    if addend is None:
        return
    batch, heads, length, dim = values.shape
    shared = addend.shape[1] // heads if addend.dim() == 4 else 1
    _check("addend", addend, (batch, max(shared, 1) * heads, length, dim))


def _check_precision(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {tensor.dtype}: half precision rounds a decay of 0.999 to 1"
        )
