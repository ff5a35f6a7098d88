"""The identities of "Why Can GPT Learn In-Context?" (Dai et al., 2023, arXiv:2212.10559) between attention and gradient
descent.

Notation follows the paper: tokens are *columns*. ``context`` X (d, n) holds the query's own tokens, ``demos`` X' (d, m)
those of the demonstrations; ``w_v``, ``w_k`` (d', d) are one head's value and key projections. All functions work in
the dtype of what they are given. The attention here is the paper's relaxation: no softmax and no 1/sqrt(d), so that it
is linear in the query and the identities are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_attention(values: Tensor, keys: Tensor, query: Tensor) -> Tensor:
    """LinearAttn(V, K, q) = V K^T q = sum_i v_i (k_i^T q), section 2.2.

    values (dv, n), keys (dk, n), query (dk,) or (dk, q) -> (dv,) or (dv, q).
    """
    return values @ (keys.transpose(-1, -2) @ query)


def relaxed_attention(w_v: Tensor, w_k: Tensor, demos: Tensor, context: Tensor, query: Tensor) -> Tensor:
    """Relaxed linear attention over [X'; X], the paper's approximation of one head (section 3.1).

    w_v, w_k (d', d); demos (d, m); context (d, n); query (d',) or (d', q), already projected by W_Q. Returns (d',) or
    (d', q). Equal to ``(zero_shot_weight(...) + icl_update(...)) @ query``.
    """
    tokens = torch.cat([demos, context], dim=-1)
    return linear_attention(w_v @ tokens, w_k @ tokens, query)


def zero_shot_weight(w_v: Tensor, w_k: Tensor, context: Tensor) -> Tensor:
    """W_ZSL = W_V X (W_K X)^T: the linear map that attention over the query's own tokens applies (section 3.1).

    w_v, w_k (d', d); context (d, n) -> (d', d').
    """
    return (w_v @ context) @ (w_k @ context).transpose(-1, -2)


def icl_update(w_v: Tensor, w_k: Tensor, demos: Tensor) -> Tensor:
    """dW_ICL = sum_i (W_V x'_i) outer (W_K x'_i): what the demonstrations add to W_ZSL (section 3.1).

    The columns of ``w_v @ demos`` are the paper's meta-gradients. w_v, w_k (d', d); demos (d, m) -> (d', d'). Additive
    over demonstrations, so their order does not matter (positions are not part of the identity); zero for m = 0.
    """
    return (w_v @ demos) @ (w_k @ demos).transpose(-1, -2)


def finetuning_update(w_v: Tensor, w_k: Tensor, delta_v: Tensor, delta_k: Tensor, context: Tensor) -> Tensor:
    """dW_FT = (W_V + dW_V) X X^T (W_K + dW_K)^T - W_V X X^T W_K^T, from Eq. 13 (section 3.2).

    What finetuning the key and value projections by ``delta_k``, ``delta_v`` (d', d) adds to W_ZSL. context (d, n) ->
    (d', d').
    """
    return zero_shot_weight(w_v + delta_v, w_k + delta_k, context) - zero_shot_weight(w_v, w_k, context)


def finetuned_attention(
    w_v: Tensor, w_k: Tensor, delta_v: Tensor, delta_k: Tensor, context: Tensor, query: Tensor
) -> Tensor:
    """Relaxed attention of the finetuned head over the query's own tokens, Eq. 13: equals (W_ZSL + dW_FT) q.

    Shapes as in :func:`finetuning_update`; query (d',) or (d', q).
    """
    return linear_attention((w_v + delta_v) @ context, (w_k + delta_k) @ context, query)


def error_signals(loss: Callable[[Tensor], Tensor], outputs: Tensor, lr: float) -> Tensor:
    """E with columns e_i = -lr * dL/dy_i, the error signals of section 2.2.

    ``loss`` maps the layer's outputs (d_out, n) to a scalar; ``outputs`` are where it is differentiated. Returns
    (d_out, n).
    """
    outputs = outputs.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(outputs), outputs)
    return -lr * gradient


def sgd_step_as_attention(
    weight: Tensor, inputs: Tensor, loss: Callable[[Tensor], Tensor], lr: float, query: Tensor
) -> Tensor:
    """One SGD step on a linear layer, applied to ``query`` without ever changing the weight (section 2.2, Eqs. 1-3).

    F(x) = (W0 + dW) x = W0 x + LinearAttn(E, X', x): training inputs are the keys, their error signals the values.
    weight (d_out, d_in); inputs X' (d_in, n); ``loss`` maps outputs (d_out, n) to a scalar; query (d_in,) or (d_in, q).
    """
    signals = error_signals(loss, weight @ inputs, lr)
    return weight @ query + linear_attention(signals, inputs, query)


def exponential_average(history: Sequence[Tensor] | Tensor, eta: float) -> Tensor:
    """sum_{i=1}^{t-1} eta^(t-i) g_i for a history g_1 ... g_{t-1} stacked on the first axis (section 5).

    This is the buffer of momentum SGD before step t when the g_i are gradients, and the term that momentum attention
    adds when they are values: the current item is not in it and the last one weighs eta. Raises ValueError for an empty
    history or eta outside (0, 1).
    """
    if not 0 < eta < 1:
        raise ValueError(f"eta must lie between 0 and 1, got {eta}")
    stacked = history if isinstance(history, Tensor) else torch.stack(list(history))
    if stacked.shape[0] == 0:
        raise ValueError("the history is empty")
    lags = torch.arange(stacked.shape[0], 0, -1, dtype=stacked.dtype, device=stacked.device)
    return torch.tensordot(eta**lags, stacked, dims=1)


def momentum_sgd(
    parameter: Tensor, gradient: Callable[[Tensor], Tensor], lr: float, eta: float, steps: int
) -> tuple[Tensor, Tensor]:
    """``steps`` updates Theta_t = Theta_{t-1} - lr * sum_{i=1}^{t-1} eta^(t-i) grad f(Theta_i) by the recurrence
    (section 5).

    Theta_1 is ``parameter``; the buffer obeys m_t = eta (m_{t-1} + g_{t-1}), so it is torch's SGD momentum buffer times
    eta. Returns Theta_{steps+1} and the gradients (steps, *parameter.shape) seen on the way; the buffer used for the
    last update is ``exponential_average(gradients, eta)``.
    """
    theta, buffer, seen = parameter, torch.zeros_like(parameter), []
    for _ in range(steps):
        seen.append(gradient(theta))
        buffer = eta * (buffer + seen[-1])
        theta = theta - lr * buffer
    return theta, torch.stack(seen)
