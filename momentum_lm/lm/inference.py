"""How models are run where no gradient is asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Function = TypeVar("_Function", bound=Callable[..., Any])

# oneDNN keeps what it prepared for each shape, half a megabyte for each number of rows, 1,024 of them: hundreds of megabytes over an
# evaluation. It reads these when it is first used; the layers of a model need about ten at a time, and 32 were as fast as 1,024.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")


class OneDNNLinear(TorchFunctionMode):
    """Within it fp32 linear layers on a CPU are oneDNN's and not MKL's, where no gradient is asked for: equal to rounding, and for a few
    hundred rows a fifth to a third faster on AMD processors."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            given = [x for x in args if x is not None]
            if torch.backends.mkldnn.is_available() and all(map(_is_plain, given)) and all(x.is_contiguous() for x in given[1:]):
                return torch.ops.mkldnn._linear_pointwise(*args, *[None] * (3 - len(args)), "none", [], "")
        return function(*args, **(kwargs or {}))


def inference(function: _Function) -> _Function:
    """Decorator: ``torch.inference_mode``, and :class:`OneDNNLinear`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), OneDNNLinear():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """SDPA for ``transformers``' attention interface: query (B, H, T, D), key and value (B, H or fewer, S, D), mask (B, 1, T, S) -> output
    (B, T, H, D), None for the weights. On a CPU heads share keys and values in place: beside a mask theirs copies them for each head, a
    fifth of the time."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    special = any(given.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if attention_mask is None or query.shape[1] == key.shape[1] or key.device.type != "cpu" or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=given.get("scaling"), enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any] | None = None) -> str:
    """Makes an attention, with SDPA's masks or others, known to ``transformers``; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask or sdpa_mask)
    return name


def _is_plain(x: Tensor) -> bool:
    """What oneDNN takes: it refuses what is empty."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
