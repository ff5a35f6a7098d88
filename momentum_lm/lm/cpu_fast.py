"""Faster ways to compute the same in evaluation, most of them for CPUs, each beside the plain one.

The environment variable ``MOMENTUM_LM_CPU_FAST=0`` turns all of them off. What torch keeps to itself is looked up each
time, and where a version has it not, the plain way is taken.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .states import TokenRows

_Function = TypeVar("_Function", bound=Callable[..., Any])

PACKED_ATTENTION = "sdpa_grouped"  # the name, for ``set_attn_implementation``, of SDPA that knows packed rows
_REFUSED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
)  # options of an attention that :func:`_attend` does not know
# before, its kernel read past the end of keys of fewer heads
_FLASH_SHARES_KEYS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


def enabled() -> bool:
    """Whether the faster ways are taken: the switch is the environment variable ``MOMENTUM_LM_CPU_FAST``."""
    return os.environ.get("MOMENTUM_LM_CPU_FAST", "1") != "0"


def _private(namespace: str, name: str) -> Any:
    """An operator ``torch.ops.NAMESPACE.NAME`` that torch promises nobody; None where it has none of this name, or all
    is to be plain."""
    return getattr(getattr(torch.ops, namespace), name, None) if enabled() else None


def limit_onednn_caches() -> None:
    """For a program or a model's loading, before anything is computed: oneDNN keeps what it prepared for few shapes
    only.

    It keeps half a megabyte for each number of rows, 1,024 of them: hundreds of megabytes over an evaluation. The
    layers of a model need about ten at a time, and 32 were as fast as 1,024. It reads these variables of the
    environment when it is first used.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


class OneDNNLinear(TorchFunctionMode):
    """Within it fp32 linear layers on a CPU are oneDNN's and not MKL's, where no gradient is needed: equal to
    rounding, and for a few hundred rows a fifth to a third faster on AMD processors."""

    def __init__(self) -> None:
        super().__init__()
        self._linear = _private("mkldnn", "_linear_pointwise") if torch.backends.mkldnn.is_available() else None

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if function is F.linear and self._linear is not None and inference and not kwargs:
            given = [x for x in args if x is not None]
            if all(map(_is_plain, given)) and all(x.is_contiguous() for x in given[1:]):
                return self._linear(*args, *[None] * (3 - len(args)), "none", [], "")
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
    """SDPA for ``transformers``' attention interface: query (B, H, T, D), key and value (B, H or fewer, S, D), mask (B,
    1, T, S) -> output (B, T, H, D), None for the weights. On a CPU heads share keys and values in place: beside a mask
    theirs copies them for each head, a fifth of the time."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    special = any(given.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if attention_mask is None or query.shape[1] == key.shape[1] or key.device.type != "cpu" or special or not enabled():
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


class SharedPrefix:
    """Keys and values of one row, which rows of any number read, and which none adds to; ``ids``: its tokens."""

    def __init__(self, cache: Any, ids: Sequence[int] = ()) -> None:
        self.cache, self.ids = cache, ids
        self.length: int = cache.get_seq_length()
        for layer in cache.layers:
            layer.update = functools.partial(
                _read, layer.keys, layer.values
            )  # not of the layer, which would refer to itself

    def rows(self, count: int) -> TokenRows:
        """Rows that go on from it."""
        return TokenRows([self.ids] * count, self)

    def select(self, index: Tensor) -> None:
        """Raises NotImplementedError: index (B,) would have one row to choose from."""
        raise NotImplementedError("there is one row")


class PackedRows:
    """Rows of unequal length, behind one another as a single row of N tokens, none of them padding.

    seen (B, T) bool: False at the padding, which is on the right.
    """

    def __init__(self, seen: Tensor, prefix: SharedPrefix) -> None:
        self.prefix = prefix
        self.shape = seen.shape
        self.places = seen.flatten().nonzero()[:, 0]  # (N,) among the B * T
        self.number = (seen.flatten().cumsum(0) - 1).view(
            seen.shape
        )  # (B, T) of each token among the N; padding repeats a row's last

    @property
    def positions(self) -> Tensor:
        """(1, N) places in the whole sequence."""
        return (self.prefix.length + self.places % self.shape[1])[None]

    def pad(self, packed: Tensor) -> Tensor:
        """(1, H, N, D) -> (B, H, T, D)."""
        return packed[0].transpose(0, 1)[self.number].transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...)."""
        return padded.flatten(0, 1)[self.places]


_rows: ContextVar[PackedRows | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def packed(rows: PackedRows) -> Iterator[None]:
    """Within it a model with :data:`PACKED_ATTENTION` takes ``rows`` for its tokens (1, N), after their prefix."""
    before = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(before)


def packs_rows() -> bool:
    """Whether this torch has what packed rows need."""
    return _flash() is not None


def register_packed_attention() -> str:
    """Makes :data:`PACKED_ATTENTION` known to ``transformers``; returns its name."""
    from transformers.masking_utils import sdpa_mask

    def mask(*given: Any, **options: Any) -> Any:
        return sdpa_mask(*given, **options) if _rows.get() is None else None

    return register_attention(PACKED_ATTENTION, _attend, mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any
) -> tuple[Tensor, None]:
    """As :func:`grouped_attention`. Packed rows (1, H, N, D) attend to the prefix, all at once, and each to
    itself; the softmax over both is the mean of the two, each weighted by its sum of exponentials.

    Source: Juravsky et al., "Hydragen", arXiv 2402.05099, section 3.1. Raises NotImplementedError for an attention that
    is not plain.
    """
    rows = _rows.get()
    if rows is None:
        return grouped_attention(module, query, key, value, attention_mask, *given, **options)
    refused = [name for name in _REFUSED if options.get(name) is not None] + ["another torch"] * (not packs_rows())
    if query.shape[1] != key.shape[1] and not _FLASH_SHARES_KEYS:
        refused.append("fewer heads of keys")
    if refused or attention_mask is not None:
        raise NotImplementedError(f"packed rows with {refused or 'a mask'}")
    flash = _flash()
    layer, scale = rows.prefix.cache.layers[module.layer_idx], options.get("scaling")
    shared, shared_log_sum = flash(query, layer.keys, layer.values, scale=scale)
    own, own_log_sum = flash(rows.pad(query), rows.pad(key), rows.pad(value), is_causal=True, scale=scale)
    weight = torch.sigmoid(shared_log_sum[0].t() - rows.pack(own_log_sum.transpose(1, 2)))  # (N, H)
    return torch.lerp(rows.pack(own.transpose(1, 2)), shared[0].transpose(0, 1), weight[..., None])[None], None


def _flash() -> Any:
    """Attention that, unlike SDPA, returns the logarithm of its sums of exponentials too."""
    return _private("aten", "_scaled_dot_product_flash_attention_for_cpu")


def _read(
    kept_keys: Tensor, kept_values: Tensor, keys: Tensor, values: Tensor, *unused: Any, **unused_too: Any
) -> tuple[Tensor, Tensor]:
    """A cache layer's ``update`` that adds nothing to it: what it kept and what is given, or that alone of packed
    rows."""
    if _rows.get() is not None:
        return keys, values
    rows = len(keys)
    return torch.cat([kept_keys.expand(rows, -1, -1, -1), keys], -2), torch.cat(
        [kept_values.expand(rows, -1, -1, -1), values], -2
    )


def _is_plain(x: Tensor) -> bool:
    """What oneDNN takes: it refuses what is empty."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
    )
