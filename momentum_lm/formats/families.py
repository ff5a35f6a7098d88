"""The families of Hugging Face models that are this package's decoder under other names: one description each, for both
directions.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from momentum_lm.errors import Argument, UserError, arg, named
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.config import RotaryScaling, default, options

from .lazy import FLOATS, Lazy, concatenated

# transformers' names of the activations; the three of the tanh approximation differ in rounding alone
ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu_fast": "gelu_accurate",
    "silu": "silu",
    "swish": "silu",
}
INSTEAD = "; use it as it is with fairseq-eval --hf-model"
_VOCABULARY = ("embed_tokens.weight", "output_projection.weight")
_OFFSET = 2  # rows of a learned position table that no token has: fairseq counts from the padding token's id + 1


@dataclass(frozen=True)
class Family:
    """What ``config.json`` and the tensors of one ``model_type`` say; of two with one ``model_type``, what their needs
    tell apart.

    names: patterns of our tensors' names and what stands for them there, the first that fits. Several of ours under one
        name there are parts of one tensor, along its first dimension; by_head: of each head's part of it.
    fields: DecoderConfig's fields by their name in config.json. constants: what they are in every model of the family.
    needs: what config.json must say, or not mention, and why another value will not do. refusals: functions of
    config.json that say what else the decoder does not compute, or nothing. defaults: what it means where it says
    nothing. written: what ours say besides. transposed: names there of matrices that are stored the other way round.
    ignored: names of tensors that say nothing. renamed: a pattern of names that files of some versions have, and what
    stands for it. base: the prefix that a file lacks if it was saved without the output projection. position_rows: rows
    of a learned position table there that no token has. fairseq_ids: token ids are those of a fairseq dictionary.
    earlier: what entries of config.json are called in files of other versions.
    """

    model_type: str
    architecture: str
    names: tuple[tuple[str, str], ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    refusals: tuple[Callable[[Mapping[str, Any]], str | None], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    transposed: str = r"(?!)"
    by_head: bool = False
    ignored: str = r"(?!)"
    renamed: tuple[str, str] = (r"(?!)", "")
    base: str = "model."
    position_rows: int = _OFFSET
    fairseq_ids: bool = True
    earlier: Mapping[str, str] = field(default_factory=dict)

    def theirs(self, name: str) -> str:
        """The name there of the tensor that is ``name`` here."""
        return next(re.sub(f"^{ours}", theirs, name, count=1) for ours, theirs in self.names if re.match(ours, name))

    def unmet(self, config: Mapping[str, Any]) -> str | None:
        """What the family needs config.json to say and it does not, in a message."""
        for name, (value, reason) in self.needs.items():
            found = config.get(name, value)
            if found != value:
                return f"{name} is {_shown(found)}: {reason}"
        return None

    def decoder_config(self, config: Mapping[str, Any], vocab_size: int) -> DecoderConfig:
        """What a config.json means. Raises UserError naming the entry that is missing, no number, or not to be
        represented.
        """
        config = _with_rope(config) if self.constants.get("position") == "rotary" else config
        for problem in (self.unmet(config), *(refusal(config) for refusal in self.refusals)):
            if problem:
                raise UserError(problem + INSTEAD)
        given: dict[str, Any] = {}
        kinds = {name: (kind, entry) for name, kind, entry in options()}
        for ours, theirs in self.fields.items():
            usual = self.defaults.get(theirs)
            value = config.get(theirs, config.get(self.earlier.get(theirs, theirs), usual))
            if value is None:
                value = 0 if kinds[ours][1].zero else usual
            given[ours] = tuple(value) if isinstance(value, list) else value
        with named(self._entry):
            if self is not MOMENTUM:
                called = given["activation"]
                if isinstance(called, str) and called not in ACTIVATIONS:
                    known = f", which the decoder does not have ({', '.join(ACTIVATIONS)})"
                    raise UserError(arg(activation=called), known + INSTEAD)
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
            scaling = RotaryScaling.parse(decoder.rotary_scaling)
            values["rotary_scaling"] = None if scaling is None else scaling.rope_scaling()
        named = {theirs: values[ours] for ours, theirs in self.fields.items()}
        needed = {name: value for name, (value, _) in self.needs.items()}
        if self is MOMENTUM:
            needed = {"pad_token_id": decoder.padding_idx, "eos_token_id": decoder.eos_idx}
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": vocab_size,
            **needed,
            **self.written,
            **named,
        }

    def represents(self, decoder: DecoderConfig) -> bool:
        """Whether a model of the family computes what ``decoder`` does, its absent tokens apart: its config.json says
        all that matters outside training.
        """
        try:
            found = self.decoder_config(self.config(decoder, decoder.vocab_size), decoder.vocab_size)
        except UserError:
            return False
        apart = {name: getattr(decoder, name) for name in ("absent_tokens", "checkpoint_activations", *_DROPOUTS)}
        return dataclasses.replace(found, **apart) == decoder

    def to_theirs(
        self, ours: Mapping[str, Lazy], decoder: DecoderConfig, order: Tensor | None = None
    ) -> dict[str, Lazy]:
        """The tensors of ``decoder`` under their names and in their shapes. ``order`` (their vocabulary): the id here
        of each id there; None: the same.
        """
        groups: dict[str, list[Lazy]] = {}
        for name, lazy in ours.items():
            if decoder.tie_embeddings and name == "output_projection.weight":
                continue
            if name in _VOCABULARY and order is not None:
                lazy = lazy.rows(order)
            if name == "embed_positions.weight" and self.position_rows < _OFFSET:
                lazy = lazy.map((lazy.shape[0] - _OFFSET, *lazy.shape[1:]), lambda table: table[_OFFSET:])
            groups.setdefault(self.theirs(name), []).append(lazy)
        joined = {name: concatenated(parts, self._heads(decoder)) for name, parts in groups.items()}
        return {name: lazy.transposed() if re.search(self.transposed, name) else lazy for name, lazy in joined.items()}

    def _heads(self, decoder: DecoderConfig) -> int:
        """Into how many runs of rows a tensor of several of ours falls, each with rows of all of them."""
        return decoder.heads if self.by_head else 1

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
            if group == ["output_projection.weight"] and decoder.tie_embeddings:
                result["output_projection.weight"] = result["embed_tokens.weight"]
            else:
                lazy = theirs[name].transposed() if re.search(self.transposed, name) else theirs[name]
                parts = lazy.chunks(len(group), self._heads(decoder)) if len(group) > 1 else [lazy]
                result |= zip(group, parts, strict=True)
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

    def full_names(self, found: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """The tensors of a file by the names that they have in one with the output projection, those that say nothing
        left out.
        """
        kept = {re.sub(*self.renamed, name): lazy for name, lazy in found.items() if not re.search(self.ignored, name)}
        if any(name.startswith(self.base) for name in kept):
            return kept
        head = self.theirs("output_projection.weight")
        return {name if name == head else self.base + name: lazy for name, lazy in kept.items()}

    def check(self, theirs: Mapping[str, Lazy], decoder: DecoderConfig, vocab_size: int) -> None:
        """Raises UserError unless the tensors are those of the configuration: one missing, one too many, or one of
        another shape or not of fp64, fp32, fp16 or bf16.
        """
        if decoder.layers > len(theirs):  # each has more than one
            problem = f"there are {len(theirs)} of them, for {decoder.layers} layers"
            raise UserError(f"its tensors do not fit its config.json: {problem}")
        own = dataclasses.replace(decoder, vocab_size=vocab_size, absent_tokens=())
        wanted = self.to_theirs(expected(own), own)
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


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what it says of rotary positions under transformers 4's names, ``rope_scaling`` as DecoderConfig
    has it. Version 5 keeps all of it in ``rope_parameters``; what stands in there goes before what stands outside.
    """
    called = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(called) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{called} is {_shown(rope)}: must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        known = "the decoder has rotary positions as they are and those of Llama 3 (default, llama3)"
        raise UserError(f"{called} has rope_type {_shown(kind)}: {known}{INSTEAD}")
    if nested := next((name for name, value in rope.items() if isinstance(value, dict)), None):
        raise UserError(f"{called} has its own {_shown(nested)}: the decoder's layers have the same positions{INSTEAD}")
    moved = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    length = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return {**config, **moved, "rope_scaling": json.dumps(length | rope) if kind == "llama3" else "none"}


