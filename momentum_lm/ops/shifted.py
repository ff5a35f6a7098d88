"""A causal filter of a few taps, as shifted sums (any device) or as one convolution. README.md has the derivation and
what was measured.

Tensors are (B, T, H, D) here, heads side by side in memory, states (B, K, H, D), weights (K, H, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import of_groups, plus
from .naive import fir_naive, run_numbers
from .transforms import of_any_length, under_transforms, without_autocast

# On a CPU one convolution is faster than a sum per tap from so many taps on, or products of weights and inputs
# (README.md).
MANY_TAPS, MANY_PRODUCTS = 16, 1 << 20

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, the weights and the initial state


def _convolves(x: Tensor, taps: int, segments: bool) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or segments or x.shape[1] == 1 or taps == 1:
        return False
    return taps >= MANY_TAPS or x.numel() * taps >= MANY_PRODUCTS


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """x (B, n, H, D), 0 where ``keep`` (B, n) is False, whatever is there."""
    return x if keep is None else torch.where(keep[..., None, None], x, 0.0)


def _same(runs: Tensor | None, lag: int) -> Tensor | None:
    """(B, T - lag): whether tokens ``lag`` apart lie in one segment."""
    return None if runs is None else runs[:, lag:] == runs[:, : runs.shape[1] - lag]


def _in_first(runs: Tensor | None, length: int) -> Tensor | None:
    """(B, length): whether the first tokens lie in the segment of the initial state."""
    return None if runs is None else runs[:, :length] == 0


def _kept(runs: Tensor | None, taps: int) -> Tensor | None:
    """(B, K): whether the last K inputs, those of the initial state included, lie in the last token's segment."""
    return None if runs is None else F.pad(runs, (taps, 0))[:, -taps:] == runs[:, -1:]


def _from_state(lag: int, taps: int, length: int) -> tuple[slice, slice]:
    """The tokens that look back into the initial state by a tap, and what of the state they see."""
    tokens = min(lag, length)
    return slice(0, tokens), slice(taps - lag, taps - lag + tokens)


def _shifted(x: Tensor, weights: Tensor, state: Tensor | None, runs: Tensor | None) -> Tensor:
    taps, length = len(weights), x.shape[1]
    if length == 1 and state is not None:
        return (state * weights.flip(0)).sum(1, keepdim=True)
    out = torch.zeros_like(x)
    for lag, weight in enumerate(weights, 1):
        if lag < length:
            out[:, lag:].addcmul_(_masked(x[:, : length - lag], _same(runs, lag)), weight)
        if state is not None:
            tokens, seen = _from_state(lag, taps, length)
            out[:, tokens].addcmul_(_masked(state[:, seen], _in_first(runs, tokens.stop)), weight)
    return out


def _shifted_gradients(
    g: Tensor, x: Tensor, weights: Tensor, state: Tensor | None, runs: Tensor | None, needed: Sequence[bool]
) -> _Gradients:
    taps, length = len(weights), x.shape[1]
    grad_x = torch.zeros_like(x) if needed[0] else None
    grad_weights = torch.zeros_like(weights) if needed[1] else None
    grad_state = torch.zeros_like(state) if needed[2] and state is not None else None
    for lag, weight in enumerate(weights, 1):
        if lag < length:
            back = _masked(g[:, lag:], _same(runs, lag))
            if grad_x is not None:
                grad_x[:, : length - lag].addcmul_(back, weight)
            if grad_weights is not None:
                grad_weights[lag - 1] += (back * x[:, : length - lag]).sum((0, 1))
        if state is not None:
            tokens, seen = _from_state(lag, taps, length)
            back = _masked(g[:, tokens], _in_first(runs, tokens.stop))
            if grad_state is not None:
                grad_state[:, seen].addcmul_(back, weight)
            if grad_weights is not None:
                grad_weights[lag - 1] += (back * state[:, seen]).sum((0, 1))
    return grad_x, grad_weights, grad_state


def _image(x: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, C, T, 1), whose channels lie last in memory: a library's fastest form on a CPU."""
    return x.flatten(2).transpose(1, 2)[..., None]


