"""A decoder's configuration <-> the options of a fairseq model, ours or a stock ``transformer_lm``: ``cfg.model``.

What is ours follows from the table in ``model/config.py``. What follows here is stock's own.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from momentum_lm.errors import Argument, Names, UserError, arg, flags, in_python, named
from momentum_lm.model.config import KINDS, DecoderConfig, Option, default, options
from momentum_lm.model.sizes import FAMILIES, architecture

_LONGEST = 40  # characters of a number
_LONGEST_TEXT = 400  # of a word, such as rotary_scaling as JSON
# Stock options that would make another model: the value with which they do not, and what there is instead.
REFUSED: dict[str, tuple[Any, str, Argument | None]] = {
    "no_decoder_final_norm": (False, "this decoder has a norm after its last block", None),
    "adaptive_softmax_cutoff": (None, "this decoder has one softmax; to save its memory use ",
                                arg(criterion="chunked_cross_entropy")),
    "tie_adaptive_weights": (False, "this decoder has no adaptive softmax", None),
    "tie_adaptive_proj": (False, "this decoder has no adaptive softmax", None),
    "character_embeddings": (False, "this decoder embeds tokens, not their characters", None),
    "adaptive_input": (False, "this decoder has embeddings of one width", None),
    "layernorm_embedding": (False, "this decoder has no norm after its embedding", None),
    "offload_activations": (False, "this decoder keeps activations on the device; to save memory use ",
                            arg(checkpoint_activations=True)),
    "decoder_layerdrop": (0.0, "this decoder drops no layers", None),
    "decoder_layers_to_keep": (None, "this decoder drops no layers; for fewer use ", arg("decoder_layers")),
    "quant_noise_pq": (0.0, "this decoder has no quantization noise", None),
    "quant_noise_scalar": (0.0, "this decoder has no quantization noise", None),
    "base_layers": (0, "this decoder has no BASE layers", None),
    "moe_freq": (0, "this decoder has no mixture of experts", None),
    "scale_fc": (False, "this decoder has no NormFormer parts", None),
    "scale_attn": (False, "this decoder has no NormFormer parts", None),
    "scale_heads": (False, "this decoder has no NormFormer parts", None),
    "scale_resids": (False, "this decoder has no NormFormer parts", None),
    "decoder_xformers_att_config": (None, "this decoder's attention is torch's own", None),
}  # fmt: skip
# Stock options that say nothing of the model by themselves: they belong to one that is refused, or to fairscale.
WITHOUT_EFFECT = (
    *("adaptive_softmax_dropout", "adaptive_softmax_factor", "adaptive_input_factor", "adaptive_input_cutoff"),
    *("character_filters", "character_embedding_dim", "char_embedder_highway_layers", "quant_noise_pq_block_size"),
    *("base_sublayers", "base_shuffle", "min_params_to_wrap"),
)
# Stock options that mean what an option of ours means (see _translated).
TRANSLATED = (
    *("relu_dropout", "decoder_output_dim", "decoder_input_dim", "decoder_normalize_before"),
    *("share_decoder_input_output_embed", "decoder_learned_pos", "no_token_positional_embeddings"),
)
ACTIVATIONS = {"gelu_fast": "gelu_accurate"}  # older names of fairseq's


class Unsupported(UserError):
    """An option of fairseq's ``transformer_lm`` that the decoder does not have."""


def table() -> dict[str, tuple[str, Any, Option]]:
    """By the name of each of fairseq's options that the table has: its field there, the field's type and its entry."""
    return {entry.fairseq: (name, kind, entry) for name, kind, entry in options() if entry.fairseq}