def _narrow(config: Mapping[str, Any]) -> str | None:
    width, embedded = config.get("hidden_size"), config.get("word_embed_proj_dim")
    if not isinstance(width, int) or embedded in (None, width):
        return None
    reason = "the embeddings go through projections, as in OPT-350m, which the decoder has not"
    return f"word_embed_proj_dim is {_shown(embedded)}, not the hidden size {width}: {reason}"


def _partly_rotary(config: Mapping[str, Any]) -> str | None:
    share = config.get("partial_rotary_factor")
    if share in (None, 1):
        return None
    return f"partial_rotary_factor is {_shown(share)}: positions turn whole heads in this kind of model"


def _uneven_heads(config: Mapping[str, Any]) -> str | None:
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads == 0:
        return None
    return f"hidden_size {width} is not a multiple of num_attention_heads {heads}"


def _window(config: Mapping[str, Any]) -> str | None:
    window, longest = config.get("sliding_window", 4096), config.get("max_position_embeddings", 131072)
    if window is None or (isinstance(window, int) and isinstance(longest, int) and window >= longest):
        return None
    return f"sliding_window is {_shown(window)}: {_NO_WINDOW}"


def _windows(config: Mapping[str, Any]) -> str | None:
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        first, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
        windows = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
        kinds = ["sliding_attention"] if config.get("use_sliding_window") and windows else []
    if other := next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None):
        return f"layer_types has {_shown(other)}, and the decoder's layers are all of full_attention"
    return _window({"max_position_embeddings": 32768, **config}) if "sliding_attention" in kinds else None


