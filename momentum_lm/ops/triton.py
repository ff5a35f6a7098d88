"""The EMA of attention values and its addition to attention's output, one kernel each way: README.md, "The kernel"."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Older GPUs have no bfloat16. Asked once, on import: torch.compile cannot trace the question.
SUPPORTED = all(torch.cuda.get_device_capability(index) >= (8, 0) for index in range(torch.cuda.device_count()))
LOG2_E = tl.constexpr(1.4426950408889634)


class Launch(NamedTuple):
    """A program takes ``block`` channels of one head of one sequence, all of its chunks of ``chunk`` tokens one after
    the other.
    """

    chunk: int
    block: int
    warps: int
    stages: int


def launch(dtype: torch.dtype, both: bool = False) -> Launch:
    """How to run a kernel on inputs of ``dtype``; ``both``: a backward pass that needs the averages again too."""
    # Hopper's tensor cores take 64 rows at a time; exact fp32 products, on the ordinary cores, would spill at 64. More
    # in README.md.
    half = dtype != torch.float32
    return Launch(chunk=64 if half else 32, block=32, warps=8 if both else 4, stages=3)


@triton.jit
def _power(lag, rate):
    """decay^lag; a lag below 0 counts as 0, so that nothing overflows."""
    return tl.exp2(tl.maximum(lag, 0).to(tl.float32) * rate)


INTERPRETED = tl.constexpr(not isinstance(_power, triton.JITFunction))


@triton.jit
def _weights(lag, rate, dtype: tl.constexpr):
    """decay^(lag-1) where lag > 0 and otherwise 0, as a sum of two matrices of ``dtype``."""
    weight = tl.where(lag > 0, _power(lag - 1, rate), 0.0)
    high = weight.to(dtype)
    return high, (weight - high.to(tl.float32)).to(dtype)


@triton.jit
def _product(high, low, x):
    """(high + low) @ x in fp32."""
    if x.dtype == tl.float32:
        return tl.dot(high, x, input_precision="ieee")
    elif INTERPRETED:  # it multiplies the bit patterns of bfloat16 as if they were integers
        return tl.dot(high.to(tl.float32) + low.to(tl.float32), x.to(tl.float32))
    else:
        return tl.dot(high, x, tl.dot(low, x))


@triton.jit
def _segments(ids, t, length):
    """How many segments end in the chunk before each token, and how many in all: one that ends with the chunk is in the
    total alone.
    """
    inner = t < length - 1
    ends = (tl.load(ids + t, mask=inner, other=0) != tl.load(ids + t + 1, mask=inner, other=0)).to(tl.int32)
    return tl.cumsum(ends, 0) - ends, tl.sum(ends, 0)


@triton.jit
def _forward_kernel(
    values, addend, out, log_decay, initial_state, final_state, states, segment_ids, heads, shared, length,
    values_b, values_h, values_t, values_d, addend_b, addend_h, addend_t, addend_d, out_b, out_h, out_t, out_d,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``state`` is E at the chunk's first token, or 0 if a segment starts there. ``heads`` are those of the output, of
    which ``shared`` share one of the values; the first of them stores its states.
    """
    of_all = tl.program_id(0).to(tl.int64) // tl.cdiv(DIM, BLOCK)
    b = of_all // heads
    h_out = of_all % heads
    h = h_out // shared
    row = of_all // shared
    first = h_out % shared == 0
    d = tl.program_id(0) % tl.cdiv(DIM, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, CHUNK)
    inside_d = d < DIM
    column = d[None, :].to(tl.int64)
    values += b * values_b + h * values_h + column * values_d
    out += b * out_b + h_out * out_h + column * out_d
    if addend is not None:
        addend += b * addend_b + h_out * addend_h + column * addend_d

    rate = tl.load(log_decay + h).to(tl.float32) * LOG2_E
    decay = tl.exp2(rate)
    high, low = _weights(r[:, None] - r[None, :], rate, values.dtype.element_ty)
    state = tl.zeros([BLOCK], tl.float32)
    if initial_state is not None:
        state = tl.load(initial_state + row * DIM + d, mask=inside_d, other=0.0).to(tl.float32)

    count = tl.cdiv(length, CHUNK)
    for c in tl.range(0, count, num_stages=STAGES):
        t = c * CHUNK + r
        at = t[:, None].to(tl.int64)
        inside = (t < length)[:, None] & inside_d[None, :]
        rest = tl.minimum(length - c * CHUNK, CHUNK)
        v = tl.load(values + at * values_t, mask=inside, other=0.0)
        high_here = high
        low_here = low
        from_start = _power(r, rate)
        to_end = _power(rest - r, rate)
        through = _power(rest, rate)
        if segment_ids is not None:
            before, total = _segments(segment_ids + b * length, t, length)
            same = before[:, None] == before[None, :]
            high_here = tl.where(same, high, 0.0)
            low_here = tl.where(same, low, 0.0)
            from_start = tl.where(before == 0, from_start, 0.0)
            to_end = tl.where(before == total, to_end, 0.0)
            through = tl.where(total == 0, through, 0.0)
        result = decay * _product(high_here, low_here, v) + from_start[:, None] * state[None, :]
        if addend is not None:
            result += tl.load(addend + at * addend_t, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at * out_t, result.to(out.dtype.element_ty), mask=inside)
        if states is not None:
            tl.store(states + (row * count + c) * DIM + d, state, mask=inside_d & first)
        state = through * state + tl.sum(to_end[:, None] * v.to(tl.float32), 0)
    tl.store(final_state + row * DIM + d, state, mask=inside_d & first)