def from_fairseq(
    cfg: Mapping[str, Any], vocab_size: int, padding_idx: int = 1, eos_idx: int = 2, names: Names = in_python
) -> DecoderConfig:
    """The configuration of a fairseq model, ours or a stock ``transformer_lm*``, from its ``cfg.model`` as a mapping.

    ``names``: what messages call an option, given its name in ``cfg``. Raises UserError for a value that cannot be, and
    Unsupported for a stock option that the decoder does not have.
    """
    with named(names):
        cfg = _translated(cfg)
        given = {field: _read(fairseq, kind, entry, cfg.get(fairseq), field)
                 for fairseq, (field, kind, entry) in table().items()}  # fmt: skip
        with named(_in_fairseq):
            return DecoderConfig(vocab_size=vocab_size, padding_idx=padding_idx, eos_idx=eos_idx, **given)


def to_fairseq(config: DecoderConfig) -> dict[str, Any]:
    """``cfg.model`` of a decoder, as :func:`from_fairseq` reads it."""
    written = {fairseq: _written(getattr(config, field), entry) for fairseq, (field, _, entry) in table().items()}
    return {**written, "tokens_per_sample": config.max_positions}


def defaults(arch: str) -> dict[str, Any]:
    """``cfg.model`` that an architecture begins with: 0 for what follows from other options, which a command gives."""
    return to_fairseq(DecoderConfig(vocab_size=8, **architecture(arch))) | dict.fromkeys(_following(arch), 0)


def _following(arch: str) -> dict[str, Callable[[DecoderConfig], int]]:
    """What stands for 0 in options that an architecture does not set."""
    given = architecture(arch)
    return {fairseq: e.zero for fairseq, (field, _, e) in table().items() if e.zero is not None and field not in given}


def _written(value: Any, entry: Option) -> Any:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return not value if entry.opposite else value


def _in_fairseq(argument: Argument) -> Argument:
    """A field of the configuration by fairseq's name for it."""
    entry = next((entry for name, _, entry in options() if name == argument.name), None)
    if entry is None or not entry.fairseq:
        return argument
    value = _written(argument.value, entry) if argument.has_value else argument.value
    return Argument(entry.fairseq, value)


def model_flags(argument: Argument) -> Argument | str:
    """A field of the configuration by the flag of fairseq's commands; :data:`momentum_lm.errors.Names`."""
    return flags()(_in_fairseq(argument))


def training_words(config: DecoderConfig, arch: str | None = None) -> list[str]:
    """The words of ``fairseq-train`` that build this decoder, from ``--arch`` on, but its length.

    ``arch``: the architecture; None: the registered one of this shape, or the nearest in number of parameters.
    """
    arch = arch or nearest(config)
    plain = to_fairseq(DecoderConfig(vocab_size=8, max_positions=config.max_positions, **architecture(arch)))
    plain |= {name: value(config) for name, value in _following(arch).items()}
    own = {name: value for name, value in to_fairseq(config).items() if value != plain[name]}
    words = (str(flags()(Argument(name, value))).split(" ", 1) for name, value in own.items())
    return ["--arch", arch, *itertools.chain.from_iterable(words)]


def nearest(config: DecoderConfig) -> str:
    """The registered architecture of this form and shape, or the one of the nearest number of parameters."""
    llama, momentum = config.norm == "rms", config.momentum_kind != "none"
    family = ("momentum_" if momentum else "") + ("llama_lm" if llama else "lm" if momentum else "gpt_lm")
    sizes = FAMILIES[family][0]
    shape = {"layers": config.layers, "dim": config.dim, "heads": config.heads}
    exact = [name for name, size in sizes.items() if shape.items() <= size.items()]
    distance = {
        name: abs(math.log(size["layers"] * size["dim"] ** 2 / (config.layers * config.dim**2)))
        for name, size in sizes.items()
    }
    return f"{family}_{exact[0] if exact else min(sizes, key=distance.__getitem__)}"


