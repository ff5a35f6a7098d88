"""What attention does at chosen positions, layer by layer, read while a model runs: queries, logits before softmax, output.

Only the query rows that are asked for are multiplied with the keys: never a T x T matrix.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from momentum_lm.errors import UserError
from momentum_lm.model import Decoder
from momentum_lm.model.attention import Rotary

from .inference import grouped_attention, register_attention
from .momentum_attention import added_momentum, with_momentum
from .verification import apart, position_limit, shortened_windows, tolerance, trial_lengths, trial_tokens

_NAME = "momentum_lm_trace"
ROWS = 256  # queries whose weights are held at a time, where SDPA does not compute an attention
_log = logging.getLogger(__name__)


class AttentionTrace:
    """Fills up while a model runs under :func:`tracing`; one entry a layer.

    ``positions`` (N, P): the columns of the first N rows that are looked at; None: every row and column, and then queries only.

    outputs: (N, P, C) attention output after its output projection, before dropout and residual; momentum included
    logits: (N, P, H, S) fp32, what the softmax is of: q k^T with the query already scaled, over all keys, a prefix's
        first; soft-capped where a model does so, with what it adds for positions, and -inf at what it does not see,
        such as the future
    queries: (N, P, H * D) scaled queries before rotary positions turn them (after it where a model's projection is not found and it does
        turn them), or (B, T, H * D) without positions
    With ``projections``, inputs: (B, T, C) what goes into the projections; keys, values: (B, T, Hkv * D) what comes out, before rotary
        positions; empty where attention takes no keys and values that are those of projections of their own
    With ``relax``, heads, relaxed: (N, P, H, D) fp32 softmax attention, and the same without softmax, the queries'
        scale, soft-capping and what is added for positions (section 3.1 of the paper); relaxed_outputs: (N, P, C) the
        latter in place of the former in ``outputs``; empty where more than the output projection stands between
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

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plain: Tensor | None = None,
        mask: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """query (B, H, T, D), key and value (B, H or fewer, S, D) as they are used; plain (B, T, H * D): the query
        before rotary.

        mask (B or 1, H or 1, T, S): True at what is seen, or added to the logits; None: everything up to the query's
        own place. softcap: logits are softcap * tanh(logits / softcap). sinks (H,): logits of a further key, which has
        no value.
        """
        plain = query.transpose(1, 2).flatten(2) if plain is None else plain.flatten(2)
        if self.positions is None:
            self.queries.append(plain.detach() * scale)
            return
        self.queries.append(self._at(plain) * scale)
        count, groups = len(self.positions), key.shape[1]
        row = self._at(query.transpose(1, 2)).unflatten(2, (groups, -1)).float() * scale  # (N, P, G, H / G, D): heads that share keys
        linear = torch.einsum("npgkd,ngsd->npgks", row, key[:count].detach().float()).flatten(2, 3)
        logits = linear if softcap is None else softcap * torch.tanh(linear / softcap)
        column = torch.arange(key.shape[2], device=key.device)
        last = self.positions.to(key.device) + key.shape[2] - query.shape[2]  # positions count from the end of a prefix
        seen = (column <= last[..., None])[:, :, None]  # (N, P, 1 or H, S)
        if mask is not None:
            added, seen = split_mask(self._mask_rows(mask))
            logits = logits if added is None else logits + added
        logits = logits.masked_fill(~seen, -torch.inf)
        self.logits.append(logits)
        if self.relax:
            values = value[:count].detach().float()
            if sinks is not None:
                logits = torch.cat([logits, sinks.detach().float()[:, None].expand(*logits.shape[:3], 1)], -1)
            weights = logits.softmax(-1)[..., : key.shape[2]].unflatten(2, (groups, -1))
            self.heads.append(torch.einsum("npgks,ngsd->npgkd", weights, values).flatten(2, 3))
            weights = (linear.masked_fill(~seen, 0.0) / scale).unflatten(2, (groups, -1))
            self.relaxed.append(torch.einsum("npgks,ngsd->npgkd", weights, values).flatten(2, 3))

    def _mask_rows(self, mask: Tensor) -> Tensor:
        """(B or 1, H or 1, T, S) -> (N, P, H or 1, S)."""
        assert self.positions is not None
        columns = self.positions.to(mask.device)
        rows = torch.arange(len(columns), device=mask.device)[:, None] if len(mask) > 1 else torch.zeros_like(columns)
        return mask.detach()[rows, :, columns]

    def read_wrongly(self, output: Tensor) -> bool:
        """Whether the last layer's ``heads`` are not what its attention gave, output (B, T, H, D), at these positions.
        """
        found, expected = self.heads[-1].flatten(2), self._at(output).float().flatten(2)
        error = (found - expected).norm() / expected.norm().clamp(min=1e-6)
        return bool(error.isfinite() & (error > tolerance(output.dtype)))

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


