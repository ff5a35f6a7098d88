"""Where a model's blocks, projections, norms and matrices are: our decoder's, and those of models of ``transformers``.

One entry of :data:`FAMILIES` describes one family. What a model has not, or what no entry tells, is None. Entries say
how a matrix lies; nothing is guessed from shapes. What :mod:`.tracing` reads by them it compares with what the model
itself computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from momentum_lm.errors import UserError
from momentum_lm.model import Decoder
from momentum_lm.model.filters import filter_names, remove_filters

from .attention_interface import attention_modules


@dataclass(frozen=True)
class Family:
    """Names of a family's modules; an empty one is a part that it has not. The default is Llama's.

    blocks, final_norm: from the model. attention, norms, ffn_*: from a block; the norms are those of what attention and
    feed-forward take, and ffn_gate is the matrix of the activation where another is multiplied with it (the same name
    for both: first gate, then input).
    query, key, value, output, query_norm, key_norm: from the attention module.
    fused: one projection in place of query, key and value, whose outputs lie by ``layout``: ``blocks``: all queries,
    all keys, all values; ``groups``: for each key/value head the queries that share it, the key, the value.
    transposed: matrices are stored (inputs, outputs). unembedding: where it is not what ``get_output_embeddings``
    gives.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str = ""
    layout: str = "blocks"
    transposed: bool = False
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    ffn_in: str = "mlp.up_proj"
    ffn_gate: str = "mlp.gate_proj"
    ffn_out: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    unembedding: str = ""


_LLAMA = Family()
_GEMMA2 = replace(_LLAMA, ffn_norm="pre_feedforward_layernorm")
_OLMO2 = replace(_LLAMA, attention_norm="", ffn_norm="")  # norms stand behind attention and feed-forward
_COHERE = replace(_LLAMA, ffn_norm="input_layernorm")  # attention and feed-forward side by side
_FAIRSEQ = Family(
    output="out_proj", attention_norm="self_attn_layer_norm", ffn_norm="final_layer_norm",
    ffn_in="fc1", ffn_gate="fc_gate", ffn_out="fc2", final_norm="model.layer_norm",
)  # fmt: skip
_GPT2 = Family(
    "transformer.h", "attn", fused="c_attn", transposed=True, output="c_proj", attention_norm="ln_1", ffn_norm="ln_2",
    ffn_in="mlp.c_fc", ffn_gate="", ffn_out="mlp.c_proj", final_norm="transformer.ln_f",
)  # fmt: skip
_NEOX = Family(
    "gpt_neox.layers", "attention", fused="query_key_value", layout="groups", output="dense",
    ffn_in="mlp.dense_h_to_4h", ffn_gate="", ffn_out="mlp.dense_4h_to_h", final_norm="gpt_neox.final_layer_norm",
)  # fmt: skip
_BLOOM = replace(_NEOX, blocks="transformer.h", attention="self_attention", final_norm="transformer.ln_f")
OURS = replace(_FAIRSEQ, blocks="layers", final_norm="layer_norm", unembedding="output_projection")

