"""The named architectures: ``gpt_lm_SIZE`` and ``momentum_lm_SIZE``."""

from __future__ import annotations

from typing import Any, NamedTuple

from momentum_lm.errors import UserError, arg


class Size(NamedTuple):
    """A decoder's shape, by the names of :class:`DecoderConfig`'s fields."""

    layers: int
    dim: int
    heads: int
    ffn_dim: int


# From 125m on: the fairseq dense LMs.
SIZES = {
    "tiny": Size(3, 192, 3, 768),
    "125m": Size(12, 768, 12, 3072),
    "350m": Size(24, 1024, 16, 4096),
    "1_3b": Size(24, 2048, 32, 8192),
    "2_7b": Size(32, 2560, 32, 10240),
    "6_7b": Size(32, 4096, 32, 16384),
    "13b": Size(40, 5120, 40, 20480),
}
FAMILIES: dict[str, dict[str, Any]] = {"gpt_lm": {"momentum_kind": "none"}, "momentum_lm": {"momentum_kind": "ema"}}


def architectures() -> list[str]:
    """``gpt_lm_tiny`` to ``momentum_lm_13b``."""
    return [f"{family}_{size}" for family in FAMILIES for size in SIZES]


def architecture(name: str) -> dict[str, Any]:
    """What ``--arch NAME`` sets: values of :class:`DecoderConfig`'s fields. Raises UserError for another name."""
    for family, choices in FAMILIES.items():
        size = name.removeprefix(f"{family}_")
        if size != name and size in SIZES:
            return SIZES[size]._asdict() | choices
    raise UserError(arg(arch=name), f": choose one of {', '.join(architectures())}")
