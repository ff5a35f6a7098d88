"""The named architectures, such as ``momentum_lm_350m`` and ``llama_lm_1b``."""

from __future__ import annotations

from typing import Any

from momentum_lm.errors import UserError, arg


def _gpt(layers: int, dim: int, heads: int, ffn_dim: int) -> dict[str, Any]:
    return {"layers": layers, "dim": dim, "heads": heads, "ffn_dim": ffn_dim}


def _llama(
    layers: int, dim: int, heads: int, kv_heads: int, ffn_dim: int, base: float, tied: bool = True
) -> dict[str, Any]:
    form = {"norm": "rms", "ffn": "gated", "activation": "silu", "bias": "none", "position": "rotary"}
    own = {"kv_heads": kv_heads, "rotary_base": base, "tie_embeddings": tied, "scale_embeddings": False}
    return _gpt(layers, dim, heads, ffn_dim) | form | own


# Values of DecoderConfig's fields by the name of the size.
# From 125m on: the fairseq dense LMs.
GPT_SIZES = {
    "tiny": _gpt(3, 192, 3, 768),
    "125m": _gpt(12, 768, 12, 3072),
    "350m": _gpt(24, 1024, 16, 4096),
    "1_3b": _gpt(24, 2048, 32, 8192),
    "2_7b": _gpt(32, 2560, 32, 10240),
    "6_7b": _gpt(32, 4096, 32, 16384),
    "13b": _gpt(40, 5120, 40, 20480),
}
# 135m and 360m: SmolLM2. 1b and 3b: Llama 3.2, and 8b: Llama 3.1, as pretrained, before their positions were stretched.
LLAMA_SIZES = {
    "tiny": _llama(3, 192, 3, 3, 512, 10_000.0),
    "135m": _llama(30, 576, 9, 3, 1536, 100_000.0),
    "360m": _llama(32, 960, 15, 5, 2560, 100_000.0),
    "1b": _llama(16, 2048, 32, 8, 8192, 500_000.0),
    "3b": _llama(28, 3072, 24, 8, 8192, 500_000.0),
    "8b": _llama(32, 4096, 32, 8, 14336, 500_000.0, tied=False),
}
# By the name before the size: the sizes, and the kind of momentum.
FAMILIES: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "gpt_lm": (GPT_SIZES, "none"),
    "momentum_lm": (GPT_SIZES, "ema"),
    "llama_lm": (LLAMA_SIZES, "none"),
    "momentum_llama_lm": (LLAMA_SIZES, "ema"),
}
OURS = ", ".join(f"{family}_*" for family in FAMILIES)  # in messages


def architectures() -> list[str]:
    """``gpt_lm_tiny`` to ``momentum_llama_lm_8b``."""
    return [f"{family}_{size}" for family, (sizes, _) in FAMILIES.items() for size in sizes]


def architecture(name: str) -> dict[str, Any]:
    """What ``--arch NAME`` sets: values of :class:`DecoderConfig`'s fields. Raises UserError for another name."""
    for family, (sizes, momentum) in FAMILIES.items():
        size = name.removeprefix(f"{family}_")
        if size != name and size in sizes:
            return {**sizes[size], "momentum_kind": momentum}
    raise UserError(arg(arch=name), f": choose one of {', '.join(architectures())}")
