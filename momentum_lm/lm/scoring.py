"""What models of either kind do alike when they score continuations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24  # 64 MB in fp32: small beside the model, and large enough to keep a GPU busy


def target_log_probs(logits_at: Callable[[Tensor, Tensor], Tensor], rows: Tensor, positions: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """log p of each target, (N,) fp32 on the CPU, with each (row, position) projected to the vocabulary once.

    ``logits_at`` maps rows (M,) and positions (M,) to logits (M, V); ``vocab`` is V.
    """
    places, which = torch.unique(torch.stack([rows, positions]), dim=1, return_inverse=True)
    step = max(1, LOGITS_AT_ONCE // vocab)
    found = torch.empty(len(targets), dtype=torch.float32)
    for start in range(0, places.shape[1], step):
        part = places[:, start : start + step]
        log_probs = F.log_softmax(logits_at(part[0], part[1]).float(), -1)
        mine = ((which >= start) & (which < start + part.shape[1])).nonzero()[:, 0]
        found[mine] = log_probs[(which[mine] - start).to(log_probs.device), targets[mine].to(log_probs.device)].cpu()
    return found
