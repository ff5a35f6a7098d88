"""Models of transformers beside what they are converted to: the same logits, the same text, the same bits on the way
back.
"""

import argparse
import copy
import json

import pytest
import torch
import transformers
from fairseq.data import Dictionary as FairseqDictionary
from fairseq.sequence_generator import SequenceGenerator
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import momentum_lm
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.text.tokenizer import load_tokenizer

from .conftest import SHAPES, gpt2_files, shuffled

momentum_lm.register()
FAMILIES = list(SHAPES)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 24, "rope_theta": 5000.0}
CASES = [
    ("gpt2", {}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
    ("gpt2", {"layer_norm_epsilon": 1e-3}),
    ("opt", {}),
    ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    ("xglm", {}),
    ("xglm", {"tie_word_embeddings": False, "scale_embedding": False, "activation_function": "relu"}),
    ("xglm", {"activation_function": "gelu_new"}),
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6, "hidden_act": "gelu"}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 48, "hidden_size": 36, "num_key_value_heads": 1}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 48, "max_window_layers": 0}),
    ("qwen2", {"num_attention_heads": 6, "head_dim": 10, "rope_parameters": LLAMA3}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 3, "rms_norm_eps": 1e-5}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75, "rope_theta": 500.0}}),
    ("gpt_neox", {"hidden_size": 40, "layer_norm_eps": 1e-3, "rotary_pct": 1.0}),
]  # fmt: skip


def their_ids(folder, ours):
    """A converted model's own token ids from those of its dictionary."""
    own = {here: there for there, here in reversed(list(enumerate(load_tokenizer(folder).own_to_dictionary)))}
    return [[own[int(i)] for i in row] for row in ours]


def fairseq_model(folder):
    """The model as fairseq builds it from the checkpoint's own options."""
    state = torch.load(folder / "model.pt", weights_only=True)
    cfg = OmegaConf.create(state["cfg"])
    dictionary = FairseqDictionary.load(str(folder / "dict.txt"))
    task = type("Task", (), {"source_dictionary": dictionary, "target_dictionary": dictionary})
    from fairseq.models import build_model

    model = build_model(cfg.model, task, from_checkpoint=True).eval()
    model.load_state_dict(state["model"], strict=True)
    return model, dictionary


