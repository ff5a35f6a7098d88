"""Configurations as they are published, and what they mean."""

import dataclasses

import pytest

from momentum_lm.errors import UserError
from momentum_lm.formats.families import FAMILIES, MOMENTUM, family_of
from momentum_lm.model import DecoderConfig
from momentum_lm.model.config import default
from momentum_lm.model.sizes import LLAMA_SIZES

LLAMA_32 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
LLAMA_2 = {
    "model_type": "llama", "vocab_size": 32000, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32768, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_25 = {
    "model_type": "qwen2", "vocab_size": 151936, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
QWEN_3 = {
    "model_type": "qwen3", "vocab_size": 151936, "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
PYTHIA = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_act": "gelu", "hidden_size": 768,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 12,
    "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True,
}  # fmt: skip
GATED = {"norm": "rms", "ffn": "gated", "activation": "silu", "position": "rotary", "scale_embeddings": False}
PUBLISHED = {
    "Llama-3.2-1B": (LLAMA_32, {**LLAMA_SIZES["1b"], "rotary_scaling": "llama3:32,1,4,8192", "max_positions": 131072}),
    "Llama-2-7b": (LLAMA_2, {**GATED, "bias": "none", "dim": 4096, "ffn_dim": 11008, "layers": 32, "heads": 32,
                             "max_positions": 4096, "tie_embeddings": False}),
    "Mistral-7B-v0.3": (MISTRAL, {**GATED, "bias": "none", "dim": 4096, "ffn_dim": 14336, "layers": 32, "heads": 32,
                                  "kv_heads": 8, "rotary_base": 1e6, "max_positions": 32768, "tie_embeddings": False}),
    "Qwen2.5-0.5B": (QWEN_25, {**GATED, "bias": "qkv", "dim": 896, "ffn_dim": 4864, "layers": 24, "heads": 14,
                               "kv_heads": 2, "rotary_base": 1e6, "norm_eps": 1e-6, "max_positions": 32768}),
    "Qwen3-0.6B": (QWEN_3, {**GATED, "bias": "none", "qk_norm": True, "dim": 1024, "ffn_dim": 3072, "layers": 28,
                            "heads": 16, "kv_heads": 8, "head_dim": 128, "rotary_base": 1e6, "norm_eps": 1e-6,
                            "max_positions": 40960}),
    "pythia-160m": (PYTHIA, {"position": "rotary", "rotary_fraction": 0.25, "parallel_residual": True, "dim": 768,
                             "ffn_dim": 3072, "layers": 12, "heads": 12, "max_positions": 2048,
                             "tie_embeddings": False, "scale_embeddings": False}),
}  # fmt: skip
ROPE = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    content, expected = PUBLISHED[name]
    decoder = DecoderConfig(content["vocab_size"], **expected)
    family = family_of(content)
    assert family.decoder_config(content, content["vocab_size"]) == decoder and family.represents(decoder)
    assert family.model_type == content["model_type"]
    # as transformers 5 writes it
    moved = {new: content[old] for old, new in ROPE.items() if old in content}
    rope = {"rope_type": "default", **moved, **(content.get("rope_scaling") or {})}
    newer = {key: value for key, value in content.items() if key not in ROPE and key != "rope_scaling"}
    newer["rope_parameters"] = rope
    assert family.decoder_config(newer, content["vocab_size"]) == decoder
    written = family.config(decoder, content["vocab_size"])
    assert family_of(written) is family and family.decoder_config(written, content["vocab_size"]) == decoder
    known = content.keys() & written.keys()
    assert len(known) > 10 and {key: written[key] for key in known} == {key: content[key] for key in known}


def test_what_stands_in_rope_parameters_goes_before_what_stands_outside():
    """As in transformers 5, and what only stands outside counts too."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    content = {**LLAMA_2, "rope_theta": 1e4, "rope_parameters": rope}
    decoder = family_of(content).decoder_config(content, 32000)
    assert decoder.rotary_base == 5e5 and decoder.rotary_scaling == "llama3:8,1,4,4096"  # of its own length
    del rope["rope_theta"]
    assert family_of(content).decoder_config(content, 32000).rotary_base == 1e4


@pytest.mark.parametrize(
    "content, expected",
    [
        ({**MISTRAL, "num_key_value_heads": None}, {"kv_heads": 32}),
        ({key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}, {"kv_heads": 8}),
        ({**MISTRAL, "sliding_window": 32768}, {"layers": 32}),
        ({**MISTRAL, "head_dim": None}, {"head_dim": 128}),
        ({key: value for key, value in QWEN_3.items() if key != "head_dim"}, {"head_dim": 128}),
        ({**QWEN_25, "use_sliding_window": True}, {"layers": 24}),  # from layer 24 on, which there is not
        ({**LLAMA_2, "attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
        ({key: value for key, value in PYTHIA.items() if key != "rotary_pct"}, {"rotary_fraction": 0.25}),
    ],
)
def test_what_is_not_said_is_what_transformers_takes_it_for(content, expected):
    decoder = family_of(content).decoder_config(content, content["vocab_size"])
    assert {name: getattr(decoder, name) for name in expected} == expected


@pytest.mark.parametrize("change", [{"head_dim": 48}, {"norm_eps": 1e-3}, {"ffn": "gated"}, {"norm": "rms"},
                                    {"bias": "none"}, {"parallel_residual": True}, {"qk_norm": True},
                                    {"position": "none"}, {"kv_heads": 2}, {"momentum_kind": "ema"}])  # fmt: skip
@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
def test_no_older_family_represents_what_it_does_not_compute(position, change):
    decoder = DecoderConfig(90, 128, 64, 2, 4, position=position, scale_embeddings=position == "sinusoidal")
    stock = [family for family in FAMILIES if family is not MOMENTUM]
    assert any(family.represents(decoder) for family in stock)
    other = dataclasses.replace(decoder, **change)
    found = {family.model_type for family in stock if family.represents(other)}
    assert found == ({"gpt2"} if position == "learned" and "norm_eps" in change else set())
    assert MOMENTUM.represents(other)


def test_dropout_and_absent_tokens_do_not_matter():
    decoder = DecoderConfig(90, 128, 64, 2, 4, dropout=0.3, activation_dropout=0.2, absent_tokens=(7,))
    assert [family.model_type for family in FAMILIES if family.represents(decoder)] == ["xglm", "momentum_lm"]


def test_folders_written_before_an_option_was_there():
    content = MOMENTUM.config(DecoderConfig(90, 32, 48, 2, 4), 90)
    new = [
        "norm",
        "norm_eps",
        "ffn",
        "num_key_value_heads",
        "head_dim",
        "bias",
        "qk_norm",
        "rotary_base",
        "parallel_residual",
    ]
    old = {name: value for name, value in content.items() if name not in new}
    assert len(old) == len(content) - len(new)
    decoder = MOMENTUM.decoder_config(old, 90)
    assert decoder == DecoderConfig(90, 32, 48, 2, 4) and decoder.norm == default("norm")
    with pytest.raises(UserError, match="hidden_size None: must be a whole number"):
        MOMENTUM.decoder_config({name: value for name, value in old.items() if name != "hidden_size"}, 90)
