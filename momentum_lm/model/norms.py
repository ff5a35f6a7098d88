"""The norms of the decoder: LayerNorm and RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from momentum_lm.ops.transforms import under_transforms

from .config import DecoderConfig


def make_norm(config: DecoderConfig, dim: int | None = None) -> nn.Module:
    """The configuration's norm over the last dimension, of size ``dim`` (default: the width), of (..., dim)."""
    size = config.dim if dim is None else dim
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight``, without a bias (arXiv 1910.07467): torch's, and on CPUs a backward pass
    that keeps the input alone, in two thirds of the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> the same shape."""
        own = x.device.type == "cpu" and x.dtype == self.weight.dtype and torch.is_grad_enabled()
        if own and not torch.compiler.is_compiling() and not under_transforms():
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input alone. With y = x / rms(x) and h the gradient times the weight, dx = (h - y mean(h y)) / rms(x):
    LayerNorm's gradient for rows of mean 0 lacks mean(h) / rms(x) of that, and is one operation of torch's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, dtype = x.shape[-1], x.dtype
        x, weight, grad = (t.to(torch.promote_types(dtype, torch.float32)).contiguous() for t in (x, weight, grad))
        inverse = x.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        wanted = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(inverse), inverse, weight, None, wanted
        )
        if grad_x is not None:
            grad_x = grad_x.add_((grad @ weight)[..., None].mul_(inverse).div_(size)).to(dtype)
        return grad_x, None if grad_weight is None else grad_weight.to(dtype), None