@pytest.mark.parametrize("family, changes", CASES)
def test_logits_there_and_back(make_model, convert, tmp_path, family, changes):
    model, theirs = make_model(family, **changes)
    convert(theirs, tmp_path / "ours")
    ours, dictionary = fairseq_model(tmp_path / "ours")
    tokens = torch.randint(4, model.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    own = torch.tensor(their_ids(tmp_path / "ours", tokens))
    with torch.no_grad():
        found, expected = ours(tokens)[0], model(own).logits
        absent = ours.decoder.config.absent_tokens
        kept = [i for i in range(len(dictionary)) if i not in absent]
        order = torch.tensor(their_ids(tmp_path / "ours", [kept])[0])
        torch.testing.assert_close(found[..., kept], expected[..., order], atol=1e-5, rtol=1e-5)
    assert len(kept) == model.config.vocab_size
    fairseq_ids = family in ("opt", "xglm")
    assert (absent == ()) == fairseq_ids and bool((found[..., list(absent)] == -torch.inf).all())
    assert len(dictionary) % 8 == 0 or fairseq_ids
    native = load_native(tmp_path / "ours")
    assert torch.equal(native.model(tokens)[..., kept], found[..., kept])
    assert native.bos == ((0,) if family in ("llama", "mistral") else (2,))

    convert(tmp_path / "ours", tmp_path / "again")
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    # Llama computes the same as a Mistral without a window, but wants a width that is a multiple of its heads
    llama = family == "mistral" and model.config.hidden_size % model.config.num_attention_heads == 0
    assert type(again) is (transformers.LlamaForCausalLM if llama else type(model)) and not any(loading.values())
    with torch.no_grad():
        assert torch.equal(again.eval()(own).logits, expected)
    convert(tmp_path / "again", tmp_path / "ours_again")
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("ours", "ours_again"))
    assert first["cfg"] == second["cfg"]
    assert list(first["model"]) == list(second["model"])
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    for name in ("dict.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "ours_again" / name).read_bytes(), name


class EndAt(transformers.LogitsProcessor):
    """Allows the end at one length, and there nothing else: what fairseq does at its longest."""

    def __init__(self, length, end):
        self.length, self.end = length, end

    def __call__(self, input_ids, scores):
        others = torch.full_like(scores, -torch.inf)
        others[:, self.end] = scores[:, self.end]
        return others if input_ids.shape[1] == self.length else scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beam", [1, 4])
def test_generation_token_for_token(make_model, convert, tmp_path, family, beam):
    """fairseq's search over the converted model finds what transformers' finds."""
    model, theirs = make_model(family, tie_word_embeddings=False)  # tied, random models say one word again and again
    convert(theirs, tmp_path / "ours")
    ours, dictionary = fairseq_model(tmp_path / "ours")
    rows, given, new = 3, 6, 24
    prompt = torch.randint(4, model.config.vocab_size, (rows, given), generator=torch.Generator().manual_seed(3))
    prompt[:, 0] = 2
    own = torch.tensor(their_ids(tmp_path / "ours", prompt))
    end = own[0, 0].item()
    never = [i for i, symbol in enumerate(load_tokenizer(tmp_path / "ours").symbols) if symbol in ("<pad>", "<unk>")]
    expected = model.generate(
        own, attention_mask=torch.ones_like(own), max_new_tokens=new + 1, min_new_tokens=new, num_beams=beam,
        do_sample=False,
        length_penalty=0.0, eos_token_id=end, pad_token_id=end, logits_processor=[EndAt(given + new, end)],
        suppress_tokens=never or None,  # which fairseq never generates
    )  # fmt: skip
    length = given - 1 + new
    generator = SequenceGenerator(
        [ours],
        dictionary,
        beam_size=beam,
        max_len_a=0,
        max_len_b=length,
        min_len=length,
        normalize_scores=False,
        unk_penalty=float("inf"),
    )
    sample = {"id": torch.arange(rows), "net_input": {"src_tokens": prompt, "src_lengths": torch.full((rows,), given)}}
    found = generator.generate([ours], sample, prefix_tokens=prompt[:, 1:], bos_token=2)
    found = [hypotheses[0]["tokens"].tolist() for hypotheses in found]
    found = their_ids(tmp_path / "ours", found)
    assert found == expected[:, 1:].tolist()
    assert len({token for row in found for token in row[given:]}) > 8  # no endless repetition


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_can_be_chosen(make_model, convert, tmp_path, family, dtype):
    _, theirs = make_model(family, dtype)
    convert(theirs, tmp_path / "ours")
    weights = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)["model"]
    assert {t.dtype for name, t in weights.items() if name.endswith(("weight", "bias"))} == {dtype}
    convert(tmp_path / "ours", tmp_path / "again")
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    convert(theirs, tmp_path / "single", "--dtype", "fp32")
    weights = torch.load(tmp_path / "single" / "model.pt", weights_only=True)["model"]
    assert {t.dtype for t in weights.values()} == {torch.float32}


LLAMA = {"norm": "rms", "ffn": "gated", "activation": "silu", "bias": "none", "position": "rotary"}
LLAMA |= {"kv_heads": 2, "head_dim": 10, "scale_embeddings": False}
NEOX = {"position": "rotary", "rotary_fraction": 0.5, "parallel_residual": True, "scale_embeddings": False}


