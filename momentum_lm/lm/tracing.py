"""What attention does at chosen positions, layer by layer, read while a model runs: queries, logits before softmax, output.

Only the query rows that are asked for are multiplied with the keys: never a T x T matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from momentum_lm.errors import UserError
from momentum_lm.modules import Decoder
from momentum_lm.modules.attention import Rotary

from .inference import grouped_attention, register_attention
from .momentum_attention import added_momentum, with_momentum

_NAME = "momentum_lm_trace"


class AttentionTrace:
    """Fills up while a model runs under :func:`tracing`; one entry a layer.

    ``positions`` (N, P): the columns of the first N rows that are looked at; None: every row and column, and then queries only.

    outputs: (N, P, C) attention output after its output projection, before dropout and residual; momentum included
    logits: (N, P, H, S) fp32, q k^T with the query already scaled, over all keys, a prefix's first; columns after the position are
        those of the future or of padding and mean nothing
    queries: (N, P, H * D) scaled queries before rotary positions turn them (after it where a model's projection is not found and it does
        turn them), or (B, T, H * D) without positions
    With ``projections``, inputs: (B, T, C) what goes into the projections; keys, values: (B, T, Hkv * D) what comes out, before rotary
        positions; empty where a model has no projections of their own for them
    With ``relax``, heads, relaxed: (N, P, H, D) fp32 softmax attention, and the same without softmax and without the queries' scale
        (section 3.1 of the paper); relaxed_outputs: (N, P, C) the latter in place of the former in ``outputs``
    """

    def __init__(self, positions: Tensor | None = None, projections: bool = False, relax: bool = False) -> None:
        self.positions, self.projections, self.relax = positions, projections, relax
        self.outputs: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.relaxed: list[Tensor] = []
        self.relaxed_outputs: list[Tensor] = []

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float, plain: Tensor | None = None) -> None:
        """query (B, H, T, D), key and value (B, H or fewer, S, D) as they are used; plain (B, T, H * D): the query before rotary."""
        plain = query.transpose(1, 2).flatten(2) if plain is None else plain.flatten(2)
        if self.positions is None:
            self.queries.append(plain.detach() * scale)
            return
        self.queries.append(self._at(plain) * scale)
        count, groups = len(self.positions), key.shape[1]
        row = self._at(query.transpose(1, 2)).unflatten(2, (groups, -1)).float() * scale  # (N, P, G, H / G, D): heads that share keys
        logits = torch.einsum("npgkd,ngsd->npgks", row, key[:count].detach().float())
        self.logits.append(logits.flatten(2, 3))
        if self.relax:
            values = value[:count].detach().float()
            column = torch.arange(key.shape[2], device=key.device)
            last = self.positions.to(key.device) + key.shape[2] - query.shape[2]  # positions count from the end of a prefix
            future = (column > last[..., None])[:, :, None, None]
            weights = logits.masked_fill(future, -torch.inf).softmax(-1)
            self.heads.append(torch.einsum("npgks,ngsd->npgkd", weights, values).flatten(2, 3))
            weights = logits.masked_fill(future, 0.0) / scale
            self.relaxed.append(torch.einsum("npgks,ngsd->npgkd", weights, values).flatten(2, 3))

    def output(self, value: Tensor) -> None:
        """value (B, T, C)."""
        if self.positions is not None:
            self.outputs.append(self._at(value))

    def relaxed_output(self, project: nn.Module, mixed: Tensor | None = None) -> None:
        """project: the output projection; mixed (B, T, H * D): what went into it, where that is more than softmax attention."""
        if self.relax and self.positions is not None:
            joined = self.relaxed[-1].flatten(2)
            if mixed is not None:
                joined = joined + self._at(mixed).float() - self.heads[-1].flatten(2)
            with torch.no_grad():
                self.relaxed_outputs.append(project(joined.to(self.outputs[-1].dtype)))

    def _at(self, value: Tensor) -> Tensor:
        """(B, T, ...) -> (N, P, ...)."""
        assert self.positions is not None
        columns = self.positions.to(value.device)
        return value.detach()[torch.arange(len(columns), device=value.device)[:, None], columns]


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

        def finish(module: Any, given: Any, options: dict[str, Any], result: Tensor, seen: dict[str, Tensor] = seen) -> None:
            query, key, value = (seen[name].unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in "qkv")
            rotation, cache = options.get("rotation"), options.get("cache")
            if rotation is not None:
                query, key = Rotary.rotate(query, *rotation), Rotary.rotate(key, *rotation)
            if cache is not None and cache.keys is not None:  # a cache that is not frozen holds these keys already
                key = torch.cat([cache.keys, key], 2) if cache.frozen else cache.keys
                value = torch.cat([cache.values, value], 2) if cache.frozen else cache.values
            trace.attention(query, key, value, query.shape[-1] ** -0.5, seen["q"])
            trace.output(result)
            trace.relaxed_output(module.out_proj, None if module.momentum is None else seen["mixed"])
            if trace.projections:
                for kept, tensor in ((trace.inputs, given[0]), (trace.keys, seen["k"]), (trace.values, seen["v"])):
                    kept.append(tensor.detach())

        for name in "qkv":
            handles.append(getattr(attention, f"{name}_proj").register_forward_hook(_keep_result(seen, name)))
        handles.append(attention.out_proj.register_forward_pre_hook(_keep_given(seen, "mixed")))
        handles.append(attention.register_forward_hook(finish, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_result(seen: dict[str, Tensor], name: str) -> Any:
    return lambda module, given, result: seen.__setitem__(name, result)


def _keep_parts(seen: dict[str, Tensor], heads: int | None) -> Any:
    return lambda module, given, result: seen.update(zip("qkv", split_fused(result, heads), strict=True))


def _keep_given(seen: dict[str, Tensor], name: str) -> Any:
    return lambda module, given: seen.__setitem__(name, given[0])


_QUERY = ("q_norm", "q_layernorm", "q_proj", "query", "q_lin")  # the last step before rotary positions, by its names in transformers
_KEY = ("k_proj", "key", "k_lin")
_VALUE = ("v_proj", "value", "v_lin")
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin")
# By model_type: the projection to queries, keys and values at once, and how these lie in it. Others' with these names lie otherwise.
FUSED = {"gpt2": ("c_attn", "blocks"), "gpt_neox": ("query_key_value", "heads"), "bloom": ("query_key_value", "heads")}


def child(module: Any, names: Sequence[str]) -> nn.Module | None:
    """The first of a module's children under one of ``names``."""
    return next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)


