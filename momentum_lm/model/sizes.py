"""The named sizes of the architectures."""

from __future__ import annotations

from typing import NamedTuple

from momentum_lm.errors import UserError


class Size(NamedTuple):
    """A decoder's shape; the feed-forward is four times as wide."""

    layers: int
    dim: int
    heads: int


# From 125m on: the fairseq dense LMs.
SIZES = {
    "tiny": Size(3, 192, 3),
    "125m": Size(12, 768, 12),
    "350m": Size(24, 1024, 16),
    "1_3b": Size(24, 2048, 32),
    "2_7b": Size(32, 2560, 32),
    "6_7b": Size(32, 4096, 32),
    "13b": Size(40, 5120, 40),
}
MOMENTUM_OF = {"gpt_lm": "none", "momentum_lm": "ema"}  # by the first part of an architecture's name


def architectures() -> list[str]:
    """``gpt_lm_tiny`` to ``momentum_lm_13b``."""
    return [f"{family}_{size}" for family in MOMENTUM_OF for size in SIZES]


def architecture(name: str) -> tuple[Size, str]:
    """The shape and the kind of momentum of ``--arch NAME``. Raises UserError for another name."""
    for family, kind in MOMENTUM_OF.items():
        size = name.removeprefix(f"{family}_")
        if size != name and size in SIZES:
            return SIZES[size], kind
    raise UserError(f"--arch {name}: choose one of {', '.join(architectures())}")
