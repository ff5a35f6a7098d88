"""Against plain transformers, for the families that differ in what their caches and masks do. Models are small and
random.
"""

import contextlib
import gc
import json
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

from momentum_lm.errors import UserError  # noqa: E402
from momentum_lm.icl import engine  # noqa: E402
from momentum_lm.lm import cpu_fast  # noqa: E402
from momentum_lm.lm.huggingface import HuggingFaceLM, load_huggingface  # noqa: E402
from momentum_lm.lm.momentum_attention import add_momentum  # noqa: E402

VOCAB = 300
COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
LLAMA = dict(**COMMON, intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "mistral_window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=7),
    "gemma2_softcap": lambda: transformers.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=6, final_logit_softcapping=5.0
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "bloom_alibi": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers

    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(
        ["a film that is good", "a film that is bad"], VOCAB, special_tokens=["<s>", "<pad>", "</s>"]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def random_model(family):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("prefix_length", [0, 1, 9])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_whole_sequence(family, side, prefix_length, tokenizer):
    lm = HuggingFaceLM(random_model(family), tokenizer, family, "")
    assert lm.shares_prefixes == (family != "mamba")
    with count_packed() as calls:
        check_log_probs(lm, side, prefix_length)
    assert (len(calls) > 0) == (prefix_length > 0 and family in ("gpt2", "llama", "neox", "opt"))


WAYS = {"mistral_window": "cached", "gemma2_softcap": "cached", "mamba": "whole"}  # of others: after a shared beginning


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_text_is_that_of_a_plain_loop(family, tokenizer, monkeypatch):
    """Of rows of unequal length, after a beginning in common and by themselves, which end one after the other."""
    lm = HuggingFaceLM(random_model(family), tokenizer, family, "")
    assert lm.ends == (2,)
    generator = torch.Generator().manual_seed(2)
    new = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (12, 5, 1, 8)]
    monkeypatch.setattr(engine, "CPU_TOKENS", 1)  # any beginning is worth a pass
    lengths = set()
    for contexts in ([new[0] + row for row in new[1:]], new):
        expected = [greedy(lm, context, 6) for context in contexts]
        found = dict(engine.generate(lm, contexts, 6, ends))
        assert [found[i] for i in range(len(expected))] == expected
        lengths |= set(map(len, expected))
    assert len(lengths) > 1
    assert lm._stepping == WAYS.get(family, "shared")


def ends(tokens):
    return len(tokens) > tokens[0] % 5


def greedy(lm, context, most):
    """Until ``ends`` says so, or before </s>; every token by a whole pass."""
    tokens = []
    while len(tokens) < most and not (tokens and ends(tokens)):
        with torch.no_grad():
            tokens.append(int(lm.model(torch.tensor([context + tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            return tokens[:-1]
    return tokens


def test_rows_are_packed_only_for_an_attention_that_knows_how(tokenizer):
    lm = HuggingFaceLM(random_model("llama"), tokenizer, "llama", "")
    for step in (lambda: None, lambda: add_momentum(lm.model, 0.5), lambda: lm.model.set_attn_implementation("eager")):
        step()
        with count_packed() as calls:
            check_log_probs(lm, "right", 9)
        assert bool(calls) == (lm.config._attn_implementation == cpu_fast.PACKED_ATTENTION)


def test_rows_are_padded_for_a_model_that_refuses_them_packed(tokenizer, monkeypatch):
    monkeypatch.setattr(cpu_fast, "_REFUSED", ("scaling",))
    lm = HuggingFaceLM(random_model("llama"), tokenizer, "llama", "")
    check_log_probs(lm, "right", 9)
    assert lm._packs_rows is False


def test_a_prefix_is_freed_when_nothing_refers_to_it(tokenizer):
    prefix = HuggingFaceLM(random_model("llama"), tokenizer, "llama", "").start([1, 2, 3])
    layer = weakref.ref(prefix.cache.layers[0])
    gc.disable()
    try:
        del prefix
        assert layer() is None
    finally:
        gc.enable()


@contextlib.contextmanager
def count_packed():
    """Calls of attention with packed rows."""
    calls, real = [], cpu_fast.PackedRows.pad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_fast.PackedRows, "pad", lambda *given: calls.append(1) or real(*given))
        yield calls


def check_log_probs(lm, side, prefix_length):
    """Against every row as a whole."""
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, VOCAB, (prefix_length,), generator=generator)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator) for n in (6, 1, 4)]
    tokens, padding = torch.full((3, 6), 1), torch.ones(3, 6, dtype=torch.bool)
    wanted, expected, distributions = [], [], []
    for i, row in enumerate(rows):
        shift = 6 - len(row) if side == "left" else 0
        tokens[i, shift : shift + len(row)], padding[i, shift : shift + len(row)] = row, False
        whole = lm.model(torch.cat([prefix, row])[None], use_cache=False).logits[0].log_softmax(-1)
        for position, target in ((0, 5), (len(row) - 1, 7), (len(row) - 1, 250)):
            wanted.append((i, shift + position, target))
            expected.append(whole[prefix_length + position, target])
            distributions.append(whole[prefix_length + position])
    memory = lm.start(prefix.tolist()) if prefix_length else None
    index = torch.tensor(wanted).unbind(1)
    for _ in range(2):  # reading a prefix does not change it
        found, likeliest = lm.log_probs(tokens, padding, *index, memory)
        assert likeliest.tolist() == [
            bool(whole.argmax() == target) for whole, target in zip(distributions, index[2], strict=True)
        ]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_prompts_begin_as_the_tokenizer_begins_a_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    lm = HuggingFaceLM(random_model("gpt2"), tokenizer, "gpt2", "")
    assert lm.bos == () and lm.separator == "\n\n" and lm.max_positions == 64 and lm.vocab_size == VOCAB
    copy = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
    )
    copy.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert HuggingFaceLM(random_model("gpt2"), copy, "gpt2", "").bos == (0,)
    assert lm.decode(lm.encode(["a film that is good"])[0]) == "a film that is good"
    assert HuggingFaceLM(random_model("xglm"), tokenizer, "xglm", "").separator == (2,)


def test_load_a_folder(tokenizer, tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm, again = load_huggingface(str(tmp_path)), load_huggingface(str(tmp_path), dtype=torch.bfloat16)
    assert lm.dtype == torch.float32 and again.dtype == torch.bfloat16 and lm.sha256 == again.sha256
    record = json.loads(json.dumps(lm.describe()))
    assert record["architecture"]["model_type"] == "llama" and record["parameters"] == sum(
        p.numel() for p in lm.model.parameters()
    )


def test_what_does_not_load_is_said_in_a_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    for name, gguf_file, reason in (
        (str(tmp_path / "missing"), None, r"name=.*missing. does not load: \S"),
        (str(tmp_path), None, r"name=.* does not load: \S"),
        (str(tmp_path), "model.gguf", r"gguf_file=.model.gguf.: .* holds no such file"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            load_huggingface(name, gguf_file)
        assert "\n" not in str(caught.value)
