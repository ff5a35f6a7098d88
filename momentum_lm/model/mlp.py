"""The second half of a feed-forward layer, keeping less than autograd would."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from momentum_lm.ops.transforms import under_transforms

from .plain import is_plain

ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),  # fairseq's name for the tanh approximation
    "relu": F.relu,
    "silu": F.silu,
}
# activation(x) and, from d loss / d activation(x) and x, d loss / d x
_DERIVATIVES: dict[Any, Any] = {
    F.gelu: lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    F.relu: lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    F.silu: lambda grad, x: torch.ops.aten.silu_backward(grad, x),
}


class _ActivatedLinear(torch.autograd.Function):
    """Keeps the activation's input and the factor, and computes their product, wider than the residual stream, again
    for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor | None, weight: Tensor, bias: Tensor | None, activation: Any
    ) -> Tensor:
        ctx.save_for_backward(x, factor, weight)
        ctx.activation = activation
        ctx.bias_dtype = None if bias is None else bias.dtype
        inner = activation(x)
        return F.linear(inner if factor is None else inner * factor, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_factor = grad_weight = grad_bias = None
        if ctx.needs_input_grad[3] and ctx.bias_dtype is not None:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        inner: Any = ctx.activation(x) if ctx.needs_input_grad[2] or ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[2]:
            product = inner if factor is None else inner * factor
            grad_weight = (rows.T @ product.to(grad.dtype).reshape(len(rows), -1)).to(weight.dtype)
            del product
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_inner = (rows @ weight.to(grad.dtype)).view_as(x).to(x.dtype)
            if factor is not None:
                grad_factor = inner.mul_(grad_inner) if ctx.needs_input_grad[1] else None
                grad_inner = grad_inner.mul_(factor)
            grad_x = _DERIVATIVES[ctx.activation](grad_inner, x) if ctx.needs_input_grad[0] else None
        return grad_x, grad_factor, grad_weight, grad_bias, None


def activated_linear(x: Tensor, linear: nn.Module, activation: Any, factor: Tensor | None = None) -> Tensor:
    """``linear(activation(x))``, or ``linear(activation(x) * factor)`` (SwiGLU and the like, arXiv 2002.05202); in
    training it keeps ``x`` and ``factor`` alone, for one more activation in the backward pass.

    x, factor (..., F) -> (..., C). Compiled, with another activation than GELU, ReLU and SiLU, under torch.func's
    transformations, or where ``linear`` is not a plain ``nn.Linear``, it is the expression itself, and hooks and
    adapters see their call.
    """
    saving = (
        torch.is_grad_enabled()
        and activation in _DERIVATIVES
        and not torch.compiler.is_compiling()
        and not under_transforms()
    )
    if saving and is_plain(linear):
        return _ActivatedLinear.apply(x, factor, linear.weight, linear.bias, activation)
    inner = activation(x)
    return linear(inner if factor is None else inner * factor)
