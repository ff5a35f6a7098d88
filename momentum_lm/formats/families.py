"""The families of Hugging Face models that are this package's decoder under other names: one description each, for both
directions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from momentum_lm.errors import Argument, UserError, arg, named
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.config import default, options

from .lazy import FLOATS, Lazy, concatenated

# transformers' names of the activations; the three of the tanh approximation differ in rounding alone
ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
}
_VOCABULARY = ("embed_tokens.weight", "output_projection.weight")
_OFFSET = 2  # rows of a learned position table that no token has: fairseq counts from the padding token's id + 1


@dataclass(frozen=True)
class Family:
    """What ``config.json`` and the tensors of one ``model_type`` say.

    names: patterns of our tensors' names and what stands for them there, the first that fits. Several of ours under one
        name there are parts of one tensor, along its first dimension.
    fields: DecoderConfig's fields by their name in config.json. constants: what they are in every model of the family.
    needs: what config.json must say, or not mention, and why another value will not do. defaults: what it means where
    it says nothing. transposed: names there of matrices that are stored the other way round. ignored: names of tensors
    that say nothing. base: the prefix that a file lacks if it was saved without the output projection. position_rows:
    rows of a learned position table there that no token has. fairseq_ids: token ids are those of a fairseq dictionary.
    earlier: what entries of config.json were called in files of earlier versions.
    """

    model_type: str
    architecture: str
    names: tuple[tuple[str, str], ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    transposed: str = r"(?!)"
    ignored: str = r"(?!)"
    base: str = "model."
    position_rows: int = _OFFSET
    fairseq_ids: bool = True
    earlier: Mapping[str, str] = field(default_factory=dict)

    def theirs(self, name: str) -> str:
        """The name there of the tensor that is ``name`` here."""
        return next(re.sub(f"^{ours}", theirs, name, count=1) for ours, theirs in self.names if re.match(ours, name))

    def decoder_config(self, config: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
        """What a config.json means. Raises UserError naming the entry that is missing, no number, or not to be
        represented.
        """
        for name, (value, reason) in self.needs.items():
            found = config.get(name, value)
            if found != value:
                raise UserError(f"{name} is {_shown(found)}: {reason}")
        given: dict[str, Any] = {}
        kinds = {name: (kind, entry) for name, kind, entry in options()}
        for ours, theirs in self.fields.items():
            value = config.get(theirs, config.get(self.earlier.get(theirs, theirs)))
            value = self.defaults.get(theirs) if value is None else value
            value = 0 if value is None and kinds[ours][1].zero else value
            given[ours] = tuple(value) if isinstance(value, list) else value
        with named(self._entry):
            if self is not MOMENTUM:
                called = given["activation"]
                if isinstance(called, str) and called not in ACTIVATIONS:
                    known = f", which the decoder does not have ({', '.join(ACTIVATIONS)})"
                    raise UserError(arg(activation=called), known)
                given["activation"] = ACTIVATIONS[called] if isinstance(called, str) else called
            return DecoderConfig(**{"vocab_size": vocab_size, **self.constants, **given})

    def _entry(self, argument: Argument) -> Argument | str:
        """The entry of config.json that gives a field of DecoderConfig."""
        theirs = self.fields.get(argument.name)
        return argument if theirs is None else f"{theirs} {_shown(argument.value)}" if argument.has_value else theirs

    def config(self, decoder: DecoderConfig, vocab_size: int) -> dict[str, Any]:
        """The config.json of a decoder that the family represents, apart from its dtype and its token ids (but those in
        ``needs``).
        """
        values = dataclasses.asdict(decoder) | {"vocab_size": vocab_size}
        if self is not MOMENTUM:
            values["activation"] = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == decoder.activation)
        named = {theirs: values[ours] for ours, theirs in self.fields.items()}
        needed = {name: value for name, (value, _) in self.needs.items()}
        if self is MOMENTUM:
            needed = {"pad_token_id": decoder.padding_idx, "eos_token_id": decoder.eos_idx}
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": vocab_size,
            **needed,
            **named,
        }

    def represents(self, decoder: DecoderConfig) -> bool:
        """Whether a model of the family computes what ``decoder`` does, its absent tokens apart."""
        plain = {
            "momentum_kind": "none",
            **{name: value for name, value in self.constants.items() if name != "position"},
        }
        same = all(getattr(decoder, name) == value for name, value in plain.items())
        return (
            same
            and decoder.position == self.constants.get("position")
            and (decoder.padding_idx, decoder.eos_idx) == (1, 2)
        )

    def to_theirs(self, ours: Mapping[str, Lazy], tied: bool, order: Tensor | None = None) -> dict[str, Lazy]:
        """Our tensors under their names and in their shapes. ``order`` (their vocabulary): the id here of each id
        there; None: the same.
        """
        groups: dict[str, list[Lazy]] = {}
        for name, lazy in ours.items():
            if tied and name == "output_projection.weight":
                continue
            if name in _VOCABULARY and order is not None:
                lazy = lazy.rows(order)
            if name == "embed_positions.weight" and self.position_rows < _OFFSET:
                lazy = lazy.map((lazy.shape[0] - _OFFSET, *lazy.shape[1:]), lambda table: table[_OFFSET:])
            groups.setdefault(self.theirs(name), []).append(lazy)
        joined = {name: concatenated(parts) for name, parts in groups.items()}
        return {name: lazy.transposed() if re.search(self.transposed, name) else lazy for name, lazy in joined.items()}

    def to_ours(
        self, theirs: Mapping[str, Lazy], decoder: DecoderConfig, order: Tensor | None = None
    ) -> dict[str, Lazy]:
        """Their tensors as ours, where :meth:`check` has nothing to say. ``order`` (our vocabulary): the id there of
        each id here, negative where it has none; None: the same.
        """
        names = {name: self.theirs(name) for name in expected(decoder)}
        groups = {
            name: [ours for ours, other in names.items() if other == name] for name in dict.fromkeys(names.values())
        }
        result: dict[str, Lazy] = {}
        for name, group in groups.items():
            if name == "lm_head.weight" and decoder.tie_embeddings:
                result["output_projection.weight"] = result["embed_tokens.weight"]
            else:
                lazy = theirs[name].transposed() if re.search(self.transposed, name) else theirs[name]
                result |= zip(group, lazy.chunks(len(group)) if len(group) > 1 else [lazy], strict=True)
        if order is not None:
            for name in _VOCABULARY:
                tied = name == "output_projection.weight" and decoder.tie_embeddings
                result[name] = result["embed_tokens.weight"] if tied else result[name].rows(order)
        if "embed_positions.weight" in result and self.position_rows < _OFFSET:
            table = result["embed_positions.weight"]
            shape = (table.shape[0] + _OFFSET, *table.shape[1:])
            result["embed_positions.weight"] = table.map(
                shape, lambda rows: torch.cat([rows.new_zeros(_OFFSET, rows.shape[1]), rows])
            )
        return {name: result[name] for name in names}

    def check(self, theirs: Mapping[str, Lazy], decoder: DecoderConfig, vocab_size: int) -> None:
        """Raises UserError unless the tensors are those of the configuration: one missing, one too many, or one of
        another shape or not of fp64, fp32, fp16 or bf16.
        """
        if decoder.layers > len(theirs):  # each has more than one
            problem = f"there are {len(theirs)} of them, for {decoder.layers} layers"
            raise UserError(f"its tensors do not fit its config.json: {problem}")
        own = dataclasses.replace(decoder, vocab_size=vocab_size, absent_tokens=())
        wanted = self.to_theirs(expected(own), decoder.tie_embeddings)
        missing, unknown = sorted(wanted.keys() - theirs.keys()), sorted(theirs.keys() - wanted.keys())
        if missing or unknown:
            lack, extra = (
                f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
                for names in (missing, unknown)
            )
            parts = [f"lack {lack}"] * bool(missing) + [f"have {extra}, which the model does not"] * bool(unknown)
            raise UserError(f"its tensors do not fit its config.json: they {' and '.join(parts)}")
        for name, lazy in wanted.items():
            if theirs[name].shape != lazy.shape:
                raise UserError(
                    f"its tensors do not fit its config.json: {name} is {theirs[name].shape}, and by config.json "
                    f"{lazy.shape}"
                )
            if theirs[name].dtype not in FLOATS:
                raise UserError(f"{name} is in {theirs[name].dtype}: give the model before it was quantised")


def _shown(value: object) -> str:
    """A value of somebody's file, in a message: on one line, and not all of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def expected(decoder: DecoderConfig) -> dict[str, Lazy]:
    """The decoder's state dict: names, shapes, and nothing in them."""
    with torch.device("meta"):
        return {name: Lazy.of(tensor) for name, tensor in Decoder(decoder).state_dict().items()}


