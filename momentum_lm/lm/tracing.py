"""Attention at chosen positions, layer by layer, read while a model runs: queries, logits before softmax, output.

Only the query rows that are needed are multiplied with the keys: never a T x T matrix. How a model of
``transformers`` is read is first tried on the model itself, and a model that is not what it is read as is refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from momentum_lm.errors import UserError

from .anatomy import Layer, anatomy, is_ours
from .attention_interface import (
    added_momentum,
    attention_modules,
    full_mask,
    implementation,
    is_causal,
    is_watched,
    logit_scale,
    plain_attention,
    split_mask,
    watched,
)
from .verification import apart, shortened_windows, tolerance, trial_lengths, trial_tokens

_USUAL = {  # what every attention is given beside queries, keys, values and mask
    *("scaling", "dropout", "is_causal", "output_attentions", "position_ids", "use_cache", "cache_position"),
    "past_key_values",
}
_log = logging.getLogger(__name__)


class AttentionTrace:
    """Fills up while a model runs under :func:`tracing`; one entry a layer.

    ``positions`` (N, P): the columns of the first N rows that are looked at; None: every row and column, and then
    queries only.

    outputs: (N, P, C) attention output after its output projection, before dropout and residual; momentum included
    logits: (N, P, H, S) fp32, what the softmax is of: q k^T with the query already scaled, over all keys, a prefix's
        first; soft-capped where a model does so, with what it adds for positions, and -inf at what it does not see,
        such as the future
    queries: (N, P, H * D) scaled queries before rotary positions turn them (after it where a model's projection is not
    found and it does
        turn them), or (B, T, H * D) without positions
    With ``projections``, inputs: (B, T, C) what goes into the projections; keys, values: (B, T, Hkv * D) what comes
    out, before rotary
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
        row = (
            self._at(query.transpose(1, 2)).unflatten(2, (groups, -1)).float() * scale
        )  # (N, P, G, H / G, D): heads that share keys
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
        """Whether the last layer's ``heads`` are not what its attention gave, output (B, T, H, D), at these
        positions."""
        found, expected = self.heads[-1].flatten(2), self._at(output).float().flatten(2)
        error = (found - expected).norm() / expected.norm().clamp(min=1e-6)
        return bool(error.isfinite() & (error > tolerance(output.dtype)))

    def output(self, value: Tensor) -> None:
        """value (B, T, C)."""
        if self.positions is not None:
            self.outputs.append(self._at(value))

    def relaxed_output(self, project: nn.Module, mixed: Tensor | None = None) -> None:
        """project: the output projection; mixed (B, T, H * D): what went into it, where that is more than softmax
        attention."""
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


@dataclass
class Source:
    """The module that gives queries before rotary positions turn them; whether heads come before time in what it gives,
    and the factor to the query that is used. No module: the projection to queries, keys and values at once."""

    module: nn.Module | None
    heads_first: bool = False
    factor: float = 1.0


@dataclass
class Plan:
    """How the attention modules of one model are read.

    modules: in the order in which they run; one that stands in several layers comes as often.
    queries: where those before rotary positions are found; a module that is not here has no such.
    projects: the output projection, between attention and the module's output; a module that is not here has more
        between.
    keys: whether keys and values are their projections' own.
    """

    modules: list[nn.Module]
    queries: dict[nn.Module, Source] = field(default_factory=dict)
    projects: dict[nn.Module, nn.Module] = field(default_factory=dict)
    keys: bool = False


@contextlib.contextmanager
def tracing(model: nn.Module, trace: AttentionTrace) -> Iterator[None]:
    """Everything that ``model``, our decoder or one of transformers, computes in this context goes into ``trace``.

    Raises UserError for a model whose attention cannot be read.
    """
    plan = _plan(model)
    with _reading(model, trace, plan):
        yield
    if trace.positions is not None and len(trace.logits) != len(trace.outputs):
        raise RuntimeError(f"{len(trace.outputs)} attention modules ran, and {len(trace.logits)} of them were read")
    if trace.relax and not all(module in plan.projects for module in plan.modules):
        trace.relaxed_outputs.clear()


def being_traced() -> bool:
    """Whether a model of transformers is within :func:`tracing`."""
    return is_watched()


