"""The decoder's options, in one table: one field of :class:`DecoderConfig` each.

All that knows options reads them here: the flags of fairseq's commands and of ``momentum-lm plan``, the options of
checkpoints (``formats/decoder_options.py``), Hugging Face configurations, and the checks. To add an option, add its
line here, what it computes, and a test.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from momentum_lm.errors import Argument, UserError, arg

# The paper gives no decay. This one had the lowest validation perplexity in examples/momentum_vs_vanilla.
DEFAULT_ETA = 0.3
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
    choices, least, most: what values there are. problem: how to say so, where "must be at least 1" would not do.
    """

    help: str
    fairseq: str
    opposite: bool
    stock: Any
    zero: Callable[[DecoderConfig], int] | None
    choices: tuple[str, ...]
    least: float | None
    most: float | None
    problem: str

    def check(self, name: str, kind: Any, value: Any) -> None:
        """Raises UserError for a value of field ``name``, of type ``kind``, that cannot be."""
        types, what = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise UserError(Argument(name, value), f": must be {what}")
        if self.choices and value not in self.choices:
            raise UserError(Argument(name, value), f": must be one of {', '.join(self.choices)}")
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
    entry = Option(help, fairseq, opposite, stock, zero, tuple(choices), least, most, problem)
    return field(default=default, metadata={"option": entry})


def _share(help: str, fairseq: str, stock: float = 0.0) -> Any:
    return option(help, 0.0, fairseq, stock=stock, least=0, most=1, problem="a probability, from 0 to 1")


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and choices of a :class:`Decoder`. Raises UserError, naming the fields, for values that cannot be."""

    vocab_size: int = option("entries of the dictionary")
    dim: int = option("width", fairseq="decoder_embed_dim", stock=512, least=1, most=1 << 20)
    ffn_dim: int = option(
        "width of the feed-forward layers; 0: four times the width",
        fairseq="decoder_ffn_embed_dim", stock=0, zero=lambda config: 4 * config.dim, least=1, most=1 << 24,
    )  # fmt: skip
    layers: int = option("number of layers", fairseq="decoder_layers", stock=6, least=1, most=10_000)
    heads: int = option("number of attention heads", fairseq="decoder_attention_heads", stock=8, least=1, most=1 << 20)
    max_positions: int = option("longest input, in tokens", 1024, "max_target_positions", least=1, most=1 << 40)
    padding_idx: int = option("id of padding", 1)
    eos_idx: int = option("id of the end-of-sentence token", 2)
    position: str = option("position embedding", "sinusoidal", "position", choices=("sinusoidal", "learned", "rotary"))
    activation: str = option(
        "activation of the feed-forward layers; gelu_accurate is the tanh approximation",
        "gelu", "activation_fn", stock="relu", choices=("gelu", "gelu_accurate", "relu"),
    )  # fmt: skip
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
        "momentum attention: ema, the paper's formula with one decay per head; multi_ema, eight decays per channel",
        "none", "momentum_kind", choices=("none", "ema", "multi_ema"),
    )  # fmt: skip
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

    def __post_init__(self) -> None:
        for name, kind, entry in options():
            value = getattr(self, name)
            if entry.zero is not None and value == 0 and not isinstance(value, bool):
                value = entry.zero(self)
                object.__setattr__(self, name, value)
            entry.check(name, kind, value)
        if self.momentum_kind != "ema":
            for name in ("momentum_learned", "momentum_normalize"):
                if getattr(self, name):
                    needed, kind = arg(momentum_kind="ema"), self.momentum_kind
                    raise UserError(Argument(name, True), " needs ", needed, f", not {kind}")
        if self.momentum_kind == "none" and self.momentum_gate != "none":
            raise UserError(arg(momentum_gate=self.momentum_gate), " needs ", arg("momentum_kind"), " ema or multi_ema")
        if self.vocab_size <= max(self.padding_idx, self.eos_idx):
            raise UserError(f"a dictionary of {self.vocab_size} entries lacks the special symbols")
        if self.dim % self.heads:
            raise UserError(arg(dim=self.dim), " is not a multiple of ", arg(heads=self.heads))
        if self.position == "rotary" and self.dim // self.heads % 2:
            problem = f" needs an even head size, and {self.dim} / {self.heads} is {self.dim // self.heads}"
            raise UserError(arg(position=self.position), problem)
        if self.position == "sinusoidal" and self.dim < 4:
            raise UserError(arg(position=self.position), " needs a width of at least 4, not ", arg(dim=self.dim))
        if not all(isinstance(token, int) and 0 <= token < self.vocab_size for token in self.absent_tokens):
            ids = f": the dictionary's ids are 0 to {self.vocab_size - 1}"
            raise UserError(arg(absent_tokens=self.absent_tokens), ids)


@cache
def options() -> tuple[tuple[str, Any, Option], ...]:
    """The table: name, type and entry of each field."""
    types: Mapping[str, Any] = get_type_hints(DecoderConfig)
    return tuple((f.name, types[f.name], f.metadata["option"]) for f in dataclasses.fields(DecoderConfig))


def default(name: str) -> Any:
    """The default of a field."""
    return DecoderConfig.__dataclass_fields__[name].default