def save_ours(folder, tokenizer_folder, **changes):
    """A checkpoint such as fairseq-train writes, beside a SentencePiece tokenizer."""
    from momentum_lm.formats.from_huggingface import checkpoint
    from momentum_lm.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    shape = {"dim": 32, "ffn_dim": 48, "layers": 2, "heads": 4, "max_positions": 40}
    config = DecoderConfig(tokenizer.vocab_size, **{**shape, **changes})
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    tokenizer.dictionary.save(folder / "dict.txt")
    (folder / "sentencepiece.model").write_bytes((tokenizer_folder / "sentencepiece.model").read_bytes())
    weights = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()} | {
        "decoder.version": torch.tensor([3.0])
    }
    torch.save({**checkpoint(config, add_bos=False), "model": weights}, folder / "checkpoint_best.pt")
    return model


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({}, "XGLMForCausalLM"),
        ({"scale_embeddings": False, "tie_embeddings": False, "activation": "relu"}, "XGLMForCausalLM"),
        ({"position": "learned", "scale_embeddings": False, "activation": "gelu_accurate"}, "OPTForCausalLM"),
        ({"position": "learned"}, "MomentumLMForCausalLM"),
        ({"position": "rotary", "tie_embeddings": False}, "MomentumLMForCausalLM"),
        (LLAMA, "LlamaForCausalLM"),
        ({**LLAMA, "bias": "all", "tie_embeddings": False, "rotary_base": 5e5, "kv_heads": 4}, "LlamaForCausalLM"),
        ({**LLAMA, "rotary_scaling": "llama3:8,1,4,16", "activation": "gelu"}, "LlamaForCausalLM"),
        ({**LLAMA, "dim": 30, "tie_embeddings": False}, "MistralForCausalLM"),
        ({**LLAMA, "bias": "qkv"}, "Qwen2ForCausalLM"),
        ({**LLAMA, "qk_norm": True, "norm_eps": 1e-6}, "Qwen3ForCausalLM"),
        (NEOX, "GPTNeoXForCausalLM"),
        ({**NEOX, "parallel_residual": False, "rotary_fraction": 1.0, "dropout": 0.1}, "GPTNeoXForCausalLM"),
        ({"momentum_kind": "ema", "momentum_eta": 0.7}, "MomentumLMForCausalLM"),
        (
            {"momentum_kind": "ema", "momentum_learned": True, "momentum_normalize": True, "momentum_gate": "zero"},
            "MomentumLMForCausalLM",
        ),
        ({"momentum_kind": "multi_ema", "position": "rotary"}, "MomentumLMForCausalLM"),
    ],
)
def test_what_was_trained_here(convert, tmp_path, tokenizer_folder, changes, architecture):
    model = save_ours(tmp_path / "ours", tokenizer_folder, **changes)
    assert architecture in convert(tmp_path / "ours", tmp_path / "theirs")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", trust_remote_code=architecture.startswith("Momentum"), output_loading_info=True
    )
    assert type(loaded).__name__ == architecture and not any(info.values()), info
    tokens = torch.randint(4, model.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "again")
    first = torch.load(tmp_path / "ours" / "checkpoint_best.pt", weights_only=True)
    second = torch.load(tmp_path / "again" / "model.pt", weights_only=True)
    assert first["cfg"] == second["cfg"]
    extra = {"decoder.embed_positions._float_tensor"} if model.config.position == "sinusoidal" else set()
    assert second["model"].keys() == first["model"].keys() | extra
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["dict.txt", "model.pt", "sentencepiece.model"]
    for name in ("dict.txt", "sentencepiece.model"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_a_checkpoint_as_the_fairseq_dense_lms_were_published(convert, tmp_path):
    """Old keys, fp16, options in a namespace, GPT-2's files and a dict.txt in an order of its own."""
    tokenizer = gpt2_files(tmp_path / "ours", shuffled)
    config = DecoderConfig(tokenizer.vocab_size, 32, 64, 2, 4, 40)
    torch.manual_seed(0)
    model = Decoder(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"decoder.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    weights |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    args = argparse.Namespace(
        arch="transformer_lm_gpt", task="language_modeling", decoder_embed_dim=32, decoder_ffn_embed_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4, activation_fn="gelu", decoder_learned_pos=False, no_scale_embedding=False,
        share_decoder_input_output_embed=True, decoder_normalize_before=True, tokens_per_sample=40,
        max_target_positions=40,
        add_bos_token=False, data="/data/elsewhere",
    )  # fmt: skip
    torch.save(
        {"args": args, "model": weights, "extra_state": {}, "optimizer_history": [{}]}, tmp_path / "ours" / "model.pt"
    )
    assert "XGLMForCausalLM" in convert(tmp_path / "ours", tmp_path / "theirs", "--dtype", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ids = words("Hello world the film", return_tensors="pt").input_ids
    assert ids.tolist() == [[2, *tokenizer.encode("Hello world the film")]]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.half().float()(ids), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[
            0, ids.shape[1] :
        ].tolist()
    assert new and words.decode(new, skip_special_tokens=True) == tokenizer.decode(new)


def test_large_models_are_cut(monkeypatch, make_model, convert, tmp_path):
    import momentum_lm.formats.to_huggingface as to_huggingface

    _, theirs = make_model("gpt2")
    convert(theirs, tmp_path / "ours")
    monkeypatch.setattr(to_huggingface, "PART", 60_000)
    assert " files of weights" in convert(tmp_path / "ours", tmp_path / "parts")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    before = load_file(theirs / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    convert(tmp_path / "parts", tmp_path / "again")
    first, second = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("ours", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_older_files(make_model, convert, tmp_path, family):
    """pytorch_model.bin; names without the prefix of the model with its output projection; tensors that say nothing."""
    _, theirs = make_model(family)
    tensors = load_file(theirs / "model.safetensors")
    base = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(family, "model.")
    bare = {name.removeprefix(base): tensor for name, tensor in tensors.items()}
    if family == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if family == "xglm":
        bare["embed_positions.weights"] = torch.zeros(50, 32)
    if family in ("llama", "gpt_neox"):
        kind = "self_attn" if family == "llama" else "attention"
        bare[f"layers.1.{kind}.rotary_emb.inv_freq"] = torch.ones(5)
    if family == "gpt_neox":
        bare["layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        bare["lm_head.weight"] = bare.pop("embed_out.weight")  # as transformers 5 has it in memory
    tied = (tensor for name, tensor in bare.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    bare.setdefault("lm_head.weight", next(tied, torch.empty(0)).clone())
    (theirs / "model.safetensors").unlink()
    torch.save(bare, theirs / "pytorch_model.bin")
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)


def test_without_a_tokenizer(make_model, convert, tmp_path):
    for family in FAMILIES:
        ids = {"bos_token_id": 5, "pad_token_id": -1} if family == "gpt2" else {"eos_token_id": [2, 50]}
        _, theirs = make_model(family, name=family, **ids)
        for path in theirs.glob("tokenizer*"):
            path.unlink()
        assert "has no tokenizer" in convert(theirs, tmp_path / f"{family}_ours")
        assert "no tokenizer beside" in convert(tmp_path / f"{family}_ours", tmp_path / f"{family}_again")
        before, after = (
            load_file(theirs / "model.safetensors"),
            load_file(tmp_path / f"{family}_again" / "model.safetensors"),
        )
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_of_another_size(make_model, convert, tmp_path, family, tokenizer_of):
    """A matrix with rows to spare, as OPT's, and one that lacks those of tokens which were added later."""
    rows = len(tokenizer_of(family)) + 13
    _, theirs = make_model(family, vocab_size=rows)
    before = load_file(theirs / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in before.values())
    for added in (0, 20):
        tokenizer = copy.deepcopy(tokenizer_of(family))
        tokenizer.add_tokens([f"[added {i}]" for i in range(added)])
        tokenizer.save_pretrained(theirs)
        convert(theirs, tmp_path / f"ours{added}")
        out = convert(tmp_path / f"ours{added}", tmp_path / f"again{added}")
        after = load_file(tmp_path / f"again{added}" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert f" of {parameters:,} parameters" in out


def test_fairseqs_dense_lms_with_the_vocabulary_of_gpt2(make_model, convert, tmp_path, tokenizer_of):
    """XGLM with GPT-2's tokens first and fairseq's specials last, all of them or what is needed."""
    for count in (4, 2):
        tokenizer = copy.deepcopy(tokenizer_of("gpt2"))
        first = len(tokenizer)
        roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        tokenizer.add_special_tokens(dict(list(roles.items())[:count]))
        model, theirs = make_model(
            "xglm", name=f"theirs{count}", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
        )
        for path in theirs.glob("tokenizer*"):
            path.unlink()
        tokenizer.save_pretrained(theirs)
        convert(theirs, tmp_path / f"ours{count}")
        native = load_native(tmp_path / f"ours{count}")
        theirs_ids = tokenizer("the film is good", add_special_tokens=False).input_ids
        assert max(theirs_ids) < first and native.bos == (2,)
        with torch.no_grad():
            found = native.model(torch.tensor([[2, *native.encode(["the film is good"])[0]]]))
            expected = model(torch.tensor([[tokenizer.eos_token_id, *theirs_ids]])).logits
        order = native.tokenizer.own_to_dictionary
        torch.testing.assert_close(found[..., order], expected, atol=1e-5, rtol=1e-5)
        convert(tmp_path / f"ours{count}", tmp_path / f"again{count}")
        before, after = (
            load_file(theirs / "model.safetensors"),
            load_file(tmp_path / f"again{count}" / "model.safetensors"),
        )
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"again{count}").eval()
        assert type(again) is type(model) and again.config.eos_token_id == tokenizer.eos_token_id
        convert(tmp_path / f"again{count}", tmp_path / f"ours_again{count}")


def test_norms_in_fp32_beside_matrices_in_fp16(make_model, convert, tmp_path):
    _, theirs = make_model("gpt2")
    tensors = load_file(theirs / "model.safetensors")
    tensors = {name: tensor if ".ln_" in name else tensor.half() for name, tensor in tensors.items()}
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    convert(theirs, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in tensors.items())


def test_gpt2s_own_files_beside_a_model_without_tokenizer(make_model, convert, tmp_path, tokenizer_of):
    """They have the dictionary's ids, and so has the model then."""
    _, theirs = make_model("gpt2")
    for path in theirs.glob("tokenizer*"):
        path.unlink()
    convert(theirs, tmp_path / "ours")
    model = json.loads(tokenizer_of("gpt2").backend_tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(tokenizer_of("gpt2")) - 1}
    (tmp_path / "ours" / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "ours" / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    convert(tmp_path / "ours", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)(
        "the film", return_tensors="pt"
    ).input_ids
    native = load_native(tmp_path / "ours")
    assert ids.tolist() == [[2, *native.encode(["the film"])[0]]]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, native.model(ids), atol=1e-5, rtol=1e-5)


def test_momentum_on_gpt2_keeps_its_vocabulary(make_model, convert, tmp_path):
    """With momentum a GPT-2 is no GPT-2: it goes out in the dictionary's order, its absent tokens with it."""
    _, theirs = make_model("gpt2")
    convert(theirs, tmp_path / "ours")
    state = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)
    state["cfg"]["model"] |= {"_name": "momentum_lm_tiny", "momentum_kind": "ema", "momentum_eta": 0.5}
    torch.save(state, tmp_path / "ours" / "model.pt")
    convert(tmp_path / "ours", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    native = load_native(tmp_path / "ours")
    tokens = torch.tensor([[2, 40, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, native.model(tokens), atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello world\n the film", "café 日本 <|endoftext|>", "<s>"):
        assert tokenizer(text).input_ids[0] == 2
        assert tokenizer(text, add_special_tokens=False).input_ids == native.encode([text])[0] or text == "<s>"
    convert(tmp_path / "out", tmp_path / "again")
    again = torch.load(tmp_path / "again" / "model.pt", weights_only=True)
    assert again["cfg"] == state["cfg"] and all(
        torch.equal(again["model"][name], state["model"][name]) for name in state["model"]
    )


def test_names_of_the_hub_come_from_its_cache(make_model, convert, refused, tmp_path, monkeypatch):
    import huggingface_hub

    _, theirs = make_model("opt")
    cache = tmp_path / "hub" / "models--someone--opt-tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    theirs.rename(cache / "snapshots" / "abc")
    (cache / "refs" / "step3000").write_text("def")
    _, earlier = make_model("opt", name="earlier", num_hidden_layers=1)
    earlier.rename(cache / "snapshots" / "def")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("momentum_lm.formats.from_huggingface.hub_answers", lambda: False)
    assert "OPTForCausalLM" in convert("someone/opt-tiny", tmp_path / "ours")
    assert load_native(tmp_path / "ours").config.layers == 3
    convert("someone/opt-tiny@step3000", tmp_path / "step3000")
    assert load_native(tmp_path / "step3000").config.layers == 1
    assert "someone/opt-tiny@step4000 is no file or folder here" in refused("someone/opt-tiny@step4000", tmp_path / "b")
    make_model("opt", name="opt@step3000", num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    convert("opt@step3000", "local")
    assert load_native(tmp_path / "local").config.layers == 2
    assert (
        "someone/opt-huge is no file or folder here, and the Hugging Face hub does not answer, nor was it downloaded "
        "earlier" in refused("someone/opt-huge", tmp_path / "b")
    )


def test_untied_by_one_tensor_is_refused(make_model, refused, tmp_path):
    _, theirs = make_model("opt")
    tensors = load_file(theirs / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight differs from the embedding that config.json ties it to; set tie_word_embeddings" in refused(
        theirs, tmp_path / "x"
    )
