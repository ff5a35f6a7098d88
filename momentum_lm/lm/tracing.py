"""What attention does at chosen positions, layer by layer, read while a model runs: queries, logits before softmax, output.

Only the query rows that are asked for are multiplied with the keys: never a T x T matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from momentum_lm.errors import UserError
from momentum_lm.modules import Decoder
from momentum_lm.modules.attention import Rotary

_NAME = "momentum_lm_trace"


class AttentionTrace:
    """Fills up while a model runs under :func:`tracing`; one entry a layer.

    ``positions`` (B,): the column of each row that is looked at; None: every column, and then queries only.

    outputs: (B, C) attention output after its output projection, before dropout and residual; momentum included
    logits: (B, H, S) fp32, q k^T with the query already scaled, over all keys, a prefix's first; columns after the position are
        those of the future or of padding and mean nothing
    queries: (B, H * D) scaled queries, or (B, T, H * D) without positions
    inputs: (B, T, C) what goes into the projections, if ``keep_inputs``
    """

    def __init__(self, positions: Tensor | None = None, keep_inputs: bool = False) -> None:
        self.positions, self.keep_inputs = positions, keep_inputs
        self.outputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.inputs: list[Tensor] = []

    def attention(self, query: Tensor, key: Tensor, scale: float) -> None:
        """query (B, H, T, D), key (B, H or fewer, S, D), both as they are multiplied."""
        scaled = query.detach() * scale
        if self.positions is None:
            self.queries.append(scaled.transpose(1, 2).flatten(2))
            return
        row = scaled[torch.arange(len(scaled), device=scaled.device), :, self.positions.to(scaled.device)]  # (B, H, D)
        self.queries.append(row.flatten(1))
        groups = row.unflatten(1, (key.shape[1], -1)).float()  # heads that share their keys side by side
        self.logits.append(torch.einsum("bkgd,bksd->bkgs", groups, key.detach().float()).flatten(1, 2))

    def output(self, value: Tensor) -> None:
        """value (B, T, C)."""
        if self.positions is not None:
            self.outputs.append(value.detach()[torch.arange(len(value), device=value.device), self.positions.to(value.device)])


@contextlib.contextmanager
def tracing(model: nn.Module, trace: AttentionTrace) -> Iterator[None]:
    """Everything that ``model``, our decoder or one of transformers, computes in this context goes into ``trace``.

    Raises UserError for a model whose attention cannot be read.
    """
    with _native(model, trace) if isinstance(model, Decoder) else _huggingface(model, trace):
        yield


@contextlib.contextmanager
def _native(model: Decoder, trace: AttentionTrace) -> Iterator[None]:
    handles = []
    for layer in model.layers:
        attention: Any = layer.self_attn
        seen: dict[str, Tensor] = {}

        def project(name: str, seen: dict[str, Tensor]) -> Any:
            return lambda module, given, result: seen.__setitem__(name, result)

        def finish(module: Any, given: Any, options: dict[str, Any], result: Tensor, seen: dict[str, Tensor] = seen) -> None:
            query, key = (seen[name].unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in ("q", "k"))
            rotation, cache = options.get("rotation"), options.get("cache")
            if rotation is not None:
                query, key = Rotary.rotate(query, *rotation), Rotary.rotate(key, *rotation)
            if cache is not None and cache.keys is not None:  # a cache that is not frozen holds these keys already
                key = torch.cat([cache.keys, key], 2) if cache.frozen else cache.keys
            trace.attention(query, key, query.shape[-1] ** -0.5)
            trace.output(result)
            if trace.keep_inputs:
                trace.inputs.append(given[0].detach())

        handles.append(attention.q_proj.register_forward_hook(project("q", seen)))
        handles.append(attention.k_proj.register_forward_hook(project("k", seen)))
        handles.append(attention.register_forward_hook(finish, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_active: list[AttentionTrace] = []  # the trace that the registered attention function writes to
_seen: list[nn.Module] = []


@contextlib.contextmanager
def _huggingface(model: Any, trace: AttentionTrace) -> Iterator[None]:
    before = model.config._attn_implementation
    handles = []
    _register()
    model.set_attn_implementation(_NAME)
    try:
        for module in attention_modules(model):
            handles.append(module.register_forward_hook(lambda m, given, result: trace.output(result[0])))
            if trace.keep_inputs:
                handles.append(module.register_forward_hook(_keep_input(trace), with_kwargs=True))
        _active.append(trace)
        try:
            yield
        finally:
            _active.pop()
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention modules of a transformers model, in the order in which they run: found by running it on one token."""
    found = model.__dict__.get("_momentum_lm_attention")
    if found is None:
        _register()
        before = model.config._attn_implementation
        model.set_attn_implementation(_NAME)
        _seen.clear()
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        model.set_attn_implementation(before)
        found = list(_seen)
        if not found:
            raise UserError(f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be read")
        model.__dict__["_momentum_lm_attention"] = found
    return found


def _keep_input(trace: AttentionTrace) -> Any:
    def hook(module: Any, given: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        trace.inputs.append((given[0] if given else options["hidden_states"]).detach())

    return hook


def _register() -> None:
    """Tells transformers of an attention function that computes what SDPA does and lets the trace look."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> Any:
        if _active:
            scale = options.get("scaling")
            _active[-1].attention(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        else:
            _seen.append(module)
        return sdpa_attention_forward(module, query, key, value, *given, **options)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