def split_fused(values: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    """Queries, keys and values (..., H * D) of what a projection gives at once, (..., 3 * H * D): in turn, or in turn for each head."""
    return values.chunk(3, -1) if heads is None else tuple(x.flatten(-2) for x in values.unflatten(-1, (heads, 3, -1)).unbind(-2))


def fused_name(model: Any) -> str | None:
    """The name of a model's projections to queries, keys and values at once; None where it has none of a known layout."""
    return FUSED.get(getattr(model.config, "model_type", ""), (None,))[0]


def fused_heads(model: Any) -> int | None:
    """The heads by which :func:`split_fused` is to split what such a projection gives, or its weights."""
    return model.config.num_attention_heads if FUSED[model.config.model_type][1] == "heads" else None


def key_value_weights(model: Any) -> list[tuple[Tensor, ...]]:
    """Per layer weight and bias of the keys' projection and of the values', (Hkv * D, C) and (Hkv * D,), fp32; zeros where there is no
    bias. Nothing for a model in which they are not found."""
    modules: list[Any] = [layer.self_attn for layer in model.layers] if isinstance(model, Decoder) else attention_modules(model)
    found: list[tuple[Tensor, ...]] = []
    for module in modules:
        pair: list[Any] = [child(module, _KEY), child(module, _VALUE)]
        projection = child(module, [fused_name(model) or ""])
        if None not in pair:
            parts = [(part.weight, getattr(part, "bias", None)) for part in pair]
        elif projection is not None:
            heads, bias, stored = fused_heads(model), getattr(projection, "bias", None), cast(Tensor, projection.weight)
            weight = stored.t() if isinstance(projection, nn.Linear) else stored  # GPT-2's is stored turned
            biases = (None,) * 3 if bias is None else split_fused(bias, heads)
            parts = [(w.t(), b) for w, b in zip(split_fused(weight, heads), biases, strict=True)][1:]
        else:
            return []
        each = [(w.detach().float(), w.new_zeros(len(w)).float() if b is None else b.detach().float()) for w, b in parts]
        found.append(each[0] + each[1])
    return found


_active: list[tuple[AttentionTrace, Callable[..., Any]]] = []  # what the registered attention function writes to, and computes
_seen: list[nn.Module] = []


@contextlib.contextmanager
def _huggingface(model: Any, trace: AttentionTrace) -> Iterator[None]:
    before, added = model.config._attn_implementation, added_momentum(model)
    attention, handles = with_momentum(grouped_attention, added), []
    modules: list[Any] = attention_modules(model)
    model.set_attn_implementation(register_attention(_NAME, _attend))
    try:
        for module in modules:
            seen: dict[str, Tensor] = {}
            for name, found in (("q", child(module, _QUERY)), ("k", child(module, _KEY)), ("v", child(module, _VALUE))):
                if found is not None:
                    handles.append(found.register_forward_hook(_keep_result(seen, name)))
            fused = child(module, [fused_name(model) or ""])
            if fused is not None:
                handles.append(fused.register_forward_hook(_keep_parts(seen, fused_heads(model))))
            project = child(module, _OUT)
            if project is not None and (attention is not grouped_attention or getattr(module, "momentum", None) is not None):
                handles.append(project.register_forward_pre_hook(_keep_given(seen, "mixed")))
            handles.append(module.register_forward_pre_hook(_begin(seen), with_kwargs=True))
            handles.append(module.register_forward_hook(_finish(trace, seen), with_kwargs=True))
        _active.append((trace, attention))
        try:
            yield
        finally:
            _active.pop()
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def _begin(seen: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, given: Any, options: dict[str, Any]) -> None:
        seen.clear()
        # Only a query that is to be turned is wanted before: others may be scaled between projection and attention (OPT).
        module.__dict__["_momentum_lm_seen"] = seen if options.get("position_embeddings") is not None else {}

    return hook


def _finish(trace: AttentionTrace, seen: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        trace.output(result[0] if isinstance(result, tuple) else result)
        project = child(module, _OUT)
        if project is not None:
            trace.relaxed_output(project, seen.get("mixed"))
        if trace.projections:
            trace.inputs.append((given[0] if given else options["hidden_states"]).detach())
            if "k" in seen and "v" in seen:
                trace.keys.append(seen["k"].detach())
                trace.values.append(seen["v"].detach())
        seen.clear()
        module.__dict__.pop("_momentum_lm_seen", None)

    return hook


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention modules of a transformers model, in the order in which they run: found by running it on one token.

    Raises UserError for a model whose attention does not go through transformers' attention interface.
    """
    found = model.__dict__.get("_momentum_lm_attention")
    if found is None:
        before = model.config._attn_implementation
        model.set_attn_implementation(register_attention(_NAME, _attend))
        _seen.clear()
        try:
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        finally:
            model.set_attn_implementation(before)
        found = list(_seen)
        if not found:
            raise UserError(f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be read")
        model.__dict__["_momentum_lm_attention"] = found
    return found


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any) -> Any:
    """SDPA, with what momentum was added, that lets the trace look."""
    if not _active:
        _seen.append(module)
        return grouped_attention(module, query, key, value, *given, **options)
    trace, attention = _active[-1]
    scale = options.get("scaling")
    plain = module.__dict__.get("_momentum_lm_seen", {}).get("q")
    trace.attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, plain)
    return attention(module, query, key, value, *given, **options)
