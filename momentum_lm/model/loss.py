"""Next-token cross entropy that never holds all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from momentum_lm.ops.transforms import under_transforms, without_autocast

from .precision import autocast_dtype

# Rows of logits held at a time on a CPU: measured, the fastest at vocabularies of 8k and 51k (64 to 1024 cost up to
# 25% more).
CPU_ROWS = 256
# Elsewhere a kernel must be fed: so many logits at a time, small beside everything else that training holds.
CHUNK_LOGITS = 2**28


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Rows of logits that are held at a time."""
    return CPU_ROWS if device_type == "cpu" else max(CPU_ROWS, CHUNK_LOGITS // vocab_size)


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are formed chunk by chunk while the logits are there, so that nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, absent: Tensor | None
    ) -> Tensor:
        dtype = autocast_dtype(hidden.device) or torch.promote_types(hidden.dtype, weight.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        with without_autocast(hidden.device):
            w = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                h, target = hidden[part].to(dtype), targets[part]
                logits = (h @ w.T).to(total.dtype)
                if absent is not None:
                    logits.index_fill_(1, absent, -math.inf)
                log_z = torch.logsumexp(logits, -1, keepdim=True)
                kept = target != ignore_index
                index = target.masked_fill(~kept, 0)[:, None]
                nll = (log_z - logits.gather(1, index)).squeeze(1)
                total += torch.where(kept, nll, 0.0).sum()  # where, not a product: an ignored row may be anything
                if need_hidden or need_weight:
                    # d nll / d logits = softmax - onehot, in place of the logits
                    grad = logits.sub_(log_z).exp_()
                    grad.scatter_add_(1, index, grad.new_full((), -1.0).expand(index.shape))
                    grad = grad.masked_fill_(~kept[:, None], 0.0).to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[part] = grad @ w
                    if grad_weight is not None:
                        if grad_weight.dtype == dtype:
                            grad_weight.addmm_(grad.T, h)
                        else:
                            grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if grad_output.device.type == "cpu" and grad_output == 1:  # on a GPU, looking would wait for it
            return *ctx.saved_tensors, None, None, None, None
        grads = (None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "sum",
    chunk_tokens: int | None = None,
    absent: Tensor | None = None,
) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T, targets)`` holding ``chunk_tokens`` rows of logits at a time (None: a good
    number).

    Args:
        hidden: (..., C). weight: (V, C), the output embedding. targets: (...) token ids; ``ignore_index`` counts for
        nothing.
        reduction: "sum", or "none" (no gradients) for one value per token.
        absent: (N,) ids of tokens that are never predicted, as if their logits were -inf; None: there are none.

    Returns:
        Nats, in fp32 (fp64 for fp64 inputs): a scalar, or (...) with 0 where ignored. Products follow autocast, the
        softmax does not.

    Raises:
        ValueError: shapes that do not fit or another reduction.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not fit"
        )
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if reduction not in ("sum", "none"):
        raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
    if chunk_tokens is None:
        chunk_tokens = default_chunk(hidden.device.type, weight.shape[0])
    if not torch.is_grad_enabled():
        rows, weight = rows.detach(), weight.detach()
    if under_transforms():  # they cannot look into the function below
        whole = _losses(F.linear(rows, weight), flat, ignore_index, absent)
        return whole.sum() if reduction == "sum" else whole.view(targets.shape)
    if reduction == "sum":
        return _SummedCrossEntropy.apply(rows, weight, flat, ignore_index, chunk_tokens, absent)
    with torch.no_grad():
        losses = [
            _losses(F.linear(h, weight), target, ignore_index, absent)
            for h, target in zip(rows.split(chunk_tokens), flat.split(chunk_tokens), strict=True)
        ]
        return torch.cat(losses).view(targets.shape)


def called_cross_entropy(
    hidden: Tensor,
    output: Callable[[Tensor], Tensor],
    vocab_size: int,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The same of logits ``output(rows of hidden)``: in the backward pass they are computed again, and never held all
    at once.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = default_chunk(hidden.device.type, vocab_size)
    parts = zip(rows.split(size), flat.split(size), strict=True)

    def losses(h: Tensor, target: Tensor) -> Tensor:
        return _losses(output(h), target, ignore_index, None)

    if reduction == "none":
        with torch.no_grad():
            return torch.cat([losses(*part) for part in parts]).view(targets.shape)
    if under_transforms():
        return losses(rows, flat).sum()
    return torch.stack([checkpoint(losses, *part, use_reentrant=False).sum() for part in parts]).sum()


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, absent: Tensor | None) -> Tensor:
    """Nats of each target (N,) given logits (N, V), in fp32 at least; 0 where ignored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if absent is not None:
        logits = logits.index_fill_(1, absent, -math.inf)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