@triton.jit
def _backward_kernel(
    grad, grad_values, log_decay, grad_final, grad_initial, values, states, grad_decay, segment_ids, heads, length,
    grad_b, grad_h, grad_t, grad_d, grad_values_b, grad_values_h, grad_values_t, grad_values_d, values_b, values_h,
    values_t, values_d,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the last chunk. ``adjoint`` is lambda at the first token after the chunk, or 0 if a segment starts there."""
    row = tl.program_id(0).to(tl.int64) // tl.cdiv(DIM, BLOCK)
    b = row // heads
    h = row % heads
    d = tl.program_id(0) % tl.cdiv(DIM, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, CHUNK)
    inside_d = d < DIM
    column = d[None, :].to(tl.int64)
    grad += b * grad_b + h * grad_h + column * grad_d
    grad_values += b * grad_values_b + h * grad_values_h + column * grad_values_d
    if values is not None:
        values += b * values_b + h * values_h + column * values_d
        products = tl.zeros([CHUNK, BLOCK], tl.float32)
    rate = tl.load(log_decay + h).to(tl.float32) * LOG2_E
    decay = tl.exp2(rate)
    high, low = _weights(r[None, :] - r[:, None], rate, grad.dtype.element_ty)
    adjoint = tl.zeros([BLOCK], tl.float32)
    if grad_final is not None:
        adjoint = tl.load(grad_final + row * DIM + d, mask=inside_d, other=0.0)

    count = tl.cdiv(length, CHUNK)
    for i in tl.range(0, count, num_stages=STAGES):
        c = count - 1 - i
        t = c * CHUNK + r
        at = t[:, None].to(tl.int64)
        inside = (t < length)[:, None] & inside_d[None, :]
        rest = tl.minimum(length - c * CHUNK, CHUNK)
        g = tl.load(grad + at * grad_t, mask=inside, other=0.0)
        high_here = high
        low_here = low
        from_start = _power(r, rate)
        to_end = _power(rest - r, rate)
        through = _power(rest, rate)
        if segment_ids is not None:
            before, total = _segments(segment_ids + b * length, t, length)
            same = before[:, None] == before[None, :]
            high_here = tl.where(same, high, 0.0)
            low_here = tl.where(same, low, 0.0)
            from_start = tl.where(before == 0, from_start, 0.0)
            to_end = tl.where(before == total, to_end, 0.0)
            through = tl.where(total == 0, through, 0.0)
        result = decay * _product(high_here, low_here, g) + to_end[:, None] * adjoint[None, :]
        tl.store(grad_values + at * grad_values_t, result.to(grad_values.dtype.element_ty), mask=inside)
        if values is not None:
            v = tl.load(values + at * values_t, mask=inside, other=0.0)
            state = tl.load(states + (row * count + c) * DIM + d, mask=inside_d, other=0.0)
            average = (
                decay * _product(tl.trans(high_here), tl.trans(low_here), v) + from_start[:, None] * state[None, :]
            )
            products += tl.where(inside & (at > 0), average * (result + g.to(tl.float32)), 0.0)
        adjoint = through * adjoint + tl.sum(from_start[:, None] * g.to(tl.float32), 0)
    tl.store(grad_initial + row * DIM + d, adjoint, mask=inside_d)
    if values is not None:
        tl.store(grad_decay + tl.program_id(0), tl.sum(products))


def _forward_outputs(values: Tensor, addend: Tensor | None, learned: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = values.shape
    chunks = triton.cdiv(length, launch(values.dtype).chunk)
    return (
        torch.empty_like(values if addend is None else addend),
        values.new_empty(batch, heads, dim, dtype=torch.float32),
        values.new_empty(batch, heads, chunks if learned else 0, dim, dtype=torch.float32),
    )


def _backward_outputs(grad: Tensor, learned: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dim = grad.shape
    blocks = triton.cdiv(dim, launch(grad.dtype).block)
    return (
        torch.empty_like(grad),
        grad.new_empty(batch, heads, dim, dtype=torch.float32),
        grad.new_empty(batch, heads, blocks if learned else 0, dtype=torch.float32),
    )


# Operators that torch.compile does not look into, rather than an autograd.Function that it would trace down to the
# kernels: no graph
# breaks either way, but these run compiled in the interpreter too, so that a machine without a GPU can test it.
@torch.library.custom_op(
    "momentum_lm::ema",
    mutates_args=(),
    schema="(Tensor values, Tensor log_decay, Tensor? initial_state, Tensor? segment_ids, Tensor? addend, bool learned)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    addend: Tensor | None,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the state after the last token and, if the decay is ``learned``, the state before each chunk."""
    batch, _, length, dim = values.shape
    out, final_state, states = _forward_outputs(values, addend, learned)
    heads = out.shape[1]
    chunk, block, warps, stages = launch(values.dtype)
    with torch.cuda.device_of(values):
        _forward_kernel[(batch * heads * triton.cdiv(dim, block),)](
            values,
            addend,
            out,
            log_decay.contiguous(),
            None if initial_state is None else initial_state.contiguous(),
            final_state,
            states if learned else None,
            None if segment_ids is None else segment_ids.contiguous(),
            heads,
            heads // values.shape[1],
            length,
            *values.stride(),
            *(out if addend is None else addend).stride(),
            *out.stride(),
            DIM=dim,
            CHUNK=chunk,
            BLOCK=block,
            STAGES=stages,
            num_warps=warps,
        )
    return out, final_state, states


@torch.library.custom_op(
    "momentum_lm::ema_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor log_decay, Tensor? grad_final, Tensor? segment_ids, Tensor? values, Tensor? states)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    log_decay: Tensor,
    grad_final: Tensor | None,
    segment_ids: Tensor | None,
    values: Tensor | None,
    states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the values, of the initial state and, where ``values`` are given, of the decay, in (B, H,
    blocks) summands.
    """
    batch, heads, length, dim = grad.shape
    learned = values is not None
    grad_values, grad_initial, grad_decay = _backward_outputs(grad, learned)
    chunk, block, warps, stages = launch(grad.dtype, both=learned)
    with torch.cuda.device_of(grad):
        _backward_kernel[(batch * heads * triton.cdiv(dim, block),)](
            grad,
            grad_values,
            log_decay.contiguous(),
            None if grad_final is None else grad_final.contiguous(),
            grad_initial,
            values,
            states,
            grad_decay if learned else None,
            None if segment_ids is None else segment_ids.contiguous(),
            heads,
            length,
            *grad.stride(),
            *grad_values.stride(),
            *(grad if values is None else values).stride(),
            DIM=dim,
            CHUNK=chunk,
            BLOCK=block,
            STAGES=stages,
            num_warps=warps,
        )
    return grad_values, grad_initial, grad_decay


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    values, log_decay, initial_state, segment_ids, _, learned = inputs
    _, final_state, states = output
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = values.shape, values.dtype
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(log_decay, segment_ids, *((values, final_state, states) if learned else (None, None, None)))


def _gradients(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """Once: the operator it calls has no gradient. The addend's is that of the output itself, not a copy."""
    log_decay, segment_ids, values, final_state, states = ctx.saved_tensors
    if grad_out is None and grad_final is None:
        return (None,) * 6
    grad = log_decay.new_zeros(ctx.shape, dtype=ctx.dtype) if grad_out is None else grad_out
    if grad.shape[1] != ctx.shape[1]:  # of heads that share values
        grad = grad.unflatten(1, (ctx.shape[1], -1)).sum(2)
    grad_values, grad_initial, summands = _backward(grad, log_decay, grad_final, segment_ids, values, states)
    grad_decay = None
    if values is not None:
        grad_decay = summands.sum((0, 2))
        if grad_final is not None:
            grad_decay = grad_decay + (final_state * grad_final).sum((0, 2))
        grad_decay = grad_decay.to(log_decay.dtype)
    grad_state = None if ctx.state_dtype is None else grad_initial.to(ctx.state_dtype)
    return grad_values, grad_decay, grad_state, None, grad_out if ctx.needs_input_grad[4] else None, None


_forward.register_fake(
    lambda values, log_decay, initial, ids, addend, learned: _forward_outputs(values, addend, learned)
)
_backward.register_fake(lambda grad, log_decay, final, ids, values, states: _backward_outputs(grad, values is not None))
_forward.register_autograd(_gradients, setup_context=_save)


def ema_triton(
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.ema`, for values and addend of one dtype: fp32, bf16 or
    fp16.

    Kept for the backward pass: the values and a state per chunk if ``log_decay`` takes a gradient, otherwise nothing of
    their size.
    """
    learned = log_decay.requires_grad and torch.is_grad_enabled()
    out, final_state, _ = _forward(values, log_decay, initial_state, segment_ids, addend, learned)
    return out, final_state
