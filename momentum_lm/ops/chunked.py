"""Linear-time EMA by chunks of block-Toeplitz products, on any device: the default. The derivation is in README.md."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .naive import ema_naive, run_numbers
from .transforms import of_any_length, under_transforms, without_autocast

CHUNK = 32
# Masking a Toeplitz matrix per document costs (chunk) floats per channel and token, so packed multi_ema takes short
# chunks.
PACKED_MULTI_CHUNK = 8


def _scan(
    x: Tensor, log_decay: Tensor, segment_ids: Tensor | None, strict: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """out[t] = sum over k <= t (k < t if ``strict``), same segment, of exp((t-k) log_decay) x[k];  last = the inclusive
    sum at T-1.

    x (B, T, H, D), log_decay (H,), segment_ids (B, T) -> out (B, T, H, D), last (B, H, D). With ``reverse`` time runs
    from T-1 to 0. States between chunks are themselves such a sum over chunks, so the function calls itself: linear
    memory, log_32(T) levels.
    """
    batch, length, heads, dim = x.shape
    size = min(CHUNK, length)
    pad = -length % size
    count = (length + pad) // size
    before, after = (
        (0, pad) if reverse else (pad, 0)
    )  # zeros where time begins change no sum, and the last chunk stays whole
    if pad:
        x = F.pad(x, (0, 0, 0, 0, before, after))
    x = x.reshape(batch * count, size, heads, dim)

    age = torch.arange(size, device=x.device)
    age = age.flip(0) if reverse else age
    lag = (
        torch.cat([age, age.amax(0, keepdim=True)])[:, None] - age
    )  # the row after the tokens' rows gives the chunk's sum
    seen = lag >= int(strict)
    seen[size] = True
    weight_hrc = torch.exp(lag.clamp(min=0) * log_decay[:, None, None]).masked_fill(~seen, 0.0)
    from_start_ch = torch.exp((age + 1)[:, None] * log_decay)

    ids = last_ids = None
    if segment_ids is not None:
        ids = torch.cat([segment_ids[:, :1].expand(-1, before), segment_ids, segment_ids[:, -1:].expand(-1, after)], 1)
        ids = ids.reshape(batch, count, size)
        last_ids = ids[:, :, 0 if reverse else -1]
        same = (torch.cat([ids, last_ids[..., None]], 2)[..., None] == ids[:, :, None]).flatten(0, 1)

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = x.new_empty(batch * count, heads, dim)
    for head, weight in enumerate(weight_hrc):  # a product per head reads x as it lies; all heads at once would copy it
        weight = weight.expand(batch * count, -1, -1) if ids is None else torch.where(same, weight, 0.0)
        product = torch.bmm(weight, x[:, :, head])
        out[:, :, head] = product[:, :-1]
        sums[:, head] = product[:, -1]
    sums = sums.unflatten(0, (batch, count))
    out = out.unflatten(0, (batch, count))

    last = sums[:, 0]
    if count > 1:
        states, last = _scan(sums, size * log_decay, last_ids, False, reverse)
        into, out_of = (slice(0, -1), slice(1, None)) if reverse else (slice(1, None), slice(0, -1))
        carried = from_start_ch[..., None]
        if ids is not None and last_ids is not None:
            continues = ids[:, into] == last_ids[:, out_of, None]
            carried = torch.where(continues[..., None, None], carried, 0.0)
        out[:, into].addcmul_(carried, states[:, out_of, None])
    return out.flatten(1, 2)[:, before : before + length], last


def _ema(
    v: Tensor, log_decay: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The EMA of ``v`` (B, T, H, D) in v's own precision, the state after it (B, H, D); the initial state is added by
    linearity.
    """
    length = v.shape[1]
    out, last = (torch.zeros_like(v), v[:, 0]) if length == 1 else _scan(v, log_decay, segment_ids, True, reverse)
    decay = log_decay.exp()[:, None]
    if initial_state is None:
        return out, decay * last
    t = torch.arange(length, device=v.device)
    weight = torch.exp((t.flip(0) if reverse else t)[:, None] * log_decay)[None, ..., None]  # (1, T, H, 1)
    at_end = torch.exp(length * log_decay)[:, None]
    if segment_ids is not None:
        first, end = (-1, 0) if reverse else (0, -1)
        in_first = segment_ids == segment_ids[:, first, None]
        weight = torch.where(in_first[..., None, None], weight, 0.0)
        at_end = torch.where(in_first[:, end, None, None], at_end, 0.0)
    return out.addcmul_(weight, initial_state[:, None]), decay * last + at_end * initial_state