def split_mask(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """A mask of transformers' attention interface (..., T, S) -> what it adds to logits, if anything, and True at what
    is seen.
    """
    if mask.dtype == torch.bool:
        return None, mask
    seen = mask > torch.finfo(mask.dtype).min / 2
    return mask.float().masked_fill(~seen, 0.0), seen


def full_mask(attention_mask: Tensor | None, query: Tensor, key: Tensor, causal: bool,
    bias: Tensor | None) -> Tensor | None:
    """What an attention of transformers' interface sees, (B or 1, H or 1, T, S) as of :func:`split_mask`; None:
    everything up to the query's own place, where there are as many keys as queries. bias: what is added to logits
    beside the mask.
    """
    length, total = query.shape[2], key.shape[2]
    if attention_mask is None and (bias is not None or length != total or not causal):
        attention_mask = torch.ones(1, 1, length, total, dtype=torch.bool, device=query.device)
        if causal and length > 1:
            attention_mask = attention_mask.tril()
    elif attention_mask is not None:
        attention_mask = attention_mask[..., :total]
    if bias is None or attention_mask is None:
        return attention_mask
    added, seen = split_mask(attention_mask)
    bias = bias[..., :total].float()
    return (bias if added is None else bias + added).masked_fill(~seen, torch.finfo(torch.float32).min)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention as :meth:`AttentionTrace.attention` describes it, where SDPA knows no soft-capping and no sinks: (B, T,
    H, D).
    """
    groups, parts = query.shape[1] // key.shape[1], []
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    column = torch.arange(key.shape[2], device=key.device)
    for first in range(0, query.shape[2], ROWS):
        rows = slice(first, min(first + ROWS, query.shape[2]))
        logits = (query[:, :, rows] @ key.transpose(2, 3)).float() * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        added, seen = (None, column <= column[rows, None]) if mask is None else split_mask(mask[:, :, rows])
        logits = (logits if added is None else logits + added).masked_fill(~seen, torch.finfo(logits.dtype).min)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
        parts.append(logits.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value)
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


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

        def finish(
            module: Any, given: Any, options: dict[str, Any], result: Tensor, seen: dict[str, Tensor] = seen
        ) -> None:
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


_KEY = ("k_proj", "key", "k_lin")
_VALUE = ("v_proj", "value", "v_lin")
# By model_type: the projection to queries, keys and values at once, and how these lie in it. Others' with these names lie otherwise.
FUSED = {"gpt2": ("c_attn", "blocks"), "gpt_neox": ("query_key_value", "heads"), "bloom": ("query_key_value", "heads")}


def child(module: Any, names: Sequence[str]) -> nn.Module | None:
    """The first of a module's children under one of ``names``."""
    return next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)


