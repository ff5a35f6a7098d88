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
        ("opt", {"activation_function": "silu"}, "activation_function 'silu', which the decoder does not have (gelu, "
        "relu, "),
        ("opt", {"hidden_size": "DELETE"}, "hidden_size None: must be a whole number"),
        ("opt", {"hidden_size": "32"}, "hidden_size '32': must be a whole number"),
        ("opt", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("opt", {"vocab_size": "DELETE"}, "gives no vocab_size"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "the decoder scales attention logits alike in all layers"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06: the decoder's layer norms have 1e-5"),
        ("gpt2", {"add_cross_attention": True}, "the decoder has no cross-attention"),
        ("xglm", {"pad_token_id": 5}, "pad_token_id is 5: fairseq's sinusoidal positions follow from a padding token "
        "of id 1"),
        ("gpt2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is none of "
        "XGLMForCausalLM, "
         "OPTForCausalLM, GPT2LMHeadModel: Llama, Mistral, Qwen, GPT-NeoX and the like have RMSNorm"),
        ("gpt2", {"model_type": "gpt_neox", "architectures": "DELETE"}, "gpt_neox is none of"),
        ("gpt2", {"model_type": "llama"}, "use it as it is with fairseq-eval --hf-model"),
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
        ('{"model_type": ["gpt2"], "architectures": {"a": 1}}', "is none of XGLMForCausalLM"),
        ('{"vocab_size": true}', "gives no vocab_size"),
        ('{"vocab_size": 1000000000000}', "gives no vocab_size"),
        ('{"n_layer": 1000000000}', "n_layer 1000000000: must be at most"),
        ('{"n_layer": 500}', "there are 40 of them, for 500 layers"),
        ('{"n_layer": -1}', "n_layer -1: must be at least 1"),
        ('{"n_head": 0}', "n_head 0: must be at least 1"),
        ('{"n_embd": 4000000000000}', "n_embd 4000000000000: must be at most 1,048,576"),
        ('{"resid_pdrop": NaN}', "resid_pdrop nan: must be a probability, from 0 to 1"),
        ('{"attn_pdrop": 1e999}', "attn_pdrop inf: must be a probability, from 0 to 1"),
        ('{"activation_function": ' + "[" * 500 + "]" * 500 + "}", "...: must be a word"),
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
        before = (tmp_path / source).stat()
        assert f"{output} holds {tmp_path / source}; choose another OUTPUT" in refused(
            tmp_path / source, tmp_path / output, "--force"
        )
        assert (tmp_path / source).stat() == before


def test_a_model_of_another_architecture_built_by_transformers(refused, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "grouped heads or parallel blocks, which fairseq's decoder has not" in refused(
        tmp_path / "llama", tmp_path / "ours"
    )
