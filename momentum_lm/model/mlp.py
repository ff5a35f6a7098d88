"""The second half of a feed-forward layer, keeping half of what autograd would."""

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
}
# activation(x) and, from d loss / d activation(x) and x, d loss / d x
_DERIVATIVES: dict[Any, Any] = {
    F.gelu: lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    F.relu: lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


class _ActivatedLinear(torch.autograd.Function):
    """Keeps the activation's input and computes its output, four times as wide as the residual stream, again for the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activation = activation
        ctx.bias_dtype = bias.dtype
        return F.linear(activation(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ ctx.activation(x).to(grad.dtype).reshape(len(rows), -1)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _DERIVATIVES[ctx.activation]((rows @ weight.to(grad.dtype)).view_as(x).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias, None


def activated_linear(x: Tensor, linear: nn.Module, activation: Any) -> Tensor:
    """``linear(activation(x))``; in training it keeps ``x`` alone, for one more activation in the backward pass.

    x (..., F) -> (..., C). Compiled, with another activation than GELU and ReLU, under torch.func's transformations, or
    where ``linear`` is not a plain ``nn.Linear`` with a bias, it is the expression itself, and hooks and adapters see
    their call.
    """
    saving = (
        torch.is_grad_enabled()
        and activation in _DERIVATIVES
        and not torch.compiler.is_compiling()
        and not under_transforms()
    )
    if saving and is_plain(linear) and linear.bias is not None:
        return _ActivatedLinear.apply(x, linear.weight, linear.bias, activation)
    return linear(activation(x))
