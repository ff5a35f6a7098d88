"""Causal filters: what an average over the tokens before is to the decoder, at which places it stands, and how to add
one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import BUILT_IN_FILTERS, FILTER_KINDS, DecoderConfig
from .marks import no_matrices, no_weight_decay
from .precision import Float32, autocast_dtype
from .state import LayerCache

_Kind = TypeVar("_Kind", bound="type[MomentumFilter]")
_KINDS: dict[str, type[MomentumFilter]] = {}


def register_filter(name: str) -> Callable[[_Kind], _Kind]:
    """Makes a subclass of :class:`WindowFilter` or :class:`MomentumFilter` a ``--momentum-kind`` of this name.

    Raises ValueError for a name that is no Python identifier, or is another kind's, and TypeError for another class.
    """

    def register(kind: _Kind) -> _Kind:
        if not isinstance(kind, type) or not issubclass(kind, MomentumFilter):
            raise TypeError(f"{kind!r} is no subclass of MomentumFilter")
        if kind.__module__.startswith("transformers_modules."):
            return kind  # the code of an exported model, which finds its class itself
        before = _KINDS.get(name)
        again = before is not None and (before.__module__, before.__qualname__) == (kind.__module__, kind.__qualname__)
        if not name.isidentifier() or name == "none" or not (before is None or again):
            raise ValueError(f"{name!r}: must be a Python identifier that is not the name of another kind of momentum")
        _KINDS[name] = kind
        if name not in FILTER_KINDS:
            FILTER_KINDS.append(name)
        return kind

    return register


def filter_class(config: DecoderConfig) -> type[MomentumFilter]:
    """The class of the configuration's kind of momentum."""
    return _KINDS[config.momentum_kind]


def own_source(config: DecoderConfig) -> str | None:
    """The file with the class of a kind of momentum that is none of ours; None of ours, or without a file."""
    if config.momentum_kind in BUILT_IN_FILTERS:
        return None
    try:
        return inspect.getsourcefile(filter_class(config))
    except TypeError:  # typed into an interpreter
        return None


def make_filter(config: DecoderConfig, place: str) -> MomentumFilter | None:
    """The filter at one of :data:`.config.PLACES`, of one layer; None where the configuration has none there.

    Values, keys and queries have heads; other places are divided into as many groups as there are attention heads, each
    with a decay and a gate of its own, or are one group where that does not divide them.
    """
    if place not in config.places:
        return None
    made = filter_class(config).make(config, place, *heads_at(config, place))
    return no_weight_decay(made, *(name for name, _ in made.named_parameters()))


def heads_at(config: DecoderConfig, place: str) -> tuple[int, int]:
    """The heads, or groups of channels, of what is filtered at a place, and the channels of each."""
    if place in ("output", "values", "keys"):
        return config.kv_heads, config.head_dim
    if place in ("queries", "depth"):
        return config.heads, config.head_dim
    width = config.ffn_dim if place == "ffn_hidden" else config.dim
    groups = config.heads if width % config.heads == 0 else 1
    return groups, width // groups


def filter_names(decoder: nn.Module) -> list[str]:
    """The names of a decoder's filters: ``layers.0.self_attn.momentum``, ``momentum_embedding`` and the like."""
    return [name for name, module in decoder.named_modules() if isinstance(module, MomentumFilter)]


