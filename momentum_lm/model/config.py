"""The decoder's options, in one table: one field of :class:`DecoderConfig` each.

All that knows options reads them here: the flags of fairseq's commands and of ``momentum-lm plan``, the options of
checkpoints (``formats/decoder_options.py``), Hugging Face configurations, and the checks. To add an option, add its
line here, what it computes, and a test.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from momentum_lm.errors import Argument, UserError, arg

# The paper gives no decay. This one had the lowest validation perplexity in examples/momentum_vs_vanilla.
DEFAULT_ETA = 0.3
# Where a causal filter may stand (DecoderConfig.momentum_at); docs/training.md says whose each is.
PLACES = ("output", "values", "keys", "queries", "input", "ffn", "ffn_hidden", "embedding", "depth")
# Kinds of causal filters (DecoderConfig.momentum_kind); filters.register_filter adds others to the list
BUILT_IN_FILTERS = ("none", "ema", "multi_ema", "fir")
FILTER_KINDS = [*BUILT_IN_FILTERS]
KINDS: dict[Any, tuple[Any, str]] = {  # what a field of each type may hold
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a word"),
    tuple[int, ...]: (tuple, "a tuple of whole numbers"),
}


@dataclass(frozen=True)
class Option:
    """What the table says of a field besides its type and its default.

    fairseq: its name among the options of a fairseq model; the flag is the same with hyphens. Empty: it has none.
    opposite: fairseq's option says the opposite, as ``untie_embeddings`` of ``tie_embeddings``.
    stock: its value where a checkpoint of fairseq does not mention it; None: the field's default.
    zero: what a value of 0 stands for, given the configuration.
    choices, least, most: what values there are; choices in a list may grow. problem: how to say so, where "must be at
    least 1" would not do.
    """

    help: str
    fairseq: str
    opposite: bool
    stock: Any
    zero: Callable[[DecoderConfig], int] | None
    choices: Sequence[str]
    least: float | None
    most: float | None
    problem: str

    @property
    def open(self) -> bool:
        """Whether there may be other choices later."""
        return isinstance(self.choices, list)

    def check(self, name: str, kind: Any, value: Any) -> None:
        """Raises UserError for a value of field ``name``, of type ``kind``, that cannot be."""
        types, what = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise UserError(Argument(name, value), f": must be {what}")
        if self.choices and value not in self.choices:
            more = "; one of your own comes with its module (of a command: --user-dir DIR)" if self.open else ""
            raise UserError(Argument(name, value), f": must be one of {', '.join(self.choices)}{more}")
        if self.least is not None and not value >= self.least:
            raise UserError(Argument(name, value), f": must be {self.problem or f'at least {self.least:,}'}")
        if self.most is not None and not value <= self.most:
            raise UserError(Argument(name, value), f": must be {self.problem or f'at most {self.most:,}'}")


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    fairseq: str = "",
    opposite: bool = False,
    stock: Any = None,
    zero: Callable[[DecoderConfig], int] | None = None,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    problem: str = "",
) -> Any:
    """A field of the table; the arguments are those of :class:`Option`."""
    entry = Option(help, fairseq, opposite, stock, zero, choices, least, most, problem)
    return field(default=default, metadata={"option": entry})


def _share(help: str, fairseq: str, stock: float = 0.0) -> Any:
    return option(help, 0.0, fairseq, stock=stock, least=0, most=1, problem="a probability, from 0 to 1")


class RotaryScaling(NamedTuple):
    """How published Llama 3 models stretch rotary positions beyond the length that they were pretrained with.

    Wavelengths above ``original / low`` tokens become ``factor`` times as long, those below ``original / high`` stay,
    and frequencies between are mixed. Source: the ``rope_scaling`` of Llama 3.1's and 3.2's config.json.
    """

    factor: float
    low: float
    high: float
    original: int

    def __str__(self) -> str:
        return f"llama3:{','.join(f'{value:.15g}' for value in self)}"

    def rope_scaling(self) -> dict[str, Any]:
        """The entry of a config.json."""
        return {"rope_type": "llama3", **dict(zip(_SCALING, self, strict=True))}

    @classmethod
    def parse(cls, text: str) -> RotaryScaling | None:
        """``none``, ``llama3:FACTOR,LOW,HIGH,ORIGINAL`` or the JSON object of a config.json. Raises UserError for
        another.
        """
        if text == "none":
            return None
        try:
            if text.startswith("{"):
                given = json.loads(text)
                kind = given.get("rope_type", given.get("type"))
                if kind == "default":
                    return None
                values = [given[name] for name in _SCALING] if kind == "llama3" else []
            else:
                kind, _, numbers_ = text.partition(":")
                values = numbers_.split(",") if kind == "llama3" else []
            factor, low, high, original = map(float, values)
            scaling = cls(factor, low, high, int(original))
            if not (1 <= scaling.factor < 1e6 and 0 < scaling.low < scaling.high < 1e6):
                raise ValueError
            if not 1 <= scaling.original < 1 << 40:
                raise ValueError
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            problem = ": must be none, or llama3:FACTOR,LOW,HIGH,ORIGINAL such as llama3:32,1,4,8192"
            raise UserError(arg(rotary_scaling=text), problem) from error
        return scaling


_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # in a config.json


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and choices of a :class:`Decoder`. Raises UserError, naming the fields, for values that cannot be."""

    vocab_size: int = option("entries of the dictionary")
    dim: int = option("width", fairseq="decoder_embed_dim", stock=512, least=1, most=1 << 20)
    ffn_dim: int = option(
        "width of the feed-forward layers; 0: four times the width, gated two thirds of that in whole 64s",
        fairseq="decoder_ffn_embed_dim", stock=0, zero=lambda config: config.usual_ffn_dim, least=1, most=1 << 24,
    )  # fmt: skip
    layers: int = option("number of layers", fairseq="decoder_layers", stock=6, least=1, most=10_000)
    heads: int = option("number of attention heads", fairseq="decoder_attention_heads", stock=8, least=1, most=1 << 20)
    max_positions: int = option("longest input, in tokens", 1024, "max_target_positions", least=1, most=1 << 40)
    padding_idx: int = option("id of padding", 1)
    eos_idx: int = option("id of the end-of-sentence token", 2)
    position: str = option(
        "position embedding", "sinusoidal", "position", choices=("sinusoidal", "learned", "rotary", "none")
    )
    rotary_base: float = option(
        "base of the wavelengths of rotary positions", 10000.0, "rotary_base", least=1 + 2**-20, most=1e15
    )
    rotary_fraction: float = option(
        "share of each head's dimensions, the first ones, that rotary positions turn",
        1.0, "rotary_fraction", least=2**-20, most=1, problem="more than 0 and at most 1",
    )  # fmt: skip
    rotary_scaling: str = option(
        "longer wavelengths of rotary positions, as published Llama 3 models have them: "
        "llama3:FACTOR,LOW,HIGH,ORIGINAL, such as llama3:32,1,4,8192, or rope_scaling as in their config.json",
        "none", "rotary_scaling",
    )  # fmt: skip
    norm: str = option(
        "layer: LayerNorm; rms: RMSNorm, without a bias", "layer", "norm", choices=("layer", "rms")
    )  # fmt: skip
    norm_eps: float = option("what norms add to the variance", 1e-5, "norm_eps", least=1e-12, most=1)
    ffn: str = option(
        "feed-forward layers; gated: with a second matrix, whose output goes through the activation and is a factor "
        "(SwiGLU with silu)",
        "plain", "ffn", choices=("plain", "gated"),
    )  # fmt: skip
    activation: str = option(
        "activation of the feed-forward layers; gelu_accurate is the tanh approximation",
        "gelu", "activation_fn", stock="relu", choices=("gelu", "gelu_accurate", "relu", "silu"),
    )  # fmt: skip
    kv_heads: int = option(
        "number of heads of keys and values, each shared by as many query heads; 0: as many as attention heads",
        0, "decoder_kv_heads", zero=lambda config: config.heads, least=1, most=1 << 20,
    )  # fmt: skip
    head_dim: int = option(
        "width of one attention head; 0: the width divided by the number of heads",
        0, "decoder_head_dim", zero=lambda config: config.dim // config.heads, least=1, most=1 << 20,
    )  # fmt: skip
    bias: str = option(
        "which projections have biases: all, those to queries, keys and values, or none",
        "all", "bias", choices=("all", "qkv", "none"),
    )  # fmt: skip
    qk_norm: bool = option("normalise each head's queries and keys before positions turn them", False, "qk_norm")
    parallel_residual: bool = option(
        "attention and feed-forward layers side by side, both of the block's input", False, "parallel_residual"
    )
    tie_embeddings: bool = option("output projection with weights of its own", True, "untie_embeddings", opposite=True)
    scale_embeddings: bool = option(
        "do not multiply embeddings by the square root of the width", True, "no_scale_embedding", opposite=True
    )
    dropout: float = _share("dropout probability", "dropout", stock=0.1)
    attention_dropout: float = _share("dropout probability of attention weights", "attention_dropout")
    activation_dropout: float = _share(
        "dropout probability after the activation in the feed-forward layers", "activation_dropout"
    )
    checkpoint_activations: bool = option(
        "recompute activations in the backward pass: less memory, a third more time", False, "checkpoint_activations"
    )
    momentum_kind: str = option(
        "momentum attention: ema, the paper's formula with one decay per head; multi_ema, eight decays per channel; "
        "fir, a learned weight per channel for each of the last few tokens",
        "none", "momentum_kind", choices=FILTER_KINDS,
    )  # fmt: skip
    momentum_at: str = option(
        "where the filter is applied, with commas between: output, of attention, from its values, as in the paper; "
        "values, keys, queries: to what the projections give; input: to what they take; ffn, ffn_hidden: to the input "
        "and the hidden layer of the feed-forward layer; embedding; depth: across layers, not tokens (ema)",
        "output", "momentum_at",
    )  # fmt: skip
    momentum_taps: int = option("fir: how many tokens it goes back", 3, "momentum_taps", least=1, most=1024)
    momentum_current: bool = option("fir: a weight, at first 0, for the current token too", False, "momentum_current")
    momentum_eta: float = option(
        "decay of the moving average of values, between 0 and 1", DEFAULT_ETA, "momentum_eta", least=5e-324,
        most=1 - 2**-53, problem=f"strictly between 0 and 1, such as {DEFAULT_ETA}",
    )  # fmt: skip
    momentum_learned: bool = option("learn one decay per head, from the given one", False, "momentum_learned")
    momentum_normalize: bool = option(
        "scale the moving average so that its weights sum to 1", False, "momentum_normalize"
    )
    momentum_gate: str = option(
        "zero: a learned factor per head that starts at 0, to add momentum to a trained model",
        "none", "momentum_gate", choices=("none", "zero"),
    )  # fmt: skip
    absent_tokens: tuple[int, ...] = option(
        "ids of tokens that are never predicted, with commas between, as the configuration of a converted model has",
        (), "absent_tokens",
    )  # fmt: skip

    @property
    def usual_ffn_dim(self) -> int:
        """The width of the feed-forward layers where none is given: gated ones then have about as many parameters."""
        return 4 * self.dim if self.ffn == "plain" else -(-8 * self.dim // (3 * 64)) * 64

    def __post_init__(self) -> None:
        divided = self.head_dim == 0
        for name, kind, entry in options():
            value = getattr(self, name)
            if entry.zero is not None and value == 0 and not isinstance(value, bool):
                value = entry.zero(self)
                object.__setattr__(self, name, value)
            entry.check(name, kind, value)
        self._check_momentum()
        if self.vocab_size <= max(self.padding_idx, self.eos_idx):
            raise UserError(f"a dictionary of {self.vocab_size} entries lacks the special symbols")
        if divided and self.dim % self.heads:
            raise UserError(arg(dim=self.dim), " is not a multiple of ", arg(heads=self.heads))
        if self.heads % self.kv_heads:
            raise UserError(arg(heads=self.heads), " is not a multiple of ", arg(kv_heads=self.kv_heads))
        self._check_positions(divided)
        if not all(isinstance(token, int) and 0 <= token < self.vocab_size for token in self.absent_tokens):
            ids = f": the dictionary's ids are 0 to {self.vocab_size - 1}"
            raise UserError(arg(absent_tokens=self.absent_tokens), ids)

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head rotary positions turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def places(self) -> tuple[str, ...]:
        """Where there is momentum."""
        return () if self.momentum_kind == "none" else tuple(self.momentum_at.split(","))

    def _check_momentum(self) -> None:
        kind = self.momentum_kind
        of_kind = {
            "momentum_learned": "ema",
            "momentum_normalize": "ema",
            "momentum_taps": "fir",
            "momentum_current": "fir",
        }
        for name, needed in of_kind.items():
            if kind in BUILT_IN_FILTERS and kind != needed and getattr(self, name) != default(name):
                raise UserError(
                    Argument(name, getattr(self, name)), " needs ", arg(momentum_kind=needed), f", not {kind}"
                )
        for name in ("momentum_gate", "momentum_at"):
            if kind == "none" and getattr(self, name) != default(name):
                raise UserError(
                    Argument(name, getattr(self, name)), " needs ", arg("momentum_kind"), " ema, multi_ema or fir"
                )
        given = [place.strip() for place in self.momentum_at.split(",")]
        if unknown := [place for place in given if place not in PLACES]:
            problem = f": {unknown[0]!r} is none of {', '.join(PLACES)}"
            raise UserError(arg(momentum_at=self.momentum_at), problem)
        if "depth" in given and kind != "ema":
            problem = f": depth is an average over layers, which needs momentum_kind ema, not {kind}"
            raise UserError(arg(momentum_at=self.momentum_at), problem)
        object.__setattr__(self, "momentum_at", ",".join(place for place in PLACES if place in given))

    def _check_positions(self, divided: bool) -> None:
        if self.position == "sinusoidal" and self.dim < 4:
            raise UserError(arg(position=self.position), " needs a width of at least 4, not ", arg(dim=self.dim))
        scaling = RotaryScaling.parse(self.rotary_scaling)
        object.__setattr__(self, "rotary_scaling", "none" if scaling is None else str(scaling))
        if self.position != "rotary":
            for name in ("rotary_base", "rotary_fraction", "rotary_scaling"):
                if getattr(self, name) != default(name):
                    needed = arg(position="rotary")
                    raise UserError(Argument(name, getattr(self, name)), " needs ", needed, f", not {self.position}")
        elif self.rotary_dim % 2 or not self.rotary_dim:
            size = f"{self.dim} / {self.heads} is {self.head_dim}" if divided else f"it is {self.head_dim}"
            share = "" if self.rotary_fraction == 1 else f", of which {self.rotary_fraction:g} is {self.rotary_dim}"
            raise UserError(arg(position=self.position), f" needs an even head size, and {size}{share}")


@cache
def options() -> tuple[tuple[str, Any, Option], ...]:
    """The table: name, type and entry of each field."""
    types: Mapping[str, Any] = get_type_hints(DecoderConfig)
    return tuple((f.name, types[f.name], f.metadata["option"]) for f in dataclasses.fields(DecoderConfig))


def default(name: str) -> Any:
    """The default of a field."""
    return DecoderConfig.__dataclass_fields__[name].default


# what the first records said of an architecture; options that came later are in records only where they say something
_ALWAYS = {
    *("vocab_size", "dim", "ffn_dim", "layers", "heads", "max_positions", "padding_idx", "eos_idx", "absent_tokens"),
    *("position", "activation", "tie_embeddings", "scale_embeddings", "checkpoint_activations"),
    *("dropout", "attention_dropout", "activation_dropout"),
    *("momentum_kind", "momentum_eta", "momentum_learned", "momentum_normalize", "momentum_gate"),
}


def recorded(config: DecoderConfig) -> dict[str, Any]:
    """What results and TensorBoard say of a decoder's options. Records made before an option was there still are of the
    same model."""
    written = dataclasses.asdict(config)
    for name, _, entry in options():
        usual = entry.zero(config) if entry.zero is not None else default(name)
        if name not in _ALWAYS and written[name] == usual:
            del written[name]
    return written