_USUAL = {  # what transformers' own models call it, for what reads a config.json
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_OWN = [name for name, _, _ in options() if name not in ("vocab_size", "checkpoint_activations")]
_TRAINING = {"dropout": "dropout", "attention_dropout": "attention_dropout"}

XGLM = Family(
    "xglm",
    "XGLMForCausalLM",
    names=((r"output_projection\.", "lm_head."), ("", "model.")),
    fields={
        "dim": "d_model",
        "ffn_dim": "ffn_dim",
        "layers": "num_layers",
        "heads": "attention_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        "scale_embeddings": "scale_embedding",
        "activation_dropout": "activation_dropout",
        **_TRAINING,
    },
    constants={"position": "sinusoidal"},
    needs={
        "add_cross_attention": (False, "the decoder has no cross-attention"),
        "pad_token_id": (1, "fairseq's sinusoidal positions follow from a padding token of id 1"),
    },
    defaults={
        "activation_function": "gelu",
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
    },
    ignored=r"(^|\.)embed_positions\.weights$",
)
OPT = Family(
    "opt",
    "OPTForCausalLM",
    names=(
        (r"output_projection\.", "lm_head."),
        (r"layer_norm\.", "model.decoder.final_layer_norm."),
        ("", "model.decoder."),
    ),
    fields={
        "dim": "hidden_size",
        "ffn_dim": "ffn_dim",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        **_TRAINING,
    },
    constants={"position": "learned", "scale_embeddings": False},
    needs={
        "do_layer_norm_before": (
            True,
            "the model normalises after each block, as OPT-350m does; the decoder normalises before",
        ),
        "_remove_final_layer_norm": (False, "the decoder has a norm after its last block"),
        "enable_bias": (True, "the decoder's projections have biases"),
        "layer_norm_elementwise_affine": (True, "the decoder's norms have weights"),
    },
    defaults={"activation_function": "relu", "tie_word_embeddings": True, "dropout": 0.1, "attention_dropout": 0.0},
    ignored=r"(^|\.)decoder\.version$",
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    names=(
        (r"output_projection\.", "lm_head."),
        (r"embed_tokens\.", "transformer.wte."),
        (r"embed_positions\.", "transformer.wpe."),
        (r"layer_norm\.", "transformer.ln_f."),
        (r"layers\.(\d+)\.self_attn_layer_norm\.", r"transformer.h.\1.ln_1."),
        (r"layers\.(\d+)\.self_attn\.[qkv]_proj\.", r"transformer.h.\1.attn.c_attn."),
        (r"layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.h.\1.attn.c_proj."),
        (r"layers\.(\d+)\.final_layer_norm\.", r"transformer.h.\1.ln_2."),
        (r"layers\.(\d+)\.fc1\.", r"transformer.h.\1.mlp.c_fc."),
        (r"layers\.(\d+)\.fc2\.", r"transformer.h.\1.mlp.c_proj."),
    ),
    fields={
        "dim": "n_embd",
        "ffn_dim": "n_inner",
        "layers": "n_layer",
        "heads": "n_head",
        "max_positions": "n_positions",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    constants={"position": "learned", "scale_embeddings": False},
    needs={
        "layer_norm_epsilon": (1e-5, "the decoder's layer norms have 1e-5"),
        "scale_attn_weights": (True, "the decoder scales attention logits"),
        "scale_attn_by_inverse_layer_idx": (False, "the decoder scales attention logits alike in all layers"),
        "add_cross_attention": (False, "the decoder has no cross-attention"),
    },
    defaults={"activation_function": "gelu_new", "tie_word_embeddings": True, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    transposed=r"\.c_\w+\.weight$",
    ignored=r"(^|\.)attn\.(masked_)?bias$",
    base="transformer.",
    position_rows=0,
    fairseq_ids=False,
)
MOMENTUM = Family(
    "momentum_lm",
    "MomentumLMForCausalLM",
    names=((r"output_projection\.", "lm_head."), ("", "model.")),
    fields={name: _USUAL.get(name, name) for name in _OWN},
    defaults={_USUAL.get(name, name): default(name) for name in _OWN if default(name) is not dataclasses.MISSING},
    earlier={theirs: ours for ours, theirs in _USUAL.items()},
)
FAMILIES = {family.model_type: family for family in (XGLM, OPT, GPT2, MOMENTUM)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UserError for a model that the decoder cannot be, saying why and what to use
    instead.
    """
    kind = config.get("model_type")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else kind
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UserError(
            f"{name} is none of {', '.join(f.architecture for f in (XGLM, OPT, GPT2))}: Llama, Mistral, Qwen, "
            "GPT-NeoX and the like "
            "have RMSNorm, gated feed-forward layers, grouped heads or parallel blocks, which fairseq's decoder has "
            "not; "
            "use it as it is with fairseq-eval --hf-model"
        )
    width, embedded = config.get("hidden_size"), config.get("word_embed_proj_dim")
    if family is OPT and isinstance(width, int) and embedded not in (None, width):
        raise UserError(
            f"word_embed_proj_dim is {embedded}, not the hidden size {width}: the embeddings go "
            "through projections, as in OPT-350m, which the decoder has not; use it as it is with fairseq-eval "
            "--hf-model"
        )
    return family
