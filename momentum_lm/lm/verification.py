"""What is assumed of a model of ``transformers``, tried on the model itself: a few short inputs that cross its windows.

Scoring assumes that no token changes what is predicted before it, and that keys and values of a shared beginning, or
padding after a row, change nothing. Names of model classes tell none of this; numbers do. The same inputs serve
:mod:`.tracing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

CROSSED = 64  # tokens; a trial's input is longer than every window up to this, and longer windows are shortened for it
SHORTENED = 8
_SHORTENABLE = ("sliding_window", "attention_chunk_size")  # which masks read from the configuration at every step
_WINDOWS = (
    *_SHORTENABLE,
    "window_size",
    "attention_window",
    "attention_window_size",
    "original_max_position_embeddings",
)
_TAIL = 16  # tokens after the shared beginning
_LEAST = 20  # tokens of a trial's input before those


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to compute the same may be apart, relative to how far values are spread."""
    return {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2}.get(dtype, 0.1)


def trial_lengths(config: Any, limit: int) -> tuple[int, int]:
    """Tokens of a shared beginning and of a whole input, at most ``limit``: a window or a switch of rotary factors ends
    between them.
    """
    longest = max([_LEAST, *(window for window in _numbers(config.to_dict()) if window <= CROSSED)])
    whole = max(2, min(limit, longest + _TAIL - 4))
    return max(1, whole - _TAIL), whole


def trial_tokens(config: Any, vocab: int, rows: int, length: int) -> Tensor:
    """(rows, length) random token ids, the same each time; none with a meaning of its own, such as
    padding or an image.
    """
    special = {
        value
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    usual = torch.tensor([i for i in range(min(vocab, 2000)) if i not in special and (i > 3 or vocab < 16)])
    return usual[torch.randint(len(usual), (rows, length), generator=torch.Generator().manual_seed(0))]


@contextlib.contextmanager
def shortened_windows(model: Any) -> Iterator[None]:
    """Within it every window of attention that is too long for a trial holds :data:`SHORTENED` tokens."""
    config = model.config.get_text_config(decoder=True)
    changed: list[tuple[Any, str, int]] = []
    holders = [model.config, config, *model.modules(), *(getattr(module, "config", None) for module in model.modules())]
    for holder in {id(x): x for x in holders}.values():
        for name in _SHORTENABLE:
            value = getattr(holder, "__dict__", {}).get(name)
            if type(value) is int and value > CROSSED:
                changed.append((holder, name, value))
    try:
        for holder, name, _ in changed:
            setattr(holder, name, SHORTENED)
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def apart(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference of (n, k) values, relative to the spread of the k, at the worst of n
    positions; at the median one in half precision, where rounding sends a token to another expert now and then.
    Infinite where a value is not a number. Of logarithms of probabilities those of 0, which a model may give to tokens
    that it never saw, say nothing.
    """
    exact = expected.dtype in (torch.float32, torch.float64)
    given = ~expected.isneginf().flatten(0, -2).all(0)
    found, expected = found[..., given].float(), expected[..., given].float()
    relative = (found - expected).square().mean(-1).sqrt() / expected.std(-1).clamp(min=1e-6)
    value = (relative.max() if exact else relative.median()).item()
    return value if value == value else float("inf")


def switch_length(config: Any) -> int | None:
    """The number of tokens beyond which rotary factors are others, in the whole row; None where they never change."""
    limits: list[int] = []
    described = config.to_dict()
    for name in ("rope_parameters", "rope_scaling"):
        given = described.get(name)
        parts = [given, *given.values()] if isinstance(given, Mapping) else []
        for part in parts:
            kind = str(part.get("rope_type") or part.get("type") or "") if isinstance(part, Mapping) else ""
            if "longrope" in kind or "dynamic" in kind or kind == "su":
                limits += [
                    limit
                    for holder in (part, described)
                    for key in ("original_max_position_embeddings", "max_position_embeddings")
                    if isinstance(limit := holder.get(key), int)
                    and not ("dynamic" in kind and key.startswith("original"))
                ][:1]
    return min(limits, default=None)


def reset_rotary(model: Any) -> None:
    """Factors as they are at first: "dynamic" ones remember the longest row that they have seen."""
    for module in model.modules():
        original, kind = module._buffers.get("original_inv_freq"), module.__dict__.get("rope_type")
        if original is not None and isinstance(kind, str) and "dynamic" in kind:
            with torch.inference_mode(False):  # a buffer made in it could not be written to elsewhere
                module.inv_freq = original.to(module.inv_freq.device, copy=True)
            module.max_seq_len_cached = module.original_max_seq_len


def _numbers(described: Any) -> Iterator[int]:
    for name, value in described.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif name in _WINDOWS:
            yield from (
                number
                for number in (value if isinstance(value, (list, tuple)) else [value])
                if type(number) is int and number > 0
            )