_NO_WINDOW = "the decoder's attention goes back to the first token"
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
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
    refusals=(_narrow,),
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
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
    constants={"position": "learned", "scale_embeddings": False},
    needs={
        "scale_attn_weights": (True, "the decoder scales attention logits"),
        "scale_attn_by_inverse_layer_idx": (False, "the decoder scales attention logits alike in all layers"),
        "add_cross_attention": (False, "the decoder has no cross-attention"),
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    transposed=r"\.c_\w+\.weight$",
    ignored=r"(^|\.)attn\.(masked_)?bias$",
    base="transformer.",
    position_rows=0,
    fairseq_ids=False,
)
_ROTARY = {"rotary_base": "rope_theta", "rotary_scaling": "rope_scaling"}
_GATED = {
    "norm": "rms",
    "ffn": "gated",
    "bias": "none",
    "position": "rotary",
    "scale_embeddings": False,
}
_GATED_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_ALL_OR_NONE = "the decoder has biases on all projections, on queries, keys and values, or on none"
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    names=(
        (r"output_projection\.", "lm_head."),
        (r"layer_norm\.", "model.norm."),
        (r"layers\.(\d+)\.self_attn_layer_norm\.", r"model.layers.\1.input_layernorm."),
        (r"layers\.(\d+)\.self_attn\.out_proj\.", r"model.layers.\1.self_attn.o_proj."),
        (r"layers\.(\d+)\.final_layer_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"layers\.(\d+)\.fc_gate\.", r"model.layers.\1.mlp.gate_proj."),
        (r"layers\.(\d+)\.fc1\.", r"model.layers.\1.mlp.up_proj."),
        (r"layers\.(\d+)\.fc2\.", r"model.layers.\1.mlp.down_proj."),
        ("", "model."),
    ),
    fields={
        **_USUAL,
        **_ROTARY,
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
        "attention_dropout": "attention_dropout",
    },
    constants=_GATED,
    needs={"attention_bias": (False, _ALL_OR_NONE), "mlp_bias": (False, _ALL_OR_NONE)},
    refusals=(_uneven_heads, _partly_rotary),
    defaults={**_GATED_DEFAULTS, "max_position_embeddings": 2048},
    ignored=r"\.rotary_emb\.inv_freq$",
    fairseq_ids=False,
)
LLAMA_WITH_BIASES = dataclasses.replace(
    LLAMA,
    constants={**_GATED, "bias": "all"},
    needs={"attention_bias": (True, _ALL_OR_NONE), "mlp_bias": (True, _ALL_OR_NONE)},
)
MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    needs={},
    refusals=(_window, _partly_rotary),
    defaults={**_GATED_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    written={"sliding_window": None},
)
QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    constants={**_GATED, "bias": "qkv"},
    needs={},
    refusals=(_windows, _partly_rotary),
    defaults={**_GATED_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    written={"use_sliding_window": False},
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    constants={**_GATED, "qk_norm": True},
    needs={"attention_bias": (False, _ALL_OR_NONE)},
    defaults={**QWEN2.defaults, "head_dim": 128},
)
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    names=(
        (r"output_projection\.", "embed_out."),
        (r"embed_tokens\.", "gpt_neox.embed_in."),
        (r"layer_norm\.", "gpt_neox.final_layer_norm."),
        (r"layers\.(\d+)\.self_attn_layer_norm\.", r"gpt_neox.layers.\1.input_layernorm."),
        (r"layers\.(\d+)\.self_attn\.[qkv]_proj\.", r"gpt_neox.layers.\1.attention.query_key_value."),
        (r"layers\.(\d+)\.self_attn\.out_proj\.", r"gpt_neox.layers.\1.attention.dense."),
        (r"layers\.(\d+)\.final_layer_norm\.", r"gpt_neox.layers.\1.post_attention_layernorm."),
        (r"layers\.(\d+)\.fc1\.", r"gpt_neox.layers.\1.mlp.dense_h_to_4h."),
        (r"layers\.(\d+)\.fc2\.", r"gpt_neox.layers.\1.mlp.dense_4h_to_h."),
    ),
    fields={
        **_USUAL,
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "rotary_base": "rotary_emb_base",
        "rotary_fraction": "rotary_pct",
        "rotary_scaling": "rope_scaling",
        "parallel_residual": "use_parallel_residual",
        "dropout": "hidden_dropout",
        "attention_dropout": "attention_dropout",
    },
    constants={"position": "rotary", "scale_embeddings": False},
    needs={"attention_bias": (True, _ALL_OR_NONE)},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    by_head=True,
    ignored=r"\.attention\.(masked_)?bias$|\.rotary_emb\.inv_freq$",
    renamed=(r"^lm_head\.", "embed_out."),  # as transformers 5 has it in memory
    base="gpt_neox.",
    fairseq_ids=False,
    earlier={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
)
MOMENTUM = Family(
    "momentum_lm",
    "MomentumLMForCausalLM",
    names=((r"output_projection\.", "lm_head."), ("", "model.")),
    fields={name: _USUAL.get(name, name) for name in _OWN},
    defaults={_USUAL.get(name, name): default(name) for name in _OWN if default(name) is not dataclasses.MISSING},
    earlier={theirs: ours for ours, theirs in _USUAL.items()},
)
# in the order in which a decoder is looked for among them
FAMILIES = (XGLM, OPT, GPT2, LLAMA, LLAMA_WITH_BIASES, MISTRAL, QWEN2, QWEN3, GPT_NEOX, MOMENTUM)
_MODEL_TYPES = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES))
_EXPERTS = "feed-forward layers with experts"
_LACKING = {  # what the decoder does not compute of some well-known models, by their model_type
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "dbrx", "jetmoe"), _EXPERTS),
    **dict.fromkeys(("olmo2", "olmo3"), "norms after attention and feed-forward layers"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "norms after attention and feed-forward layers, and windows"),
    "gemma": "norms whose weights are counted from 1",
    **dict.fromkeys(("bloom", "mpt"), "ALiBi positions"),
    **dict.fromkeys(("gptj", "codegen", "phi", "cohere"), "parallel blocks with one norm"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma"), "recurrent layers"),
}
# entries of config.json that say so
_SIGNS = ("num_local_experts", "num_experts", "n_routed_experts", "attn_logit_softcapping", "final_logit_softcapping")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UserError for a model that the decoder cannot be, saying why and what to use
    instead.
    """
    kind = config.get("model_type")
    known = [family for family in FAMILIES if family.model_type == kind]
    if known:
        return next((family for family in known if family.unmet(config) is None), known[0])
    lacking = _LACKING.get(kind) if isinstance(kind, str) else None
    signs = [f"{name} {_shown(config[name])}" for name in _SIGNS if config.get(name)]
    seen = f", {' and '.join(signs)}" if signs else ""
    reason = f" ({lacking}{seen}, which the decoder has not)" if lacking else ""
    raise UserError(f"model_type is {_shown(kind)}{reason}, and none of {_MODEL_TYPES}{INSTEAD}")
