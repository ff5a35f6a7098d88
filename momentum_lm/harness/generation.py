"""Text from a decoder, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.icl.scoring import CPU_MEMORY, GPU_SHARE
from momentum_lm.lm.cpu_fast import inference
from momentum_lm.lm.native import NativeLM


def likeliest(logits: Tensor, padding_idx: int) -> Tensor:
    """The likeliest token of each row of logits (N, V): (N,). It is never padding, which no text holds."""
    return logits.index_fill(1, torch.tensor([padding_idx], device=logits.device), -torch.inf).argmax(1)


def sample(logits: Tensor, padding_idx: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A token for each row of logits (N, V), drawn with torch's global generator: (N,). Never padding.

    ``top_k``: among so many likeliest; 0: all. ``top_p``: among the fewest of those that hold this share of the probability (Holtzman
    et al., arXiv 1904.09751).
    """
    logits = logits.float().index_fill(1, torch.tensor([padding_idx], device=logits.device), -torch.inf) / temperature
    values, tokens = logits.sort(1, descending=True)
    if top_k:
        values, tokens = values[:, :top_k], tokens[:, :top_k]
    shares = values.softmax(1)
    before = shares.cumsum(1) - shares
    drawn = torch.multinomial(shares.masked_fill(before >= top_p, 0.0), 1)
    return tokens.gather(1, drawn)[:, 0]


def row_budget(lm: NativeLM, length: int) -> int:
    """How many rows of ``length`` tokens, context and continuation, memory allows at once, with what all layers remember of them."""
    row = lm.row_bytes(0, length) + 2 * lm.config.dim * lm.config.layers * length * lm.dtype.itemsize
    free = GPU_SHARE * torch.cuda.mem_get_info(lm.device)[0] if lm.device.type == "cuda" else CPU_MEMORY
    return max(1, int(free) // row)


@inference
def generate(
    lm: NativeLM,
    contexts: Sequence[Sequence[int]],
    most: int,
    choose: Callable[[Tensor], Tensor],
    finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """What follows each context (token ids, at least one): at most ``most`` tokens, up to ``</s>``, which is left out.

    ``choose`` maps logits (N, V) to tokens (N,). ``finished`` is asked, after each token, whether a continuation is to end there. Raises
    UserError where the model gives NaN.
    """
    longest = max(map(len, contexts))
    padding = lm.config.padding_idx
    tokens = torch.tensor([[padding] * (longest - len(context)) + list(context) for context in contexts], device=lm.device)
    cache = lm.model.new_cache()
    hidden = lm.model.features(tokens, cache)[:, -1]
    found: list[list[int]] = [[] for _ in contexts]
    running = list(range(len(contexts)))  # which context each row of the cache continues
    for step in range(most):
        logits = lm.model.output_projection(hidden)
        if logits.isnan().any():
            raise UserError(f"{lm.name} gives NaN: its weights are broken, or too large for {lm.dtype}")
        chosen = choose(logits)
        going = []
        for row, token in enumerate(chosen.tolist()):
            if token != lm.config.eos_idx:
                found[running[row]].append(token)
                if not finished(found[running[row]]):
                    going.append(row)
        if not going or step + 1 == most:
            break
        if len(going) < len(running):
            index = torch.tensor(going, device=lm.device)
            cache.select(index)
            chosen, running = chosen[index], [running[row] for row in going]
        hidden = lm.model.features(chosen[:, None], cache, left_padded=False)[:, -1]
    return found