def remove_filters(decoder: nn.Module, names: Iterable[str]) -> None:
    """Takes the filters of these names out of a decoder, which then computes what it would without them."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(parent), attribute, None)


def is_of_filter(name: str) -> bool:
    """Whether a parameter of this name, in a decoder or in a checkpoint of one, belongs to a filter."""
    return re.search(r"(^|\.)momentum(_[a-z]+)*\.", name) is not None


class Around(NamedTuple):
    """What stands around the tokens that are filtered: see :meth:`MomentumFilter.forward`."""

    segment_ids: Tensor | None = None
    padding: Tensor | None = None
    cache: LayerCache | None = None

    def filtered(self, place: str, module: Any, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """x (B, G, T, D) -> its filter plus ``addend`` (None: ``x`` itself), whose state goes on in the cache."""
        state = None if self.cache is None else self.cache.filters.get(place)
        out, state = module(x, state, self.segment_ids, self.padding, x if addend is None else addend)
        if self.cache is not None and not self.cache.frozen and state is not None:
            self.cache.filters[place] = state
        return out

    def wide(self, place: str, module: Any, x: Tensor) -> Tensor:
        """x (B, T, C) plus its filter, if there is one, in groups of channels."""
        if module is None:
            return x
        grouped = x.unflatten(-1, (module.groups(), -1)).transpose(1, 2)
        return self.filtered(place, module, grouped).transpose(1, 2).flatten(2)


def added(filtered: Tensor, addend: Tensor | None) -> Tensor:
    """filtered (B, G, T, D) plus addend (B, H, T, D), each of the H heads that of its group."""
    if addend is None:
        return filtered
    groups = filtered.shape[1]
    if addend.shape[1] == groups:
        return filtered + addend
    return (filtered[:, :, None] + addend.unflatten(1, (groups, -1))).flatten(1, 2)


class MomentumFilter(Float32):
    """What all kinds share: parameters in fp32, and what they take from a checkpoint.

    A kind of one's own is better a :class:`WindowFilter`, which leaves the past, padding, packed documents and caches
    to this module. One whose past has no end is a subclass of this class: ``forward``, ``groups`` and ``make``.
    """

    gate: nn.Parameter | None
    additive = True  # what it gives does not depend on what it is added to

    def __init__(self) -> None:
        super().__init__()
        no_matrices(self)

    @classmethod
    def make(cls, config: DecoderConfig, place: str, heads: int, size: int) -> MomentumFilter:
        """The filter of ``heads`` heads, or groups of channels, of ``size`` channels each, at a place."""
        raise NotImplementedError

    def groups(self) -> int:
        """Into how many groups the filter divides channels without heads."""
        raise NotImplementedError

    def forward(
        self,
        values: Tensor,
        state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """values (B, G, T, D) -> (what is filtered, plus ``addend`` (B, H, T, D) if given, whose heads are G groups;
        state after the last token, (B, ...)). A class that does something else with the addend says ``additive =
        False``, and is not exported.

        state: that of the tokens before, None at the beginning. segment_ids: (B, T), a number of its own for each
        document of a packed row. padding: (B, T) True at padding on the left, which is neither seen nor any time.
        """
        raise NotImplementedError

    def logged(self) -> dict[str, Tensor]:
        """What to log of the filter, by name, (n,) each."""
        return {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict(prefix=prefix)
        if getattr(self, "gate", None) is not None and not any(name in state_dict for name in own):
            state_dict.update(own)  # a model that was trained without momentum, which a gate of 0 leaves as it is
        for name in ("fixed_log_decay", "normalized"):  # checkpoints had them once; a model goes by its options
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FiniteFilter(MomentumFilter):
    """A filter that sees a token and the K before it: its state is those K, (B, G, K, D), zeros before the first."""

    def taps(self) -> int:
        """How many tokens it goes back, K."""
        raise NotImplementedError

    def after(
        self, values: Tensor, state: Tensor | None, segment_ids: Tensor | None, addend: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, values (B, G, T, D) where there is no padding."""
        raise NotImplementedError

    def forward(
        self,
        values: Tensor,
        state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        padding: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if padding is None:
            return self.after(values, state, segment_ids, addend)
        # the real tokens of each row come together, after its state: padding goes to the end, and back
        order = padding.long().argsort(dim=1, stable=True)  # (B, T)
        moved = _taken(values.masked_fill(padding[:, None, :, None], 0.0), order)
        documents = None if segment_ids is None else segment_ids.gather(1, order)
        out, _ = self.after(moved, state, documents, None)
        before = F.pad(moved, (0, 0, self.taps(), 0))[:, :, : self.taps()] if state is None else state
        seen = torch.cat([before.to(values.dtype), moved], 2)  # of which each row's last K real ones are left
        last = torch.arange(self.taps(), device=values.device) + (~padding).sum(1)[:, None]
        return added(_taken(out, order.argsort(dim=1)), addend), _taken(seen, last)


class WindowFilter(FiniteFilter):
    """A filter of one's own: :meth:`window` is all there is to write.

    ``--momentum-taps`` is K, and ``--momentum-gate zero`` a factor per head that starts at 0. A subclass with
    parameters calls this ``__init__`` first: heads and channels of each, and the configuration that it may read.
    """

    def __init__(self, heads: int, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.size, self.config = heads, size, config
        self.gate = nn.Parameter(torch.zeros(heads)) if config.momentum_gate == "zero" else None

    @classmethod
    def make(cls, config: DecoderConfig, place: str, heads: int, size: int) -> MomentumFilter:
        return cls(heads, size, config)

    def window(self, x: Tensor) -> Tensor:
        """x (B, G, T, K + 1, D), each token last, after the K before it, zeros before the first of its document -> what
        is added at each token, (B, G, T, D).
        """
        raise NotImplementedError

    def groups(self) -> int:
        return self.heads

    def taps(self) -> int:
        return self.config.momentum_taps

    def after(
        self, values: Tensor, state: Tensor | None, segment_ids: Tensor | None, addend: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        taps = self.taps()
        past = F.pad(values, (0, 0, taps, 0)) if state is None else torch.cat([state.to(values.dtype), values], 2)
        windows = past.unfold(2, taps + 1, 1).transpose(-1, -2)
        if segment_ids is not None:
            documents = F.pad(segment_ids, (taps, 0), value=-1).unfold(1, taps + 1, 1)  # (B, T, K + 1)
            windows = windows.masked_fill((documents != documents[..., -1:])[:, None, ..., None], 0.0)
        if autocast_dtype(values.device) is None and values.dtype != torch.float64:
            windows = windows.float()  # as its parameters are
        out = self.window(windows)
        if self.gate is not None:
            out = out * self.gate[:, None, None]
        return added(out.to(values.dtype), addend), past[:, :, past.shape[2] - taps :]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x (B, G, T, D), index (B, n) -> (B, G, n, D), token ``index[b, i]`` of row b."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