FAMILIES: dict[str, Family] = {  # by transformers' model_type
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma"), _LLAMA),
    **dict.fromkeys(("olmo", "olmoe", "granite", "granitemoe", "smollm3", "gpt_oss", "helium", "arcee"), _LLAMA),
    "ernie4_5": _LLAMA,
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _OLMO2),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    "phi3": replace(_LLAMA, fused="qkv_proj", ffn_in="mlp.gate_up_proj", ffn_gate="mlp.gate_up_proj"),
    "phi": replace(_COHERE, output="dense", query_norm="q_layernorm", key_norm="k_layernorm",
                   ffn_in="mlp.fc1", ffn_gate="", ffn_out="mlp.fc2", final_norm="model.final_layernorm"),
    "stablelm": replace(_LLAMA, query_norm="q_layernorm", key_norm="k_layernorm"),
    "starcoder2": replace(_LLAMA, ffn_in="mlp.c_fc", ffn_gate="", ffn_out="mlp.c_proj"),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, transposed=False, layout="groups"),
    "gpt_neo": replace(_GPT2, attention="attn.attention", fused="", transposed=False, output="out_proj"),
    "gptj": replace(_GPT2, fused="", transposed=False, output="out_proj", ffn_norm="ln_1",
                    ffn_in="mlp.fc_in", ffn_out="mlp.fc_out"),
    "mpt": Family("transformer.blocks", "attn", fused="Wqkv", output="out_proj",
                  attention_norm="norm_1", ffn_norm="norm_2", ffn_in="ffn.up_proj", ffn_gate="",
                  ffn_out="ffn.down_proj", final_norm="transformer.norm_f"),
    "gpt_neox": _NEOX,
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, attention_norm="", ffn_norm=""),  # which of four depends on the model
    "opt": replace(_FAIRSEQ, blocks="model.decoder.layers", final_norm="model.decoder.final_layer_norm"),
    **dict.fromkeys(("xglm", "momentum_lm"), _FAIRSEQ),
    "biogpt": replace(_FAIRSEQ, blocks="biogpt.layers", final_norm="biogpt.layer_norm"),
}  # fmt: skip
# of models of other families: an attention module is known by its projections, and no more of it
OTHERS = tuple(
    Family(query=q, key=k, value=v, attention_norm="", ffn_norm="", ffn_in="", ffn_gate="", ffn_out="", final_norm="")
    for q, k, v in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map: a module, or the ``part`` of the module's outputs, (..., N) -> (..., n), that is meant."""

    module: Any
    part: Callable[[Tensor], Tensor] | None = None
    transposed: bool = False

    def of(self, result: Tensor) -> Tensor:
        """What the projection gives, (..., n), of what its module gives, (..., N)."""
        return result if self.part is None else self.part(result)

    @property
    def weight(self) -> Tensor:
        """(n, inputs)."""
        stored: Tensor = self.module.weight
        return self.of(stored if self.transposed else stored.t()).t()

    @property
    def bias(self) -> Tensor | None:
        """(n,), if there is one."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else self.of(bias)

    def mask(self, parameter: Tensor) -> Tensor | None:
        """1 at what belongs to the projection of its module's weight or bias, in its shape; None: all of it."""
        if self.part is None:
            return None
        mask = torch.zeros_like(parameter)
        outputs_last = mask.t() if mask.dim() == 2 and not self.transposed else mask
        outputs_last[..., self.part(torch.arange(outputs_last.shape[-1], device=mask.device))] = 1
        return mask


@dataclass(frozen=True, eq=False)
class Layer:
    """A block and one attention module in it. heads: of queries; kv_heads: of keys and values; head_dim: the width of
    one."""

    block: nn.Module
    attention: nn.Module | None = None
    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None
    output: Projection | None = None
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    attention_norm: nn.Module | None = None
    ffn_norm: nn.Module | None = None
    ffn_in: Projection | None = None
    ffn_gate: Projection | None = None
    ffn_out: Projection | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model. layers: its blocks in order, one entry for each attention module, and one for a block
    without.

    known: whether an entry of :data:`FAMILIES` says so. heads: of queries. max_positions: the longest input that the
    model was made for.
    tried: what :mod:`.tracing` found by trial, by the model's attention function.
    """

    layers: list[Layer]
    known: bool
    final_norm: nn.Module | None
    unembedding: nn.Module | None
    heads: int | None
    max_positions: int
    tried: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(dict.fromkeys(layer.block for layer in self.layers))

    def layer(self, attention: nn.Module) -> Layer:
        """The (first) layer with this attention module; one without parts where none is known."""
        return next((layer for layer in self.layers if layer.attention is attention), Layer(attention, attention))


def is_ours(model: Any) -> bool:
    """Whether ``model`` is our decoder, and not one of transformers."""
    return isinstance(model, Decoder)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T, V), of either kind of model."""
    return model(tokens) if is_ours(model) else model(tokens, use_cache=False).logits


def untrained_copy(model: Any) -> Any:
    """A model of the same architecture whose weights are freshly drawn, by the architecture's own initialisation."""
    if is_ours(model):
        fresh = Decoder(model.config)
        remove_filters(fresh, set(filter_names(fresh)) - set(filter_names(model)))
        return fresh
    from transformers import AutoModelForCausalLM

    # a model's own code, where it brings some, runs here already
    return AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)


