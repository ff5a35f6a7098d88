"""How models are run where no gradient is asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Function = TypeVar("_Function", bound=Callable[..., Any])


class OneDNNLinear(TorchFunctionMode):
    """Within it fp32 linear layers on a CPU are oneDNN's and not MKL's, where no gradient is asked for: equal to rounding, and for a few
    hundred rows a fifth to a third faster on AMD processors."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            rows, weight, bias = args if len(args) == 3 else (*args, None)
            if rows.dtype == weight.dtype == torch.float32 and rows.layout == weight.layout == torch.strided and _on_cpu(rows, weight):
                return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return function(*args, **(kwargs or {}))


def inference(function: _Function) -> _Function:
    """Decorator: ``torch.inference_mode``, and :class:`OneDNNLinear`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), OneDNNLinear():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


_shared = [0]  # how many keys, the first ones, all rows of a batch have in common


@contextlib.contextmanager
def shared_keys(count: int) -> Iterator[None]:
    """Tells :func:`grouped_attention` that the first keys and values are the same in every row of the batch."""
    _shared.append(count)
    try:
        yield
    finally:
        _shared.pop()


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """SDPA for ``transformers``' attention interface, for queries that see keys of a cache before their own.

    On a CPU heads share keys and values in place: beside a mask theirs copies them for each head, a fifth of the time. What
    :func:`shared_keys` all rows see is read once for all rows and heads that share it, and joined with the rest by the log of the
    normaliser of both.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or key.device.type != "cpu" or query.shape[2] == key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    scale, shared = given.get("scaling"), min(_shared[-1], key.shape[2] - query.shape[2])
    if shared and not torch.is_grad_enabled() and attention_mask.dtype == torch.bool and bool(attention_mask[..., :shared].all()):
        out = _attend_in_two(query, key, value, attention_mask, scale, shared)
    else:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _attend_in_two(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, shared: int) -> Tensor:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # SDPA does not return the normaliser
    (batch, heads, length, _), groups = query.shape, key.shape[1]
    rows = query.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)[None]  # (1, groups, all that read these keys, D)
    first, first_log = attend(rows, key[:1, :, :shared], value[:1, :, :shared], scale=scale)
    first, first_log = (x[0].unflatten(1, (batch, -1, length)).transpose(0, 1).flatten(1, 2) for x in (first, first_log))
    bias = torch.zeros(mask[..., shared:].shape, dtype=query.dtype).masked_fill(~mask[..., shared:], -torch.inf)
    own = (x[:, :, shared:].repeat_interleave(heads // groups, 1) for x in (key, value))
    second, second_log = attend(query, *own, attn_mask=bias, scale=scale)
    return second.lerp(first, torch.sigmoid(first_log - second_log)[..., None].to(query.dtype))


def register_attention(name: str, attention: Callable[..., Any]) -> str:
    """Makes an attention with SDPA's masks known to ``transformers``; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _on_cpu(rows: Tensor, weight: Tensor) -> bool:
    # oneDNN refuses what is empty and reads dense rows alone.
    return rows.device.type == weight.device.type == "cpu" and rows.numel() > 0 and weight.is_contiguous()
