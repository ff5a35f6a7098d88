"""Log-probabilities of chosen targets, in chunks of logits, and the error for a model that gives none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from momentum_lm.errors import UserError

if TYPE_CHECKING:
    from .protocol import LanguageModel

LOGITS_AT_ONCE = 1 << 24  # 64 MB in fp32: small beside the model, and large enough to keep a GPU busy


def distinct_positions(rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(row, position) pairs without repetitions (2, M), sorted, and which of them each of the N given ones is (N,)."""
    pairs, which = torch.unique(torch.stack([rows, positions]), dim=1, return_inverse=True)
    return pairs, which


def target_log_probs(
    logits_of: Callable[[slice], Tensor], which: Tensor, targets: Tensor, vocab: int, never: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p of each target (N,) fp32, and whether it is the likeliest token (N,) bool; both on the CPU.

    ``logits_of`` maps a slice of the M positions of :func:`distinct_positions` to their logits (m, V); ``which`` (N,)
    are the targets' positions among them, and ``vocab`` is V. ``never`` is a token that is never the likeliest.
    """
    count, step = int(which.max()) + 1 if len(which) else 0, max(1, LOGITS_AT_ONCE // vocab)
    log_p, likeliest = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, count, step):
        logits = logits_of(slice(start, start + step))
        own = ((which >= start) & (which < start + step)).nonzero()[:, 0]
        index, wanted = (which[own] - start).to(logits.device), targets[own].to(logits.device)
        log_p[own] = F.log_softmax(logits.float(), -1)[index, wanted].cpu()
        likeliest[own] = _are_likeliest(logits, index, wanted, never).cpu()
    return log_p, likeliest


def _are_likeliest(logits: Tensor, index: Tensor, wanted: Tensor, never: int | None) -> Tensor:
    """Whether ``wanted[n]`` is the first of the largest of ``logits[index[n]]``, ``never`` left out: (N,) bool. The
    costly argmax sees only the few rows in which the largest logit does not rule it out."""
    largest = logits.amax(1)
    possible = (logits[index, wanted] == largest[index]) | (
        False if never is None else (logits[:, never] == largest)[index]
    )
    rows = logits[index[possible]]
    if never is not None:
        rows[:, never] = -torch.inf
    found = possible.clone()
    found[possible] = rows.argmax(1) == wanted[possible]
    return found


def broken_weights(lm: LanguageModel, where: str = "") -> UserError:
    """The error for a model whose probabilities are 0 or NaN (``where`` they were found)."""
    return UserError(
        f"{lm.name} gives probabilities of 0 or NaN{where}: its weights are broken, or too large for {lm.dtype}"
    )