def context_length(config: Any, other: int | None = None) -> int:
    """The longest input that a model was made for, as far as its configuration, or an ``other`` limit, tells."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_positions")
    limits = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return min([*limits, *([] if other is None else [other])], default=2048)


# a cache: an Anatomy refers to the model's parts, and not to the model, which would never be freed
_anatomies: WeakKeyDictionary[nn.Module, Anatomy] = WeakKeyDictionary()


def anatomy(model: Any) -> Anatomy:
    """The parts of our decoder, or of a model of transformers; one of no known family may be run on two tokens for
    it."""
    if model not in _anatomies:
        _anatomies[model] = _read(model)
    return _anatomies[model]


def _read(model: Any) -> Anatomy:
    config = model.config if is_ours(model) else model.config.get_text_config(decoder=True)
    heads = config.heads if is_ours(model) else getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else None  # of some models a list, one a layer
    family = OURS if is_ours(model) else FAMILIES.get(config.model_type)
    blocks = None if family is None else _at(model, family.blocks)
    if family is None or blocks is None:
        layers = _others(model, config, heads)
        return Anatomy(layers, False, None, model.get_output_embeddings(), heads, context_length(config))
    layers = [_layer(block, _at(block, family.attention), family, config, heads) for block in blocks]
    unembedding = _at(model, family.unembedding) if family.unembedding else model.get_output_embeddings()
    return Anatomy(layers, True, _at(model, family.final_norm), unembedding, heads, context_length(config))


def _others(model: Any, config: Any, heads: int | None) -> list[Layer]:
    """Layers of a model of no known family: the lists of modules in which attention stands are its blocks."""
    modules = list(model.modules())
    forms = {m: form for form in OTHERS for m in modules if _at(m, form.key) and _at(m, form.value)}
    try:
        attending = set(attention_modules(model))
    except UserError:
        attending = set(forms)
    found = []
    for blocks in [module for module in modules if isinstance(module, nn.ModuleList)]:
        for block in blocks if not attending.isdisjoint(blocks.modules()) else ():
            own = [module for module in block.modules() if module in attending]
            found += [_layer(block, m, forms.get(m), config, heads) for m in own] or [Layer(block)]
    return found


def _layer(
    block: nn.Module, attention: nn.Module | None, family: Family | None, config: Any, heads: int | None
) -> Layer:
    if attention is None or family is None:
        return Layer(block, attention)
    made = functools.partial(_projection, transposed=family.transposed)
    query, key, value = (made(attention, name) for name in (family.query, family.key, family.value))
    fused, kv_heads = made(attention, family.fused), None
    head_dim = _told_head_dim(config) or (config.hidden_size // heads if fused and heads else None)
    if fused is not None and heads and head_dim:
        kv_heads = (len(fused.weight) // head_dim - heads) // 2
        sizes = (heads, kv_heads, head_dim)
        query, key, value = (replace(fused, part=functools.partial(_part, family.layout, i, sizes)) for i in range(3))
    elif query is not None and key is not None and heads:
        head_dim = max(1, len(query.weight) // heads)
        kv_heads = len(key.weight) // head_dim
    ffn_in, ffn_gate = made(block, family.ffn_in), made(block, family.ffn_gate)
    if ffn_in is not None and family.ffn_in == family.ffn_gate:
        ffn_gate, ffn_in = (replace(ffn_in, part=functools.partial(_half, i)) for i in range(2))
    parts: dict[str, Any] = {"query": query, "key": key, "value": value, "output": made(attention, family.output)}
    parts |= {name: _at(attention, getattr(family, name)) for name in ("query_norm", "key_norm")}
    parts |= {name: _at(block, getattr(family, name)) for name in ("attention_norm", "ffn_norm")}
    parts |= {"ffn_in": ffn_in, "ffn_gate": ffn_gate, "ffn_out": made(block, family.ffn_out)}
    return Layer(block, attention, **parts, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def _told_head_dim(config: Any) -> int | None:
    try:
        return getattr(config, "head_dim", None)
    except RuntimeError:  # of transformers, where layers differ, as Gemma 4's do
        return None


def _at(module: Any, path: str) -> Any:
    """The submodule at a dotted path; None where there is none."""
    for name in path.split("."):
        module = getattr(module, name, None) if path else None
    return module if isinstance(module, nn.Module) else None


def _projection(module: nn.Module, path: str, transposed: bool) -> Projection | None:
    found = _at(module, path)
    return Projection(found, transposed=transposed) if isinstance(getattr(found, "weight", None), Tensor) else None


def _part(layout: str, which: int, sizes: tuple[int, int, int], values: Tensor) -> Tensor:
    """Queries (0), keys (1) or values (2) of what a fused projection gives, (..., N); sizes: heads, key/value heads,
    head size."""
    heads, kv_heads, head_dim = sizes
    if layout == "blocks":
        return values.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)[which]
    grouped = values.unflatten(-1, (kv_heads, heads // kv_heads + 2, head_dim))
    return (grouped[..., :-2, :], grouped[..., -2:-1, :], grouped[..., -1:, :])[which].flatten(-3)


def _half(which: int, values: Tensor) -> Tensor:
    return values.chunk(2, -1)[which]


def key_value_weights(model: Any) -> list[tuple[Tensor, ...]]:
    """Per layer with attention weight and bias of the keys' projection and of the values', (Hkv * D, C) and (Hkv * D,),
    fp32; zeros where there is no bias. Nothing for a model in which they are not known."""
    found: list[tuple[Tensor, ...]] = []
    for layer in anatomy(model).layers:
        if layer.attention is None:
            continue
        if layer.key is None or layer.value is None:
            return []
        each: list[Tensor] = []
        for part in (layer.key, layer.value):
            weight, bias = part.weight.detach().float(), part.bias
            each += [weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float()]
        found.append(tuple(each))
    return found
