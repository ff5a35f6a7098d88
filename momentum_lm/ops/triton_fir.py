"""The filter of a few taps without an initial state, as training runs it, one kernel each way: README.md, "A few taps".

A program takes a tile of tokens and channels of one head of one sequence, and reads a token again for every tap: the
second time it comes from the cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .naive import run_numbers
from .shifted import last_inputs

TOKENS, CHANNELS = 64, 32  # of a tile


@triton.jit
def _tile(heads, length, DIM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sequence, head, number of the tile along time, tokens (TOKENS, 1) and channels (1, CHANNELS) of a program."""
    blocks = tl.cdiv(DIM, CHANNELS)
    tiles = tl.cdiv(length, TOKENS)
    rest = tl.program_id(0) // blocks
    number = rest % tiles
    of_all = (rest // tiles).to(tl.int64)
    t = number * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return of_all // heads, of_all % heads, number, t[:, None], d[None, :]


@triton.jit
def _run(runs, t, length):
    """The number of each token's segment; of tokens outside the sequence one that no token has."""
    return tl.load(runs + t, mask=(t >= 0) & (t < length), other=-1)


@triton.jit
def _forward_kernel(
    x, weights, runs, addend, current, out, heads, shared, length,
    x_b, x_h, x_t, x_d, addend_b, addend_h, addend_t, addend_d, out_b, out_h, out_t, out_d,
    TAPS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``heads`` are those of the output, of which ``shared`` share one of ``x``."""
    b, h_out, _, t, d = _tile(heads, length, DIM, TOKENS, CHANNELS)
    h = h_out // shared
    inside, channel = (t < length) & (d < DIM), d < DIM
    weights += h * DIM + d
    x += b * x_b + h * x_h + d.to(tl.int64) * x_d
    step = (heads // shared) * DIM
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if current is not None:
        weight = tl.load(current + h * DIM + d, mask=channel, other=0.0).to(tl.float32)
        total += weight * tl.load(x + t.to(tl.int64) * x_t, mask=inside, other=0.0).to(tl.float32)
    for lag in range(1, TAPS + 1):
        there = inside & (t >= lag)
        if runs is not None:
            there = there & (_run(runs + b * length, t, length) == _run(runs + b * length, t - lag, length))
        seen = tl.load(x + (t - lag).to(tl.int64) * x_t, mask=there, other=0.0).to(tl.float32)
        total += tl.load(weights + (lag - 1) * step, mask=channel, other=0.0) * seen
    if addend is not None:
        addend += b * addend_b + h_out * addend_h + t.to(tl.int64) * addend_t + d.to(tl.int64) * addend_d
        total += tl.load(addend, mask=inside, other=0.0).to(tl.float32)
    out += b * out_b + h_out * out_h + t.to(tl.int64) * out_t + d.to(tl.int64) * out_d
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, x, weights, runs, current, grad_x, summands, heads, length,
    grad_b, grad_h, grad_t, grad_d, x_b, x_h, x_t, x_d, out_b, out_h, out_t, out_d,
    TAPS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``summands`` (B, tiles, K + 1, H, D): what each tile adds to the gradients of ``current`` and of the weights."""
    b, h, number, t, d = _tile(heads, length, DIM, TOKENS, CHANNELS)
    inside, channel = (t < length) & (d < DIM), d < DIM
    step = heads * DIM
    weights += h * DIM + d
    summands += (b * tl.cdiv(length, TOKENS) + number) * (TAPS + 1) * step + h * DIM + d
    x += b * x_b + h * x_h + d.to(tl.int64) * x_d
    grad += b * grad_b + h * grad_h + d.to(tl.int64) * grad_d
    g = tl.load(grad + t.to(tl.int64) * grad_t, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if current is not None:
        total += tl.load(current + h * DIM + d, mask=channel, other=0.0).to(tl.float32) * g
        here = tl.load(x + t.to(tl.int64) * x_t, mask=inside, other=0.0).to(tl.float32)
        tl.store(summands, tl.sum(g * here, 0)[None, :], mask=channel)
    for lag in range(1, TAPS + 1):
        before = inside & (t >= lag)
        after = inside & (t + lag < length)
        if runs is not None:
            run = _run(runs + b * length, t, length)
            before = before & (run == _run(runs + b * length, t - lag, length))
            after = after & (run == _run(runs + b * length, t + lag, length))
        later = tl.load(grad + (t + lag).to(tl.int64) * grad_t, mask=after, other=0.0).to(tl.float32)
        total += tl.load(weights + (lag - 1) * step, mask=channel, other=0.0) * later
        seen = tl.load(x + (t - lag).to(tl.int64) * x_t, mask=before, other=0.0).to(tl.float32)
        tl.store(summands + lag * step, tl.sum(g * seen, 0)[None, :], mask=channel)
    grad_x += b * out_b + h * out_h + t.to(tl.int64) * out_t + d.to(tl.int64) * out_d
    tl.store(grad_x, total.to(grad_x.dtype.element_ty), mask=inside)


def _grid(heads: int, x: Tensor) -> tuple[int]:
    return (x.shape[0] * heads * triton.cdiv(x.shape[2], TOKENS) * triton.cdiv(x.shape[3], CHANNELS),)


def _summands(x: Tensor, weights: Tensor) -> Tensor:
    tiles, taps = triton.cdiv(x.shape[2], TOKENS), len(weights)
    return x.new_zeros(x.shape[0], tiles, taps + 1, *weights.shape[1:], dtype=torch.float32)


# Operators rather than an autograd.Function: see triton.py
@torch.library.custom_op(
    "momentum_lm::fir",
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor? runs, Tensor? addend, Tensor? current) -> Tensor",
)
def _forward(x: Tensor, weights: Tensor, runs: Tensor | None, addend: Tensor | None, current: Tensor | None) -> Tensor:
    out = torch.empty_like(x if addend is None else addend)
    heads = out.shape[1]
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(heads, x)](
            x, weights, runs, addend, current, out, heads, heads // x.shape[1], x.shape[2],
            *x.stride(), *(out if addend is None else addend).stride(), *out.stride(),
            TAPS=len(weights), DIM=x.shape[3], TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


@torch.library.custom_op(
    "momentum_lm::fir_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weights, Tensor? runs, Tensor? current) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, weights: Tensor, runs: Tensor | None, current: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and (B, tiles, K + 1, H, D) summands of those of ``current`` and of the weights."""
    grad_x, summands = torch.empty_like(x), _summands(x, weights)
    with torch.cuda.device_of(x):
        _backward_kernel[_grid(x.shape[1], x)](
            grad, x, weights, runs, current, grad_x, summands, x.shape[1], x.shape[2],
            *grad.stride(), *x.stride(), *grad_x.stride(),
            TAPS=len(weights), DIM=x.shape[3], TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return grad_x, summands


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, runs, _, current = inputs
    ctx.save_for_backward(x, weights, runs, current)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Once: the operator it calls has no gradient."""
    x, weights, runs, current = ctx.saved_tensors
    of_groups = grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)
    grad_x, summands = _backward(of_groups, x, weights, runs, current)
    grad_current, grad_weights = summands.sum((0, 1)).split((1, len(weights)))
    of_addend = grad if ctx.needs_input_grad[3] else None
    return grad_x, grad_weights, None, of_addend, None if current is None else grad_current[0]


_forward.register_fake(lambda x, weights, runs, addend, current: torch.empty_like(x if addend is None else addend))
_backward.register_fake(lambda grad, x, weights, runs, current: (torch.empty_like(x), _summands(x, weights)))
_forward.register_autograd(_gradients, setup_context=_save)


def fir_triton(
    x: Tensor,
    weights: Tensor,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
    current: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.fir` without an initial state, for x and addend of one
    dtype: fp32, bf16 or fp16. Keeps its inputs for the backward pass."""
    runs = None if segment_ids is None else run_numbers(segment_ids).contiguous()
    of_token = None if current is None else current.float().contiguous()
    out = _forward(x, weights.float().contiguous(), runs, addend, of_token)
    return out, last_inputs(x.transpose(1, 2), None, len(weights), runs)