def _translated(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """``cfg`` with stock's options as ours. Raises Unsupported for those that the decoder does not have."""
    for name, (plain, problem, instead) in REFUSED.items():
        value = cfg.get(name)
        if value is not None and value != plain:
            raise Unsupported(Argument(name, value), f": {problem}", *([instead] if instead else []))
    stock = "position" not in cfg  # a checkpoint of fairseq's own model
    if cfg.get("decoder_normalize_before") is not None and not _flag(cfg, "decoder_normalize_before"):
        problem = ": the model normalises after each block, this decoder before"
        raise Unsupported(arg(decoder_normalize_before=False), problem)
    result = {"decoder_embed_dim": default_of("decoder_embed_dim"), **cfg}
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if cfg.get(name) is not None and str(cfg[name]) != str(result["decoder_embed_dim"]):
            width = arg(decoder_embed_dim=result["decoder_embed_dim"])
            problem = ": this decoder has no projection to another width than "
            raise Unsupported(Argument(name, cfg[name]), problem, width)
    shared = _flag(cfg, "share_decoder_input_output_embed")
    position = _stock_position(cfg)
    if stock:
        result |= {"untie_embeddings": not shared, "position": position[1] if position else "sinusoidal"}
    elif shared and cfg.get("untie_embeddings"):
        raise UserError(arg("share_decoder_input_output_embed"), " contradicts ", arg("untie_embeddings"))
    elif position and str(cfg["position"]) not in (position[1], default("position")):
        raise UserError(arg(position[0]), " contradicts ", arg(position=cfg["position"]))
    elif position:
        result["position"] = position[1]
    result["activation_dropout"] = cfg.get("activation_dropout") or cfg.get("relu_dropout")
    activation = str(cfg.get("activation_fn"))
    result["activation_fn"] = ACTIVATIONS.get(activation, cfg.get("activation_fn"))
    if result.get("max_target_positions") is None:
        result["max_target_positions"] = cfg.get("tokens_per_sample")
    return result


def _stock_position(cfg: Mapping[str, Any]) -> tuple[str, str] | None:
    """The stock option that says which positions there are, and which; None where none is set."""
    if _flag(cfg, "no_token_positional_embeddings"):
        return "no_token_positional_embeddings", "none"
    return ("decoder_learned_pos", "learned") if _flag(cfg, "decoder_learned_pos") else None


def default_of(fairseq: str) -> Any:
    """The value of an option that a checkpoint of fairseq does not mention."""
    field, _, entry = table()[fairseq]
    return default(field) if entry.stock is None else entry.stock


def _flag(cfg: Mapping[str, Any], name: str) -> bool:
    value = cfg.get(name)
    if value is not None and (not isinstance(value, (bool, int)) or value not in (0, 1)):
        raise UserError(Argument(name, value), f": must be {KINDS[bool][1]}")
    return bool(value)


def _read(fairseq: str, kind: Any, entry: Option, value: Any, field: str) -> Any:
    """The field's value by an option of fairseq's, which may be a number of another kind, or an Enum."""
    if kind is bool:
        return _flag({fairseq: value}, fairseq) != entry.opposite if value is not None else default(field)
    if value is None:
        return default(field) if entry.stock is None else entry.stock
    if kind is str:
        return _text(fairseq, value)
    if kind in (int, float):
        return _number(fairseq, kind, value)
    return _token_ids(fairseq, value)


def _text(name: str, value: Any) -> str:
    value = str(value) if isinstance(value, enum.Enum) else value  # as fairseq keeps choices
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise UserError(Argument(name, value), f": must be {KINDS[str][1]}")
    return value


def _number(name: str, kind: Any, value: Any) -> Any:
    try:
        if isinstance(value, bool) or not isinstance(value, (str, KINDS[float][0])) or len(str(value)) > _LONGEST:
            raise TypeError
        result = kind(value)
        if kind is int and not isinstance(value, str) and result != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(Argument(name, value), f": must be {KINDS[kind][1]}") from error
    return result


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """``0,1,3`` or numbers -> (0, 1, 3)."""
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    try:
        return tuple(sorted({int(part) for part in parts}))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(Argument(name, value), ": must be token ids with commas between, such as 0,1,3") from error
