"""What cannot be converted is refused in one line that says why, and leaves nothing behind."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DELETE"}))


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False: the model normalises after each "
        "block, as OPT-350m does"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, not the hidden size 32: the embeddings go "
        "through projections"),
        ("opt", {"enable_bias": False}, "enable_bias is False: the decoder's projections have biases"),
        ("opt", {"_remove_final_layer_norm": True}, "the decoder has a norm after its last block"),
        ("opt", {"activation_function": "relu2"}, "activation_function 'relu2', which the decoder does not have (gelu, "
        "relu, "),
        ("opt", {"hidden_size": "DELETE"}, "hidden_size None: must be a whole number"),
        ("opt", {"hidden_size": "32"}, "hidden_size '32': must be a whole number"),
        ("opt", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("opt", {"vocab_size": "DELETE"}, "gives no vocab_size"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "the decoder scales attention logits alike in all layers"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon 0: must be at least 1e-12"),
        ("gpt2", {"add_cross_attention": True}, "the decoder has no cross-attention"),
        ("xglm", {"pad_token_id": 5}, "pad_token_id is 5: fairseq's sinusoidal positions follow from a padding token "
        "of id 1"),
        ("llama", {"attention_bias": True}, "attention_bias is True: the decoder has biases on all projections, on "
         "queries, keys and values, or on none; use it as it is with fairseq-eval --hf-model"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True: the decoder has biases on all projections"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: positions turn whole heads"),
        ("llama", {"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ("llama", {"hidden_size": 32}, "hidden_size 32 is not a multiple of num_attention_heads 6"),
        ("llama", {"head_dim": 9}, "position rotary needs an even head size, and it is 9"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps 'small': must be a number"),
        ("llama", {"rope_theta": 0, "rope_parameters": None}, "rope_theta 0: must be at least 1"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear': the "
         "decoder has rotary positions as they are and those of Llama 3 (default, llama3); use it as it is"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters has rope_type 'yarn'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters has its own "
         "'full_attention'"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters is [1]: must be an object"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling "),
        ("mistral", {"sliding_window": 16}, "sliding_window is 16: the decoder's attention goes back to the first "
         "token; use it as it is with fairseq-eval --hf-model"),
        ("mistral", {"sliding_window": "DELETE", "max_position_embeddings": 5000}, "sliding_window is 4096"),
        ("mistral", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu', which the decoder does not have"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_window is 8"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types has 'linear_attention', and the decoder's layers "
         "are all of full_attention"),
        ("qwen3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
         "sliding_window is 4"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True: the decoder has biases on all projections"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False: the decoder has biases on all projections"),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.4}, "needs an even head size, and 32 / 4 is 8, of which "
         "0.4 is 3"),
        ("gpt2", {"model_type": "mixtral", "num_local_experts": 8}, "model_type is 'mixtral' (feed-forward layers with "
         "experts, num_local_experts 8, which the decoder has not), and none of xglm, opt, gpt2, llama, mistral, "
         "qwen2, qwen3, gpt_neox, momentum_lm; use it as it is with fairseq-eval --hf-model"),
        ("gpt2", {"model_type": "gemma2", "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which the"),
        ("gpt2", {"model_type": "olmo2"}, "model_type is 'olmo2' (norms after attention and feed-forward layers, "),
        ("gpt2", {"model_type": "bloom"}, "model_type is 'bloom' (ALiBi positions, which the decoder has not)"),
        ("gpt2", {"model_type": "something"}, "model_type is 'something', and none of xglm, "),
        ("gpt2", {"model_type": "DELETE"}, "model_type is None, and none of xglm, "),
    ],
)  # fmt: skip
def test_models_that_the_decoder_cannot_be(make_model, refused, tmp_path, family, changes, message):
    _, theirs = make_model(family)
    edit(theirs, **changes)
    line = refused(theirs, tmp_path / "ours")
    assert message in line and "config.json" in line
    assert sorted(os.listdir(tmp_path)) == ["theirs"]


def remove(tensors):
    del tensors["transformer.h.1.mlp.c_fc.bias"]


def add(tensors):
    tensors |= {f"transformer.h.{layer}.mlp.c_fc.bias": torch.zeros(3) for layer in (3, 4)}


def reshape(tensors):
    tensors["transformer.h.1.attn.c_attn.weight"] = torch.zeros(96, 32)


def quantise(tensors):
    tensors["transformer.h.1.ln_1.weight"] = torch.zeros(32, dtype=torch.int8)


@pytest.mark.parametrize(
    "change, message",
    [
        (remove, "its tensors do not fit its config.json: they lack transformer.h.1.mlp.c_fc.bias"),
        (add, "they have transformer.h.3.mlp.c_fc.bias and 1 more, which the model does not"),
        (reshape, "transformer.h.1.attn.c_attn.weight is (96, 32), and by config.json (32, 96)"),
        (quantise, "transformer.h.1.ln_1.weight is in torch.int8: give the model before it was quantised"),
    ],
)
def test_tensors_that_do_not_fit(make_model, refused, tmp_path, change, message):
    _, theirs = make_model("gpt2")
    tensors = load_file(theirs / "model.safetensors")
    change(tensors)
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    assert message in refused(theirs, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path)) == ["theirs"]


def infinite(tensors):
    tensors["transformer.h.1.ln_1.weight"][3] = -torch.inf


def undefined(tensors):
    tensors["transformer.wte.weight"][5, 5] = torch.nan


@pytest.mark.parametrize("flags", [[], ["--dtype", "fp16"]])
@pytest.mark.parametrize("change, what", [(infinite, "holds infinity"), (undefined, "holds NaN")])
def test_broken_weights(make_model, refused, tmp_path, change, what, flags):
    _, theirs = make_model("gpt2")
    tensors = load_file(theirs / "model.safetensors")
    change(tensors)
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    line = refused(theirs, tmp_path / "ours", *flags)
    assert f"{theirs}: " in line and f"weight {what}: the model is broken" in line
    assert sorted(os.listdir(tmp_path)) == ["theirs"]


def test_a_dtype_that_cannot_hold_the_weights(make_model, convert, refused, tmp_path):
    """Both ways; what becomes 0 is well; the largest numbers stay where they fit."""
    _, theirs = make_model("opt")
    path = theirs / "model.safetensors"
    tensors = load_file(path)
    name = "model.decoder.layers.1.fc1.weight"
    tensors[name][2, 3], tensors[name][0, 0] = -65504, 1e-12
    save_file(tensors, path, {"format": "pt"})
    convert(theirs, tmp_path / "ours", "--dtype", "fp16")
    weight = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)["model"]["decoder.layers.1.fc1.weight"]
    assert weight[2, 3] == -65504 and weight[0, 0] == 0 and weight.dtype == torch.float16
    tensors[name][2, 3] = -70000
    save_file(tensors, path, {"format": "pt"})
    convert(theirs, tmp_path / "large")
    for source, called in ((theirs, "layers.1.fc1.weight"), (tmp_path / "large", name)):
        line = refused(source, tmp_path / "x", "--dtype", "fp16")
        assert f"{called} reaches 70000, and fp16 ends at 65504: use --dtype bf16 or fp32" in line
    tensors[name][2, 3] = 3.4e38
    save_file(tensors, path, {"format": "pt"})
    line = refused(theirs, tmp_path / "x", "--dtype", "bf16")
    assert "reaches 3.4e+38, and bf16 ends at 3.38953e+38: use --dtype fp32, or leave out --dtype" in line
    tensors[name][2, 3] = 1
    save_file(
        {key: tensor.double() * (1e300 if key == name else 1) for key, tensor in tensors.items()},
        path,
        {"format": "pt"},
    )
    assert "ends at 3.40282e+38: leave out --dtype" in refused(theirs, tmp_path / "x", "--dtype", "fp32")
    assert sorted(os.listdir(tmp_path)) == ["large", "ours", "theirs"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_a_checkpoint_of_other_numbers(make_lm, refused, tmp_path, dtype):
    state = {f"decoder.{name}": tensor for name, tensor in make_lm().model.state_dict().items()}
    state["decoder.layers.0.fc1.weight"] = state["decoder.layers.0.fc1.weight"].to(dtype)
    torch.save({"model": state}, tmp_path / "model.pt")
    line = refused(tmp_path / "model.pt", tmp_path / "x", "--model-overrides", "{'decoder_attention_heads': 2}")
    assert f"decoder.layers.0.fc1.weight is in {dtype}: give the model in fp32, bf16 or fp16" in line


@pytest.mark.parametrize(
    "content, message",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "gpt2", "architectures": 5}', "gives no vocab_size"),
        ('{"model_type": ["gpt2"], "architectures": {"a": 1}}', "model_type is ['gpt2'], and none of xglm, "),
        ('{"vocab_size": true}', "gives no vocab_size"),
        ('{"vocab_size": 1000000000000}', "gives no vocab_size"),
        ('{"n_layer": 1000000000}', "n_layer 1000000000: must be at most"),
        ('{"n_layer": 500}', "there are 40 of them, for 500 layers"),
        ('{"n_layer": -1}', "n_layer -1: must be at least 1"),
        ('{"n_head": 0}', "n_head 0: must be at least 1"),
        ('{"n_embd": 4000000000000}', "n_embd 4000000000000: must be at most 1,048,576"),
        ('{"resid_pdrop": NaN}', "resid_pdrop nan: must be a probability, from 0 to 1"),
        ('{"attn_pdrop": 1e999}', "attn_pdrop inf: must be a probability, from 0 to 1"),
        ('{"activation_function": ' + "[" * 150 + "]" * 150 + "}", "...: must be a word"),
    ],
)
def test_configurations_of_no_model(make_model, refused, tmp_path, content, message):
    _, theirs = make_model("gpt2")
    if content.endswith("}") and "model_type" not in content:
        edit(theirs, **json.loads(content))
    else:
        (theirs / "config.json").write_text(content)
    assert message in refused(theirs, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path)) == ["theirs"]


def test_pipes_are_not_waited_for(make_model, refused, tmp_path):
    _, theirs = make_model("gpt2")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (theirs / name).rename(tmp_path / "away")
        os.mkfifo(theirs / name)
        assert f"{theirs / name} is a named pipe, not a file" in refused(theirs, tmp_path / "ours")
        (theirs / name).unlink()
        (tmp_path / "away").rename(theirs / name)
    for name in ("pipe.pt", "checkpoint-shard0.pt"):
        os.mkfifo(tmp_path / name)
        assert f"{name} is a named pipe, not a file" in refused(tmp_path / name, tmp_path / "ours")
    assert "/dev/zero is a device, not a file" in refused("/dev/zero", tmp_path / "ours")


def test_a_damaged_file_of_pytorch(make_model, refused, tmp_path):
    _, theirs = make_model("gpt2")
    tensors = load_file(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    for changes, message in (
        ({5: torch.zeros(2)}, "holds 5, which is no tensor"),
        (
            {"transformer.wpe.weight": torch.empty(48, 32, device="meta")},
            "pytorch_model.bin holds a tensor without values",
        ),
        ({"transformer.wpe.weight": torch.eye(32).to_sparse()}, "pytorch_model.bin holds"),
    ):
        torch.save(tensors | changes, theirs / "pytorch_model.bin")
        assert message in refused(theirs, tmp_path / "ours")


def test_damaged_files(make_model, refused, tmp_path):
    _, theirs = make_model("gpt2")
    weights, out = theirs / "model.safetensors", tmp_path / "ours"
    whole = weights.read_bytes()
    for size in (0, 100, len(whole) - 10):
        weights.write_bytes(whole[:size])
        assert f"model.safetensors ({size:,} bytes) is torn or not a safetensors file" in refused(theirs, out)
    weights.rename(theirs / "pytorch_model.bin")
    assert "pytorch_model.bin" in (line := refused(theirs, out)) and "is torn or not a checkpoint" in line
    torch.save({"a": 1}, theirs / "pytorch_model.bin")
    assert "pytorch_model.bin holds a, which is no tensor" in refused(theirs, out)
    torch.save({"a": os.system}, theirs / "pytorch_model.bin")
    assert "add --trust-checkpoint" in refused(theirs, out)
    (theirs / "pytorch_model.bin").unlink()
    assert "holds no weights: model.safetensors or pytorch_model.bin" in refused(theirs, out)
    index = theirs / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json is not the index of a model in parts" in refused(theirs, out)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "index.json is not the index of a model in parts" in refused(theirs, out)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors is missing, a part of the model" in refused(theirs, out)
    (theirs / "config.json").write_text("{")
    assert "config.json cannot be read: " in refused(theirs, out)
    (theirs / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refused(theirs, out)
    (theirs / "config.json").unlink()
    assert "is neither a model of Hugging Face (it has no config.json) nor a fairseq checkpoint" in refused(theirs, out)
    assert sorted(os.listdir(tmp_path)) == ["theirs"]


def test_tokenizers_that_do_not_do(make_model, refused, tmp_path):
    _, theirs = make_model("gpt2")
    (theirs / "tokenizer.json").write_text("{}")
    assert "transformers does not load the tokenizer" in refused(theirs, tmp_path / "ours")
    for path in theirs.glob("tokenizer*"):
        path.unlink()
    edit(theirs, eos_token_id=None, bos_token_id=None)
    assert "does not say which token ends a text" in refused(theirs, tmp_path / "ours")
    transformers.XGLMTokenizer().save_pretrained(theirs)  # what comes of files that transformers passes over
    assert "transformers finds 11 tokens in the tokenizer's files, and the model has 301" in refused(
        theirs, tmp_path / "ours"
    )


def test_outputs_that_do_not_do(make_model, convert, refused, tmp_path, monkeypatch):
    _, theirs = make_model("opt")
    monkeypatch.chdir(tmp_path)
    assert "/nowhere does not exist; make that folder first" in refused(theirs, tmp_path / "nowhere" / "ours")
    (tmp_path / "file").write_text("mine")
    assert "file is not a folder; OUTPUT is the folder to make" in refused(theirs, tmp_path / "file", "--force")
    assert "holds" in refused("theirs", ".") and "choose another OUTPUT" in refused("theirs", "theirs", "--force")
    (tmp_path / "link").symlink_to("elsewhere")
    assert "link is a link; OUTPUT is the folder to make" in refused(theirs, tmp_path / "link", "--force")
    assert "--dtype does nothing to a-shard0.pt, which is a part of a checkpoint" in refused(
        "a-shard0.pt", "b.pt", "--dtype", "fp16"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    assert "mine holds notes.md, which a conversion does not write" in refused(theirs, tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "notes.md").read_text() == "mine"
    for name in (".own.partial", ".own.old"):  # a user's, by chance
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.md").write_text("mine")
        line = refused(theirs, tmp_path / "own", "--force")
        assert f"{name} is where a conversion keeps what is not finished, and is not from one" in line
        assert (tmp_path / name / "notes.md").read_text() == "mine"
        (tmp_path / name).rename(tmp_path / f"kept{name}")
        (tmp_path / name).symlink_to(tmp_path / "mine")
        assert "is not from one; move it away" in refused(theirs, tmp_path / "own", "--force")
        (tmp_path / name).unlink()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to(theirs / "config.json")
    assert "linked holds config.json, which a conversion does not write" in refused(
        theirs, tmp_path / "linked", "--force"
    )
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is not a folder; OUTPUT is the folder to make" in refused(theirs, tmp_path / "pipe", "--force")
    assert "/dev/null is not a folder" in refused(theirs, "/dev/null", "--force")
    for name in ("link", "pipe", "/dev/null", "mine"):
        assert "is a link, a folder or a device; OUTPUT of a checkpoint in parts" in refused(
            "a-shard0.pt", name, "--force"
        )
    (tmp_path / "empty").mkdir()
    convert(theirs, "empty")
    assert "empty is there already; choose another OUTPUT, or add --force" in refused(theirs, tmp_path / "empty")
    assert "does not exist; give a checkpoint, a folder, or the name of a model" in refused(
        tmp_path / "no.pt", tmp_path / "x"
    )
    assert "--tokenizer does nothing to " in refused(theirs, tmp_path / "x", "--tokenizer", "y")
    assert "which is a model of Hugging Face; leave it out" in refused(
        theirs, tmp_path / "x", "--model-overrides", "{'a': 1}"
    )
    assert "checkpoints/checkpoint_bset.pt does not exist; give a checkpoint" in refused(
        "checkpoints/checkpoint_bset.pt", tmp_path / "x"
    )
    torch.save({"model": None}, tmp_path / "none.pt")
    assert "none.pt: it holds no decoder-only language model" in refused(tmp_path / "none.pt", tmp_path / "x")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert "bad.pt" in refused(tmp_path / "bad.pt", tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_the_source_is_never_replaced(make_model, convert, refused, tmp_path):
    """Not as the folder of the file, nor through a link."""
    _, theirs = make_model("gpt2")
    convert(theirs, tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path)
    for source, output in (
        ("ours/model.pt", "ours"),
        ("ours/model.pt", "link/ours"),
        ("theirs", "link/theirs"),
        ("link/ours", "ours"),
    ):
        before = (tmp_path / source).stat().st_mtime_ns
        assert f"{output} holds {tmp_path / source}; choose another OUTPUT" in refused(
            tmp_path / source, tmp_path / output, "--force"
        )
        assert (tmp_path / source).stat().st_mtime_ns == before


def test_a_model_of_another_architecture_built_by_transformers(refused, tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    line = refused(tmp_path / "mixtral", tmp_path / "ours")
    assert "config.json: model_type is 'mixtral' (feed-forward layers with experts, num_local_experts 8" in line
