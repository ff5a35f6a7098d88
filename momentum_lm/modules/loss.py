"""Next-token cross entropy that never holds all logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits held at a time on a CPU: measured, the fastest at vocabularies of 8k and 51k (64 to 1024 cost up to 25% more).
CPU_ROWS = 256
# Elsewhere a kernel must be fed: so many logits at a time, small beside everything else that training holds.
CHUNK_LOGITS = 2**28


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Rows of logits that are held at a time."""
    return CPU_ROWS if device_type == "cpu" else max(CPU_ROWS, CHUNK_LOGITS // vocab_size)


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are formed chunk by chunk while the logits are there, so that nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int, absent: Tensor | None) -> Tensor:
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = autocast or torch.promote_types(hidden.dtype, weight.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total.dtype) if need_weight else None
        with torch.autocast(device, enabled=False):
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
    """``F.cross_entropy(hidden @ weight.T, targets)`` holding ``chunk_tokens`` rows of logits at a time (None: a good number).

    Args:
        hidden: (..., C). weight: (V, C), the output embedding. targets: (...) token ids; ``ignore_index`` counts for nothing.
        reduction: "sum", or "none" (no gradients) for one value per token.
        absent: (N,) ids of tokens that are never predicted, as if their logits were -inf; None: there are none.

    Returns:
        Nats, in fp32 (fp64 for fp64 inputs): a scalar, or (...) with 0 where ignored. Products follow autocast, the softmax does not.

    Raises:
        ValueError: shapes that do not fit or another reduction.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not fit")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if chunk_tokens is None:
        chunk_tokens = default_chunk(hidden.device.type, weight.shape[0])
    if not torch.is_grad_enabled():
        rows, weight = rows.detach(), weight.detach()
    if reduction == "sum":
        return _SummedCrossEntropy.apply(rows, weight, flat, ignore_index, chunk_tokens, absent)
    if reduction != "none":
        raise ValueError(f'reduction must be "sum" or "none", got {reduction!r}')
    precision = torch.promote_types(hidden.dtype, torch.float32)

    def logits(rows: Tensor) -> Tensor:
        result = F.linear(rows, weight).to(precision)
        return result if absent is None else result.index_fill_(1, absent, -math.inf)

    with torch.no_grad():
        losses = [
            F.cross_entropy(logits(h), target, ignore_index=ignore_index, reduction="none")
            for h, target in zip(rows.split(chunk_tokens), flat.split(chunk_tokens), strict=True)
        ]
        return torch.cat(losses).view(targets.shape)