def split_fused(values: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    """Queries, keys and values (..., H * D) of what a projection gives at once, (..., 3 * H * D): in turn, or in turn for each head."""
    return (
        values.chunk(3, -1)
        if heads is None
        else tuple(x.flatten(-2) for x in values.unflatten(-1, (heads, 3, -1)).unbind(-2))
    )


def fused_name(model: Any) -> str | None:
    """The name of a model's projections to queries, keys and values at once; None where it has none of a known layout."""
    return FUSED.get(getattr(model.config, "model_type", ""), (None,))[0]


def fused_heads(model: Any) -> int | None:
    """The heads by which :func:`split_fused` is to split what such a projection gives, or its weights."""
    return model.config.num_attention_heads if FUSED[model.config.model_type][1] == "heads" else None


def key_value_weights(model: Any) -> list[tuple[Tensor, ...]]:
    """Per layer weight and bias of the keys' projection and of the values', (Hkv * D, C) and (Hkv * D,), fp32; zeros where there is no
    bias. Nothing for a model in which they are not found."""
    modules: list[Any] = (
        [layer.self_attn for layer in model.layers] if isinstance(model, Decoder) else attention_modules(model)
    )
    found: list[tuple[Tensor, ...]] = []
    for module in modules:
        pair: list[Any] = [child(module, _KEY), child(module, _VALUE)]
        projection = child(module, [fused_name(model) or ""])
        if all(isinstance(getattr(part, "weight", None), Tensor) for part in pair):
            parts = [(part.weight, getattr(part, "bias", None)) for part in pair]
        elif projection is not None:
            heads, bias, stored = fused_heads(model), getattr(projection, "bias", None), cast(Tensor, projection.weight)
            weight = stored.t() if isinstance(projection, nn.Linear) else stored  # GPT-2's is stored turned
            biases = (None,) * 3 if bias is None else split_fused(bias, heads)
            parts = [(w.t(), b) for w, b in zip(split_fused(weight, heads), biases, strict=True)][1:]
        else:
            return []
        each = [
            (w.detach().float(), w.new_zeros(len(w)).float() if b is None else b.detach().float()) for w, b in parts
        ]
        found.append(each[0] + each[1])
    return found


@dataclass
class Anatomy:
    """How the attention modules of one model are read, settled by a trial: see :func:`_try`.

    modules: in the order in which they run; one that stands in several layers comes as often.
    queries: the submodule whose result is the query before rotary positions, None for one of the projections to
        queries, keys and values at once; whether its heads come before time, and the factor to the query that is used.
        Modules that are not here have no such.
    projects: the output projection, between attention and the module's output. Modules that are not here have more
    between. keys: whether keys and values are those of :func:`key_value_weights`
    """

    modules: list[nn.Module]
    queries: dict[nn.Module, tuple[nn.Module | None, bool, float]] = field(default_factory=dict)
    projects: dict[nn.Module, nn.Module] = field(default_factory=dict)
    keys: bool = False


@dataclass
class _Reading:
    """A model that is being read: the registered attention function writes to the trace."""

    model: Any
    trace: AttentionTrace
    anatomy: Anatomy
    trial: _Trial | None = None
    seen: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attention = with_momentum(self._compute, added_momentum(self.model))
        """What the model computes, momentum included; ``without_momentum`` is then what it was added to, (B, T, H, D).
        """

    def _compute(self, *given: Any, **options: Any) -> Any:
        result = _compute(*given, **options)
        self.without_momentum: Tensor = result[0]
        return result


_active: list[_Reading] = []
_seen: list[nn.Module] = []


def being_traced() -> bool:
    """Whether a model of transformers is within :func:`tracing`."""
    return bool(_active)


@contextlib.contextmanager
def _huggingface(model: Any, trace: AttentionTrace) -> Iterator[None]:
    with _reading(model, trace, anatomy(model)):
        yield
    if trace.relax and not all(module in anatomy(model).projects for module in anatomy(model).modules):
        trace.relaxed_outputs.clear()


@contextlib.contextmanager
def _reading(model: Any, trace: AttentionTrace, found: Anatomy, trial: _Trial | None = None) -> Iterator[None]:
    before, handles = _implementation(model), []
    reading = _Reading(model, trace, found, trial)
    fused_names = [fused_name(model) or ""]
    model.set_attn_implementation(_register(before))
    try:
        for module in dict.fromkeys(found.modules):
            seen = reading.seen[module] = {}
            source, _, _ = found.queries.get(module, (None, False, 0.0))
            if source is not None:
                handles.append(source.register_forward_hook(_keep_result(seen, "source")))
            for name, part in (("k", child(module, _KEY)), ("v", child(module, _VALUE))):
                if part is not None:
                    handles.append(part.register_forward_hook(_keep_result(seen, name)))
            fused = child(module, fused_names)
            if fused is not None:
                handles.append(fused.register_forward_hook(_keep_parts(seen, fused_heads(model))))
            if module in found.projects:
                handles.append(found.projects[module].register_forward_pre_hook(_keep_given(seen, "mixed")))
            if trial is not None:
                handles += trial.watch(module)
            handles.append(module.register_forward_hook(_finish(reading, seen), with_kwargs=True))
        _active.append(reading)
        try:
            yield
        finally:
            _active.pop()
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def _finish(reading: _Reading, seen: dict[str, Tensor]) -> Any:
    trace, found = reading.trace, reading.anatomy

    def hook(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if reading.trial is not None:
            reading.trial.finish(module, output, seen)
        trace.output(output)
        if module in found.projects:
            trace.relaxed_output(found.projects[module], seen.get("mixed"))
        if trace.projections and found.keys:
            trace.inputs.append((given[0] if given else options["hidden_states"]).detach())
            trace.keys.append(seen["k"].detach())
            trace.values.append(seen["v"].detach())
        seen.clear()

    return hook


class _Trial:
    """What a trial notes of each attention module: the tensors by which its parts are known."""

    def __init__(self) -> None:
        # of every part: itself, what it was given, what it gave
        self.results: dict[nn.Module, list[tuple[nn.Module, Any, Any]]] = {}
        self.used: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}  # query, key, value
        self.joined: dict[nn.Module, Tensor] = {}  # attention's result, (B, T, H * D)
        self.outputs: dict[nn.Module, Tensor] = {}
        self.parts: dict[nn.Module, dict[str, Tensor]] = {}
        self.options: set[str] = set()

    def watch(self, module: nn.Module) -> list[Any]:
        """Hooks on an attention module, where a call begins anew, and on every part of it."""

        def begin(module: nn.Module, given: Any) -> None:
            self.results[module] = []

        def keep(part: nn.Module, given: Any, result: Any) -> None:
            self.results[module].append((part, given[0] if given else None, result))

        parts = [part for part in module.modules() if part is not module]
        return [module.register_forward_pre_hook(begin), *(part.register_forward_hook(keep) for part in parts)]

    def finish(self, module: nn.Module, output: Tensor, parts: dict[str, Tensor]) -> None:
        """What an attention module gave at last."""
        self.outputs[module], self.parts[module] = output, dict(parts)

    def query_source(self, module: nn.Module) -> tuple[nn.Module | None, bool, float] | None:
        """At the first token rotary positions turn nothing: what equals the query there, and ran last, is the query
        before they do.
        """
        query = self.used[module][0].transpose(1, 2)  # (B, T, H, D)
        # what runs twice, such as one norm for queries and keys, tells too little
        ran = [part for part, _, _ in self.results[module]]
        once = [(part, result) for part, _, result in self.results[module] if ran.count(part) == 1]
        found: list[tuple[nn.Module | None, Any]] = [*once, (None, self.parts[module].get("q"))]
        for part, result in reversed(found):
            if not isinstance(result, Tensor) or result.numel() != query.numel():
                continue
            for heads_first in (False, True):
                if heads_first and (result.dim() != 4 or result.shape != query.transpose(1, 2).shape):
                    continue
                plain = result.transpose(1, 2) if heads_first else result.reshape(query.shape)
                one, other = plain[:, 0].float(), query[:, 0].float()
                factor = ((one * other).sum() / one.square().sum()).item()
                if factor > 0 and _near(factor * one, other, query.dtype):
                    return part, heads_first, factor
        return None

    def projection(self, module: nn.Module) -> nn.Module | None:
        """The part that gets attention's result and gives the module's output."""
        joined = self.joined[module]
        for part, given, result in reversed(self.results[module]):
            if isinstance(given, Tensor) and isinstance(result, Tensor) and given.numel() == joined.numel():
                same = result.shape == self.outputs[module].shape and _near(result, self.outputs[module], result.dtype)
                if (
                    same
                    and _near(given.reshape(joined.shape), joined, given.dtype)
                    and next(part.parameters(), None) is not None
                ):
                    return part
        return None

    def projected_keys(self, module: nn.Module) -> bool:
        """Whether keys and values that are used are the projections' own, but for rotary positions."""
        _, key, value = self.used[module]
        parts = [self.parts[module].get(name) for name in "kv"]
        if any(part is None or part.numel() != x.numel() for part, x in zip(parts, (key, value), strict=True)):
            return False
        k, v = (
            part.reshape(x.transpose(1, 2).shape)
            for part, x in zip(cast(list[Tensor], parts), (key, value), strict=True)
        )
        return _near(k[:, 0], key[:, :, 0], key.dtype) and _near(v, value.transpose(1, 2), value.dtype)


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    return bool((one.float() - other.float()).norm() <= 0.3 * tolerance(dtype) * other.float().norm())


def anatomy(model: Any) -> Anatomy:
    """How the attention of a transformers model is read; the model is tried first, once for each implementation of
    attention.

    Raises UserError for a model whose attention cannot be read, or is not what it is read as.
    """
    known = model.__dict__.setdefault("_momentum_lm_anatomy", {})
    name = _implementation(model)
    if name not in known:
        known[name] = _try(model)
    return known[name]


def _trial(model: Any) -> tuple[_Trial, AttentionTrace, Anatomy]:
    """Reads a few dozen tokens, which cross the model's windows, and compares with what the model itself gives for
    them.

    Raises UserError for a model that does not go through transformers' attention interface, or attends otherwise than
    is read.
    """
    kind, modules = type(model).__name__, attention_modules(model)
    config = model.config.get_text_config(decoder=True)
    _, length = trial_lengths(config, position_limit(config))
    tokens = trial_tokens(config, model.get_input_embeddings().weight.shape[0], 2, length).to(model.device)
    positions, trial, found = torch.tensor([[length - 1, length // 2], [length - 2, 0]]), _Trial(), Anatomy(modules)
    trace = AttentionTrace(positions, relax=True)
    with torch.no_grad(), shortened_windows(model):
        plain = model(tokens, use_cache=False).logits
        with _reading(model, trace, found, trial):
            traced = model(tokens, use_cache=False).logits
    given = f" (it takes {', '.join(sorted(trial.options))})" if trial.options else ""
    if max(map(apart, traced, plain)) > tolerance(plain.dtype) or not len(trace.logits) == len(trace.outputs) == len(
        modules
    ):
        raise UserError(
            f"the attention of {kind} cannot be read: with it read, the model gives other predictions{given}"
        )
    return trial, trace, found


def check_attention(model: Any) -> None:
    """Raises UserError for a model whose attention is not, or not only, softmax over what its masks show."""
    _trial(model)


def _try(model: Any) -> Anatomy:
    """What a trial tells of the parts of the attention modules."""
    kind = type(model).__name__
    trial, trace, found = _trial(model)
    modules = found.modules
    shapes = {(x.shape[2], q.shape[-1], h.shape[-1], o.shape[-1])
              for x, q, h, o in zip(trace.logits, trace.queries, trace.heads, trace.outputs, strict=True)}  # fmt: skip
    if len(shapes) > 1:
        raise UserError(
            f"the layers of {kind} have attention heads of unequal number or size, which the analysis cannot compare"
        )
    for module in dict.fromkeys(modules):
        source, project = trial.query_source(module), trial.projection(module)
        if source is not None:
            found.queries[module] = source
        if project is not None:
            found.projects[module] = project
        elif trial.outputs[module].shape == trial.joined[module].shape and _near(
            trial.outputs[module], trial.joined[module], trace.heads[0].dtype
        ):
            raise UserError(f"the attention of {kind} cannot be read: its output projection stands elsewhere")
    found.keys = all(map(trial.projected_keys, dict.fromkeys(modules))) and len(key_value_weights(model)) == len(
        modules
    )
    left_out = [] if found.keys else ["the similarity of weight updates (keys or values are not plain projections)"]
    if len(found.projects) < len(set(modules)):
        left_out.append("outputs without softmax (more than a projection follows attention)")
    if left_out:
        _log.warning("%s: left out of the analysis: %s", kind, "; ".join(left_out))
    return found


def attention_modules(model: Any) -> list[nn.Module]:
    """The attention modules of a transformers model, in the order in which they run: found by running it on a token or
    two.

    Raises UserError for a model whose attention does not go through transformers' attention interface.
    """
    found = model.__dict__.get("_momentum_lm_attention")
    if found is None:
        before = _implementation(model)
        model.set_attn_implementation(_register(before))
        _seen.clear()
        try:
            with torch.no_grad():
                model(torch.ones(1, 2, dtype=torch.long, device=model.device), use_cache=False)
        finally:
            model.set_attn_implementation(before)
        found = list(_seen)
        if not found:
            raise UserError(
                f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
                "read"
            )
        model.__dict__["_momentum_lm_attention"] = found
    return found


def _implementation(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _register(implementation: str) -> str:
    """The tracing attention, with masks of the kind that models with ``implementation`` expect."""
    from transformers.masking_utils import eager_mask

    if implementation == "eager":
        return register_attention(f"{_NAME}_eager", _attend, eager_mask)
    return register_attention(_NAME, _attend)


def _scale(query: Tensor, options: dict[str, Any]) -> float:
    scale = options.get("scaling")
    return query.shape[-1] ** -0.5 if scale is None else scale


def _compute(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any
) -> Any:
    """What a model's own attention computes: SDPA, or what that does not know."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return grouped_attention(module, query, key, value, attention_mask, *given, **options)
    mask = full_mask(attention_mask, query, key, _causal(module, options), options.get("position_bias"))
    return softmax_attention(
        query, key, value, mask, _scale(query, options), options.get("softcap"), options.get("s_aux")
    ), None


def _causal(module: Any, options: dict[str, Any]) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *given: Any, **options: Any
) -> Any:
    """A model's attention, with what momentum was added, that lets the trace look."""
    if not _active:
        _seen.append(module)
        return _compute(module, query, key, value, attention_mask, *given, **options)
    reading = _active[-1]
    trace, seen = reading.trace, reading.seen.get(module, {})
    plain = None
    if module in reading.anatomy.queries:
        source, heads_first, factor = reading.anatomy.queries[module]
        before = seen["q" if source is None else "source"]
        plain = factor * (before.transpose(1, 2) if heads_first else before).reshape(
            *query.transpose(1, 2).shape[:2], -1
        )
    mask = full_mask(attention_mask, query, key, _causal(module, options), options.get("position_bias"))
    trace.attention(
        query, key, value, _scale(query, options), plain, mask, options.get("softcap"), options.get("s_aux")
    )
    out, weights = reading.attention(module, query, key, value, attention_mask, *given, **options)
    if trace.relax and trace.positions is not None and trace.read_wrongly(reading.without_momentum):
        kind, names = type(reading.model).__name__, ", ".join(sorted(_special(options))) or "a mask"
        raise UserError(f"the attention of {kind} cannot be read: it is not softmax attention alone (it takes {names})")
    if reading.trial is not None:
        reading.trial.used[module] = query, key, value
        reading.trial.joined[module] = out.flatten(2)
        reading.trial.options |= _special(options)
    return out, weights


def _special(options: dict[str, Any]) -> set[str]:
    """The names of what an attention is given beside what every one is."""
    usual = {
        "scaling",
        "dropout",
        "is_causal",
        "output_attentions",
        "position_ids",
        "use_cache",
        "cache_position",
        "past_key_values",
    }
    return {name for name, value in options.items() if value is not None and value is not False and name not in usual}