class _Reading:
    """One model that is being read. Hooks tell where its parts begin and end; queries, keys and values are seen as
    attention uses them."""

    def __init__(self, model: Any, trace: AttentionTrace, plan: Plan, trial: _Trial | None = None) -> None:
        self.model, self.trace, self.plan, self.trial = model, trace, plan, trial
        self.momentum = None if is_ours(model) else added_momentum(model)
        self.parts: dict[nn.Module, dict[str, Tensor]] = {module: {} for module in plan.modules}
        """Of each attention module what its projections gave: queries q, keys k, values v, the query's source, and what
        was mixed."""
        self.running: list[nn.Module] = []  # attention modules that have begun

    def hooks(self) -> Iterator[Any]:
        """Registers them; the handles."""
        for module, parts in self.parts.items():
            layer = anatomy(self.model).layer(module)
            source = self.plan.queries.get(module)
            yield module.register_forward_pre_hook(lambda module, given: self.running.append(module))
            for name, projection in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
                if projection is not None:
                    yield projection.module.register_forward_hook(_keep(parts, name, projection.of))
            if source is not None and source.module is not None:
                yield source.module.register_forward_hook(_keep(parts, "source"))
            if module in self.plan.projects:
                yield self.plan.projects[module].register_forward_pre_hook(_keep_given(parts))
            if self.trial is not None:
                yield from self.trial.watch(module)
            yield module.register_forward_hook(self.finish, with_kwargs=True)

    def before_rotation(self, module: nn.Module, query: Tensor) -> Tensor | None:
        """query (B, H, T, D), as it is used -> (B, T, H * D) before rotary positions turned it, where that is found."""
        source, parts = self.plan.queries.get(module), self.parts[module]
        if source is None:
            return None
        before = parts["q" if source.module is None else "source"]
        before = before.transpose(1, 2) if source.heads_first else before
        return source.factor * before.reshape(*query.transpose(1, 2).shape[:2], -1)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *given: Any,
        **options: Any,
    ) -> Any:
        """A model's attention with what momentum was added, of transformers' interface, while the trace looks."""
        mask = full_mask(attention_mask, query, key, is_causal(module, options), options.get("position_bias"))
        scale, softcap, sinks = logit_scale(query, options), options.get("softcap"), options.get("s_aux")
        self.trace.attention(query, key, value, scale, self.before_rotation(module, query), mask, softcap, sinks)
        alone, weights = plain_attention(module, query, key, value, attention_mask, *given, **options)
        special = {n for n, x in options.items() if x is not None and x is not False and n not in _USUAL}
        self.check(alone, special)
        out = alone if self.momentum is None else self.momentum.add_to(alone, query, value, attention_mask)
        if self.trial is not None:
            self.trial.attended(module, (query, key, value), out, special)
        return out, weights

    def sdpa(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> None:
        """Our decoder's attention, that has computed ``out`` (B, H, T, D)."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.trace.attention(query, key, value, scale, self.before_rotation(self.running[-1], query), attn_mask)
        self.check(out.transpose(1, 2), set())

    def check(self, alone: Tensor, special: set[str]) -> None:
        """Raises UserError where attention without momentum, (B, T, H, D), is not what was read of it."""
        if self.trace.relax and self.trace.positions is not None and self.trace.read_wrongly(alone):
            kind, names = type(self.model).__name__, ", ".join(sorted(special)) or "a mask"
            raise UserError(
                f"the attention of {kind} cannot be read: it is not softmax attention alone (it takes {names})"
            )

    def finish(self, module: nn.Module, given: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """A hook on attention modules."""
        output, parts, trace = result[0] if isinstance(result, tuple) else result, self.parts[module], self.trace
        self.running.pop()
        if self.trial is not None:
            self.trial.finish(module, output, parts)
        trace.output(output)
        if module in self.plan.projects:
            trace.relaxed_output(self.plan.projects[module], parts.get("mixed"))
        if trace.projections and self.plan.keys:
            trace.inputs.append((given[0] if given else options["hidden_states"]).detach())
            trace.keys.append(parts["k"].detach())
            trace.values.append(parts["v"].detach())
        parts.clear()


class _WatchedSDPA(TorchFunctionMode):
    """Within it a reading sees what our decoder gives to scaled_dot_product_attention."""

    def __init__(self, reading: _Reading) -> None:
        super().__init__()
        self.reading = reading

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention and self.reading.running:
            self.reading.sdpa(result, *args, **(kwargs or {}))
        return result


@contextlib.contextmanager
def _reading(model: Any, trace: AttentionTrace, plan: Plan, trial: _Trial | None = None) -> Iterator[None]:
    reading = _Reading(model, trace, plan, trial)
    with contextlib.ExitStack() as stack:
        for handle in reading.hooks():
            stack.callback(handle.remove)
        stack.enter_context(_WatchedSDPA(reading) if is_ours(model) else watched(model, reading.attend))
        yield


def _keep(parts: dict[str, Tensor], name: str, of: Callable[[Tensor], Tensor] = lambda result: result) -> Any:
    return lambda module, given, result: parts.__setitem__(name, of(result) if isinstance(result, Tensor) else result)


def _keep_given(parts: dict[str, Tensor]) -> Any:
    return lambda module, given: parts.__setitem__("mixed", given[0])


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

    def attended(self, module: nn.Module, used: tuple[Tensor, Tensor, Tensor], out: Tensor, options: set[str]) -> None:
        """What attention took and gave (B, T, H, D), and the names of what else it was given."""
        self.used[module], self.joined[module] = used, out.flatten(2)
        self.options |= options

    def finish(self, module: nn.Module, output: Tensor, parts: dict[str, Tensor]) -> None:
        """What an attention module gave at last."""
        self.outputs[module], self.parts[module] = output, dict(parts)

    def query_source(self, module: nn.Module) -> Source | None:
        """At the first token rotary positions turn nothing: what equals the query there, and ran last, is the query
        before they do.
        """
        query = self.used[module][0].transpose(1, 2)  # (B, T, H, D)
        # what runs twice, such as one norm for queries and keys, tells too little
        ran = [part for part, _, _ in self.results[module]]
        once = [(part, result) for part, _, result in self.results[module] if ran.count(part) == 1]
        found: list[tuple[nn.Module | None, Any]] = [(None, self.parts[module].get("q")), *once]
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
                    return Source(part, heads_first, factor)
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
        k, v = (self.parts[module].get(name) for name in "kv")
        if k is None or v is None or k.numel() != key.numel() or v.numel() != value.numel():
            return False
        k, v = k.reshape(key.transpose(1, 2).shape), v.reshape(value.transpose(1, 2).shape)
        return _near(k[:, 0], key[:, :, 0], key.dtype) and _near(v, value.transpose(1, 2), value.dtype)


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    return bool((one.float() - other.float()).norm() <= 0.3 * tolerance(dtype) * other.float().norm())


def _plan(model: Any) -> Plan:
    """How a model is read; one of transformers is tried first, once for each implementation of attention.

    Raises UserError for a model whose attention cannot be read, or is not what it is read as.
    """
    parts = anatomy(model)
    name = "" if is_ours(model) else implementation(model)
    if name not in parts.tried:
        parts.tried[name] = _planned(parts.layers) if is_ours(model) else _try(model)
    return parts.tried[name]


def _planned(layers: Sequence[Layer]) -> Plan:
    """Of our decoder: as it is written."""
    plan = Plan([], keys=True)
    for layer in layers:
        assert layer.attention is not None and layer.query is not None and layer.output is not None
        plan.modules.append(layer.attention)
        plan.queries[layer.attention] = Source(layer.query_norm or layer.query.module)
        plan.projects[layer.attention] = layer.output.module
    return plan


def _trial(model: Any) -> tuple[_Trial, AttentionTrace, Plan]:
    """Reads a few dozen tokens, which cross the model's windows, and compares with what the model itself gives for
    them.

    Raises UserError for a model that does not go through transformers' attention interface, or attends otherwise than
    is read.
    """
    kind, found = type(model).__name__, Plan(attention_modules(model))
    config = model.config.get_text_config(decoder=True)
    _, length = trial_lengths(config, anatomy(model).max_positions)
    tokens = trial_tokens(config, model.get_input_embeddings().weight.shape[0], 2, length).to(model.device)
    positions, trial = torch.tensor([[length - 1, length // 2], [length - 2, 0]]), _Trial()
    trace = AttentionTrace(positions, relax=True)
    with torch.no_grad(), shortened_windows(model):
        plain = model(tokens, use_cache=False).logits
        with _reading(model, trace, found, trial):
            traced = model(tokens, use_cache=False).logits
    given = f" (it takes {', '.join(sorted(trial.options))})" if trial.options else ""
    complete = len(trace.logits) == len(trace.outputs) == len(found.modules)
    if max(map(apart, traced, plain)) > tolerance(plain.dtype) or not complete:
        raise UserError(
            f"the attention of {kind} cannot be read: with it read, the model gives other predictions{given}"
        )
    return trial, trace, found


def check_attention(model: Any) -> None:
    """Raises UserError for a model whose attention is not, or not only, softmax over what its masks show."""
    _trial(model)


def _try(model: Any) -> Plan:
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
    attending = [layer.attention for layer in anatomy(model).layers if layer.attention is not None]
    found.keys = attending == modules and all(map(trial.projected_keys, dict.fromkeys(modules)))
    left_out = [] if found.keys else ["the similarity of weight updates (keys or values are not plain projections)"]
    if len(found.projects) < len(set(modules)):
        left_out.append("outputs without softmax (more than a projection follows attention)")
    if left_out:
        _log.warning("%s: left out of the analysis: %s", kind, "; ".join(left_out))
    return found
