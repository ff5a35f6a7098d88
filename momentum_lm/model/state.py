"""What a decoder remembers of a prefix, so that later calls go on where it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerCache:
    """One layer's past: keys and values (B, H, S, D), keys already rotated, and the states of its filters by their
    places. ``frozen``: nothing is added.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    filters: dict[str, Tensor] = field(default_factory=dict)
    frozen: bool = False


@dataclass
class Cache:
    """What a decoder remembers of a prefix: keys, values and filter states per layer, which keys are padding, and each
    row's next position. ``embedding``: the state of a filter there, and nothing else.
    """

    layers: list[LayerCache]
    embedding: LayerCache = field(default_factory=LayerCache)
    length: int = 0
    padding: Tensor | None = None  # (B, S) True at padding; None when there is none
    positions: Tensor | None = None  # (B,) number of real tokens so far
    frozen: bool = False  # only ever read: the tokens of a call follow it, and are forgotten

    def select(self, index: Tensor) -> None:
        """Replaces row b by row ``index[b]`` (beam search), in place. The number of rows may change."""
        self._map(lambda tensor: tensor.index_select(0, index))

    def rows(self, count: int, frozen: bool = False) -> Cache:
        """A new cache for ``count`` rows that share this one-row prefix, without copying it. This one stays as it is.

        ``frozen``: the new one is only read. No layer then keeps its rows' keys and values, and rows may be padded on
        the right.
        """
        one, *layers = (LayerCache(c.keys, c.values, dict(c.filters), frozen) for c in (self.embedding, *self.layers))
        copy = Cache(layers, one, self.length, self.padding, self.positions, frozen)
        copy._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))
        return copy

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for layer in (self.embedding, *self.layers):
            layer.keys, layer.values = (None if t is None else fn(t) for t in (layer.keys, layer.values))
            layer.filters = {place: fn(state) for place, state in layer.filters.items()}
        self.padding = None if self.padding is None else fn(self.padding)
        self.positions = None if self.positions is None else fn(self.positions)
