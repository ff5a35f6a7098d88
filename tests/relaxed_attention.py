"""Relaxed linear attention head by head in float64, an oracle for what studies and traces compute in torch: implicit
updates of ICL and finetuning (section 3 of arXiv:2212.10559), their similarity, and how far the relaxation is from
softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from momentum_lm.analysis.metrics import Floats, cosine, softmax


def head_matrices(values: ArrayLike, keys: ArrayLike) -> Floats:
    """sum_i v_i k_i^T per head: values (..., N, Dv), keys (..., N, Dk) -> (..., Dv, Dk).

    Over the demonstrations' tokens this is dW_ICL of section 3.1, what they add to the map that relaxed linear
    attention (no softmax, no 1/sqrt(D)) applies to a query. It is additive over tokens and does not depend on their
    order. Keys with rotary positions make it depend on where the demonstrations stand and turn it against the zero-shot
    frame; pass keys as the projection gives them. Zero for N = 0.
    """
    v, k = np.asarray(values, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    return np.asarray(v.swapaxes(-1, -2) @ k)


def project_heads(inputs: ArrayLike, weight: ArrayLike, bias: ArrayLike | None, heads: int) -> Floats:
    """Keys or values of a layer from its inputs: inputs (N, C), weight (H * D, C), bias (H * D,) or None -> (H, N,
    D)."""
    x = np.asarray(inputs, dtype=np.float64) @ np.asarray(weight, dtype=np.float64).T
    if bias is not None:
        x = x + np.asarray(bias, dtype=np.float64)
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


@dataclass(frozen=True)
class Projections:
    """A layer's value and key projections: weights (H * D, C), biases (H * D,) or None, for ``heads`` key/value
    heads."""

    w_v: ArrayLike
    w_k: ArrayLike
    b_v: ArrayLike | None
    b_k: ArrayLike | None
    heads: int

    def matrices(self, inputs: ArrayLike) -> Floats:
        """W_V X X^T W_K^T per head, with biases where there are any: inputs X^T (N, C) -> (H, D, D)."""
        values = project_heads(inputs, self.w_v, self.b_v, self.heads)
        return head_matrices(values, project_heads(inputs, self.w_k, self.b_k, self.heads))


def finetuning_matrices(inputs: ArrayLike, before: Projections, after: Projections) -> Floats:
    """dW_FT per head, Eq. 13: (W_V + dW_V) X X^T (W_K + dW_K)^T - W_V X X^T W_K^T. inputs X^T (N, C) -> (H, D, D).

    X are one layer's inputs (what its key and value projections see) for the query's tokens in ZSL; they are the same
    before and after, so this is the part of finetuning that happens in this layer. Float64 matters: the difference is
    small beside its terms.
    """
    return after.matrices(inputs) - before.matrices(inputs)


def weight_similarity(a: ArrayLike, b: ArrayLike) -> Floats:
    """Cosine of matrices in the Frobenius inner product, (..., D, D) -> (...): cos(dW_ICL, dW_FT), per head. NaN for a
    zero matrix.

    Not in the paper, which claims that ICL's and FT's implicit updates are alike and compares only what they do to one
    query. Reading: 1 if FT changes the linear map that a head applies to queries just as the demonstrations would, up
    to scale; about 0, with standard deviation 1/D, for unrelated matrices without structure. Limits: it speaks of the
    relaxation, not of softmax attention (see :func:`relaxation_distance`); inputs of deeper layers are held at ZSL,
    while both ICL and FT move them; values and keys have large means, whose product alone makes unrelated updates look
    alike, so compare with dW_ICL of keys shuffled among tokens, and with an untrained model. With grouped heads, it is
    per key/value head.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return cosine(x.reshape(*x.shape[:-2], -1), y.reshape(*y.shape[:-2], -1))


def softmax_heads(logits: ArrayLike, values: ArrayLike) -> Floats:
    """Softmax attention of one query row: logits (..., H, N), values (..., Hkv, N, D), Hkv dividing H -> (..., H,
    D)."""
    return _attend(softmax(logits), values)


def relaxed_heads(logits: ArrayLike, values: ArrayLike, scaling: float) -> Floats:
    """Relaxed linear attention of one query row, section 3.1: sum_n v_n (k_n q), without softmax and without 1/sqrt(D).

    Shapes as in :func:`softmax_heads`. ``scaling`` is the factor that the logits hold, D^-0.5 in most models; it is
    divided out. Heads joined and projected as the model does give relaxed attention outputs, for :func:`simaou` under
    the relaxation.
    """
    return _attend(np.asarray(logits, dtype=np.float64) / scaling, values)


def relaxation_distance(logits: ArrayLike, values: ArrayLike, scaling: float) -> tuple[Floats, Floats]:
    """Cosine, and ratio of lengths, of relaxed to softmax attention per head, (..., H) each; NaN where softmax
    attention is zero.

    Arguments as in :func:`relaxed_heads`. The best rescaling of the relaxed output leaves a relative error of sqrt(1 -
    cosine^2).
    """
    exact, relaxed = softmax_heads(logits, values), relaxed_heads(logits, values, scaling)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.linalg.norm(relaxed, axis=-1) / np.linalg.norm(exact, axis=-1)
    return cosine(relaxed, exact), np.where(np.isfinite(ratio), ratio, np.nan)


def _attend(weights: Floats, values: ArrayLike) -> Floats:
    v = np.asarray(values, dtype=np.float64)
    groups, (heads, n) = v.shape[-3], weights.shape[-2:]
    grouped = weights.reshape(*weights.shape[:-2], groups, heads // groups, n)
    out = grouped @ v  # (..., Hkv, H / Hkv, D)
    return np.asarray(out.reshape(*out.shape[:-3], heads, v.shape[-1]))