def plus(out: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    """out (B, T, H, D), which may be changed, plus ``addend`` (B, n H, T, D), of which n heads share one of its own ->
    (B, n H, T, D), rounded once, to the addend's dtype; without one (B, H, T, D) in ``dtype``. Attention keeps the
    addend for its gradient: it is left as it is.
    """
    if addend is None:
        return out.transpose(1, 2).to(dtype)
    if addend.shape[1] == out.shape[2]:
        return out.transpose(1, 2).add_(addend).to(addend.dtype)
    grouped = addend.transpose(1, 2).unflatten(2, (out.shape[2], -1))  # (B, T, H, n, D)
    return (out[:, :, :, None] + grouped).to(addend.dtype).flatten(2, 3).transpose(1, 2)


def of_groups(grad_out: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (B, n H, T, D) of query heads, summed over those that share one of the values' H: (B, H, T, D)."""
    if grad_out.shape[1] == values.shape[1]:
        return grad_out.to(dtype)
    return grad_out.unflatten(1, (values.shape[1], -1)).sum(2, dtype=dtype)


class _EMA(torch.autograd.Function):
    """Saves only its inputs. With lambda_t = g_t + dv_t the gradients are two more EMAs: see README.md, "Gradients"."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        log_decay: Tensor,
        initial_state: Tensor | None,
        segment_ids: Tensor | None,
        addend: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(values, log_decay, initial_state, segment_ids)
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(values.dtype, torch.float32)
        with without_autocast(values.device):  # decay powers in bf16 would be wrong by tens of percent
            state = None if initial_state is None else initial_state.to(dtype)
            out, final_state = _ema(values.transpose(1, 2).to(dtype), log_decay.to(dtype), state, segment_ids)
        return plus(out, addend, values.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        values, log_decay, initial_state, segment_ids = ctx.saved_tensors
        if grad_out is None and grad_final is None:
            return (None,) * 5
        dtype = torch.promote_types(values.dtype, torch.float32)
        log_eta = log_decay.to(dtype)
        g = values.new_zeros(values.shape, dtype=dtype) if grad_out is None else of_groups(grad_out, values, dtype)
        with without_autocast(values.device):
            from_final = None if grad_final is None else log_eta.exp()[:, None] * grad_final.to(dtype)
            grad_values = _ema(g.transpose(1, 2), log_eta, from_final, segment_ids, reverse=True)[0].transpose(1, 2)

            grad_log_decay = grad_initial = None
            if ctx.needs_input_grad[1]:
                state = None if initial_state is None else initial_state.to(dtype)
                out, final_state = _ema(values.transpose(1, 2).to(dtype), log_eta, state, segment_ids)
                out = out.transpose(1, 2)
                grad_log_decay = (out[:, :, 1:] * (g + grad_values)[:, :, 1:]).sum((0, 2, 3))
                if grad_final is not None:
                    grad_log_decay = grad_log_decay + (final_state * grad_final.to(dtype)).sum((0, 2))
                grad_log_decay = grad_log_decay.to(log_decay.dtype)
            if ctx.needs_input_grad[2]:
                grad_initial = (g + grad_values)[:, :, 0].to(initial_state.dtype)
        return (
            grad_values.to(values.dtype),
            grad_log_decay,
            grad_initial,
            None,
            grad_out if ctx.needs_input_grad[4] else None,
        )


def ema_chunked(
    values: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.ema`. Once differentiable.

    Under torch.func's transformations, and exported with a time axis of any length, it is the naive form: O(T^2)
    memory.
    """
    if under_transforms() or of_any_length(values.shape[2]):
        with without_autocast(values.device):
            return ema_naive(values, log_decay, initial_state, segment_ids, addend)
    if segment_ids is not None:
        segment_ids = run_numbers(segment_ids)
    return _EMA.apply(values, log_decay, initial_state, segment_ids, addend)


def multi_ema_chunked(
    values: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.multi_ema`, by automatic differentiation of chunk products.

    Exported with a time axis of any length it is one product per channel: O(T^2) memory.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    if segment_ids is not None:
        segment_ids = run_numbers(segment_ids)
    with without_autocast(values.device):
        state = None if initial_state is None else initial_state.to(dtype)
        form = _multi_ema_product if of_any_length(values.shape[1]) else _multi_ema
        out, final = form(values.to(dtype), log_decay.to(dtype), weight.to(dtype), state, segment_ids)
    return out.to(values.dtype), final


def _with_contiguous_grad(x: Tensor) -> Tensor:
    """``x``, of any shape, whose gradient is made contiguous: products of others are a loop over the batch on a CPU."""
    if x.requires_grad and not torch.compiler.is_compiling() and not under_transforms():
        x.register_hook(Tensor.contiguous)
    return x


def _multi_ema(
    v: Tensor, log_decay: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, channels = v.shape
    size = min(CHUNK if segment_ids is None else PACKED_MULTI_CHUNK, length)
    pad = -length % size
    count = (length + pad) // size
    x = F.pad(v, (0, 0, pad, 0)).reshape(batch, count, size, channels).permute(3, 2, 0, 1)  # (C, size, B, n)
    x = x.contiguous()  # products of matrices that are not are a loop over channels

    r = torch.arange(size, device=v.device)
    power_cor = torch.exp(r * log_decay[..., None])  # (C, order, size): decay^lag
    kernel_cr = (weight[..., None] * power_cor).sum(1)
    lag = r[:, None] - r[None, :]
    toeplitz_crr = kernel_cr[:, lag.clamp(min=0)].masked_fill(lag < 0, 0.0)
    to_end_cor = power_cor.flip(2)
    from_start_cro = (weight[..., None] * power_cor * log_decay[..., None].exp()).transpose(1, 2)

    def per_channel(matrix: Tensor, columns: Tensor) -> Tensor:  # (C, a, b) x (C, b, B, n) -> (C, a, B, n)
        product = _with_contiguous_grad(matrix @ columns.flatten(2))
        return product.unflatten(2, columns.shape[2:])

    if segment_ids is None:
        out = per_channel(toeplitz_crr, x)
        sums = per_channel(to_end_cor, x)
        keep = None
    else:
        ids = torch.cat([segment_ids[:, :1].expand(-1, pad), segment_ids], 1).reshape(batch, count, size)
        same = (ids[..., :, None] == ids[..., None, :]).to(v.dtype)  # (B, n, size, size)
        out = torch.einsum("bnrk,crk,ckbn->crbn", same, toeplitz_crr, x)
        sums = torch.einsum("bnk,cok,ckbn->cobn", (ids == ids[..., -1:]).to(v.dtype), to_end_cor, x)
        # the state after chunk j goes on into chunk j + 1 wherever that chunk's tokens belong to the same segment
        keep = ids[:, 1:, -1] == ids[:, :-1, -1]

    decay = torch.exp(size * log_decay)[..., None]
    state = torch.zeros_like(sums[..., 0])
    states = []
    for j, total in enumerate(sums.unbind(-1)):
        if keep is not None and j > 0:
            state = torch.where(keep[:, j - 1], state, 0.0)
        state = decay * state + total
        states.append(state)
    if count > 1:
        carried = torch.stack(states[:-1], -1)  # (C, order, B, n-1)
        carry = per_channel(from_start_cro, carried)
        if segment_ids is not None:
            carry = torch.where((ids[:, 1:] == ids[:, :-1, -1:]).permute(2, 0, 1), carry, 0.0)
        out = torch.cat([out[..., :1], out[..., 1:] + carry], -1)
    out = out.permute(2, 3, 1, 0).reshape(batch, count * size, channels)[:, pad:]
    final = state.permute(2, 0, 1)

    return _with_initial(out, final, log_decay, weight, initial_state, segment_ids)


def _multi_ema_product(
    v: Tensor, log_decay: Tensor, weight: Tensor, initial_state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As _multi_ema, by operations whose number does not depend on the length."""
    t = torch.arange(v.shape[1], device=v.device)
    power_cot = torch.exp(t * log_decay[..., None])
    lag = t[:, None] - t[None, :]
    kernel_ct = (weight[..., None] * power_cot).sum(1)
    toeplitz_ctt = kernel_ct[:, lag.clamp(min=0)].masked_fill(lag < 0, 0.0)
    if segment_ids is None:
        out = torch.einsum("cts,bsc->btc", toeplitz_ctt, v)
        in_last = v
    else:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]).to(v.dtype)
        out = torch.einsum("bts,cts,bsc->btc", same, toeplitz_ctt, v)
        in_last = v.masked_fill((segment_ids != segment_ids[:, -1:])[..., None], 0.0)
    final = torch.einsum("btc,cot->bco", in_last, power_cot.flip(2))
    return _with_initial(out, final, log_decay, weight, initial_state, segment_ids)


def _with_initial(
    out: Tensor,
    final: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both with what an initial state adds, by linearity."""
    if initial_state is None:
        return out, final
    length = out.shape[1]
    t = torch.arange(1, length + 1, device=out.device)
    power_cot = torch.exp(t * log_decay[..., None])
    in_first = torch.ones(1, length, dtype=torch.bool, device=out.device)
    if segment_ids is not None:
        in_first = segment_ids == segment_ids[:, :1]
    carried_in = torch.einsum("bco,co,cot->btc", initial_state, weight, power_cot)
    out = out + torch.where(in_first[..., None], carried_in, 0.0)
    return out, final + torch.where(in_first[:, -1, None, None], power_cot[..., -1] * initial_state, 0.0)