def _operands(x: Tensor, weights: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Image and kernel of ``out[t] = sum_j weights[K-1-j] padded[t + j]``, where the initial state is before ``x``."""
    before = x.new_zeros(x.shape[0], *weights.shape) if state is None else state
    kernel = _image(weights.flip(0)[None])[0][:, None]
    return _image(torch.cat([before, x[:, :-1]], 1)), kernel.contiguous(memory_format=torch.channels_last)


def _convolution(x: Tensor, weights: Tensor, state: Tensor | None) -> Tensor:
    image, kernel = _operands(x, weights, state)
    return F.conv2d(image, kernel, groups=image.shape[1])[..., 0].transpose(1, 2).unflatten(2, x.shape[2:])


def _convolution_gradients(
    g: Tensor, x: Tensor, weights: Tensor, state: Tensor | None, needed: Sequence[bool]
) -> _Gradients:
    image, kernel = _operands(x, weights, state)
    padded, taps, _ = torch.ops.aten.convolution_backward(
        _image(g), image, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], image.shape[1],
        [needed[0] or needed[2], needed[1], False],
    )  # fmt: skip
    grad_x = grad_weights = grad_state = None
    if needed[1]:
        grad_weights = taps[:, 0, :, 0].T.flip(0).unflatten(1, x.shape[2:])
    if needed[0] or needed[2]:
        padded = padded[..., 0].transpose(1, 2).unflatten(2, x.shape[2:])
        grad_x = F.pad(padded[:, len(weights) :], (0, 0, 0, 0, 0, 1))  # the last token is seen by none
        grad_state = padded[:, : len(weights)]
    return grad_x, grad_weights, grad_state


def last_inputs(x: Tensor, state: Tensor | None, taps: int, runs: Tensor | None) -> Tensor:
    """The last K inputs (B, H, K, D) of the last token's segment, 0 before."""
    length = x.shape[1]
    last = x[:, max(0, length - taps) :]
    if length < taps:
        before = x.new_zeros(x.shape[0], taps, *x.shape[2:]) if state is None else state
        last = torch.cat([before[:, length:].to(x.dtype), last], 1)
    return _masked(last, _kept(runs, taps)).transpose(1, 2).clone(memory_format=torch.contiguous_format)


class _FIR(torch.autograd.Function):
    """Saves only its inputs. The gradients are filters too: see README.md, "A few taps"."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        initial_state: Tensor | None,
        runs: Tensor | None,
        addend: Tensor | None,
        current: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weights, initial_state, runs, current)
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            v, w, state = _at_work(x, weights, initial_state, dtype)
            convolves = _convolves(v, len(w), runs is not None)
            out = _convolution(v, w, state) if convolves else _shifted(v, w, state, runs)
            if current is not None:
                out.addcmul_(v, current.to(dtype))
            final = last_inputs(x.transpose(1, 2), state, len(w), runs)
        return plus(out, addend, x.dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weights, initial_state, runs, current = ctx.saved_tensors
        if grad_out is None and grad_final is None:
            return (None,) * 6
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps, kept = weights.shape[0], min(weights.shape[0], x.shape[2])
        grad_current = None
        with without_autocast(x.device):
            v, w, state = _at_work(x, weights, initial_state, dtype)
            g = x.new_zeros(x.shape, dtype=dtype) if grad_out is None else of_groups(grad_out, x, dtype)
            g = g.transpose(1, 2)
            if _convolves(v, taps, runs is not None):
                grad_x, grad_w, grad_state = _convolution_gradients(g, v, w, state, ctx.needs_input_grad)
            else:
                grad_x, grad_w, grad_state = _shifted_gradients(g, v, w, state, runs, ctx.needs_input_grad)
            if grad_final is not None:
                last = _masked(grad_final.transpose(1, 2).to(dtype), _kept(runs, taps))
                if grad_x is not None:
                    grad_x[:, -kept:] += last[:, -kept:]
                if grad_state is not None and kept < taps:
                    grad_state[:, kept:] += last[:, : taps - kept]
            if current is not None and grad_x is not None:
                grad_x.addcmul_(g, current.to(dtype))
            if ctx.needs_input_grad[5]:
                grad_current = (g * v).sum((0, 1)).to(current.dtype)
        return (
            None if grad_x is None else grad_x.transpose(1, 2).to(x.dtype),
            None if grad_w is None else grad_w.to(weights.dtype),
            None if grad_state is None or initial_state is None else grad_state.transpose(1, 2).to(initial_state.dtype),
            None,
            grad_out if ctx.needs_input_grad[4] else None,
            grad_current,
        )


def _at_work(x: Tensor, weights: Tensor, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """x (B, H, T, D), weights (K, H, D), state (B, H, K, D) as this file has them."""
    return x.transpose(1, 2).to(dtype), weights.to(dtype), None if state is None else state.transpose(1, 2).to(dtype)


def fir_shifted(
    x: Tensor,
    weights: Tensor,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    addend: Tensor | None = None,
    current: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function and arguments as :func:`momentum_lm.ops.fir`. Once differentiable.

    Under torch.func's transformations, and exported with a time axis of any length, it is the naive form: as much
    memory for every tap.
    """
    if under_transforms() or of_any_length(x.shape[2]):
        with without_autocast(x.device):
            return fir_naive(x, weights, initial_state, segment_ids, addend, current)
    runs = None if segment_ids is None else run_numbers(segment_ids)
    return _FIR.apply(x, weights, initial_state, runs, addend, current)
