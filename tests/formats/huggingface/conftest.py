"""Small random models of the real architectures of transformers, with tokenizers of the real kinds."""

import json
import random

import pytest
import torch

from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "", " ", "Hello world", " leading", "trailing  ", "  two  spaces ", "a\nb\n\nc\r\n\td", "naïve café 日本語 "
    "😀👩‍👩‍👧 ё́", "we'll 1234.5%",
    "<s> text </s>", "</s>", "<pad><unk>", "<|endoftext|> on", "▁▁ a▁b", "<0x0A> <0xE2>", "\u00a0\u2028\ufeff",
    "nothing\x00else",
]  # fmt: skip
WORDS = (
    "the a film plot actor is was good bad dull and or not very Hello world we'll two spaces text 1234 < > s / caf"
).split()


def sentences(count=600, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(3, 12))) for _ in range(count)]


def byte_level_bpe(size, specials):
    """(vocabulary, merges) as of GPT-2, ``specials`` first."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    model.train_from_iterator(sentences(), trainer)
    content = json.loads(model.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


def gpt2_tokenizer():
    vocab, merges = byte_level_bpe(300, [])
    vocab["<|endoftext|>"] = len(vocab)
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


def opt_tokenizer():
    vocab, merges = byte_level_bpe(300, ["<s>", "<pad>", "</s>", "<unk>"])
    return transformers.GPT2Tokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def xglm_tokenizer():
    model = tokenizers.Tokenizer(tokenizers.models.Unigram())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(sentences(), trainer)
    vocab = [tuple(pair) for pair in json.loads(model.to_str())["model"]["vocab"]]
    return transformers.XGLMTokenizer(vocab=vocab)


def gpt2_files(folder, dictionary=None):
    """encoder.json and vocab.bpe with the shape of GPT-2's."""
    vocab, merges = byte_level_bpe(400, [])
    vocab["<|endoftext|>"] = len(vocab)
    folder.mkdir()
    (folder / "encoder.json").write_text(json.dumps(vocab))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    if dictionary is not None:
        dictionary(len(vocab)).save(folder / "dict.txt")
    return load_tokenizer(folder)


def shuffled(size):
    """As published: the order is its own, some tokens are missing, made-up words fill it up."""
    return Dictionary(random.Random(3).sample([str(i) for i in range(size)], size - 5)).padded()


def llama3_tokenizer():
    """Byte-level BPE whose specials come last, and which begins each text with one."""
    vocab, merges = byte_level_bpe(300, [])
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    model.add_special_tokens(list(roles.values()))
    begin = (roles["bos_token"], model.token_to_id(roles["bos_token"]))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **roles)


def llama_tokenizer():
    """SentencePiece's BPE, with bytes for what it has no piece for, as of Llama 1, 2 and Mistral."""
    specials = ["<unk>", "<s>", "</s>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    initial = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[*specials, *initial], show_progress=False)
    model.train_from_iterator(sentences(), trainer)
    content = json.loads(model.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    return transformers.LlamaTokenizer(vocab=content["vocab"], merges=merges, add_bos_token=True)


def qwen_tokenizer():
    """Byte-level BPE that puts nothing before a text, and has no token for its beginning."""
    vocab, merges = byte_level_bpe(300, [])
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)


def neox_tokenizer():
    vocab, merges = byte_level_bpe(300, ["<|endoftext|>", "<|padding|>"])
    return transformers.GPTNeoXTokenizer(vocab=vocab, merges=merges)


TOKENIZERS = {
    "gpt2": gpt2_tokenizer,
    "opt": opt_tokenizer,
    "xglm": xglm_tokenizer,
    "llama": llama3_tokenizer,
    "mistral": llama_tokenizer,
    "qwen2": qwen_tokenizer,
    "qwen3": qwen_tokenizer,
    "gpt_neox": neox_tokenizer,
}
_USUAL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 48}
_GROUPED = {**_USUAL, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
SHAPES = {  # of configurations
    "gpt2": {"n_positions": 48, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 64, "num_attention_heads": 4,
        "max_position_embeddings": 48,
    },
    "xglm": {"d_model": 32, "num_layers": 3, "ffn_dim": 64, "attention_heads": 4, "max_position_embeddings": 48},
    "llama": {**_GROUPED, "hidden_size": 36, "rms_norm_eps": 1e-5},
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": {**_USUAL, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gpt_neox": {**_USUAL, "num_attention_heads": 4},
}  # fmt: skip


def configuration(family, tokenizer, **changes):
    """A small configuration of transformers' own class."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    usual = {"vocab_size": len(tokenizer), **ids, **SHAPES[family]}
    return transformers.AutoConfig.for_model(family, **{**usual, **changes})


@pytest.fixture(scope="session")
def tokenizer_of():
    made = {}

    def get(family):
        if family not in made:
            made[family] = TOKENIZERS[family]()
        return made[family]

    return get


@pytest.fixture
def make_model(tokenizer_of, tmp_path):
    """make_model(family, dtype, **config) -> (model, its folder). All parameters are random, norms and biases too."""

    def make(family, dtype=torch.float32, name="theirs", **changes):
        tokenizer = tokenizer_of(family)
        config = configuration(family, tokenizer, **changes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # tied, narrow ones say one word again and again; rotary angles of large ones show their last digit
                parameter.normal_(std=0.3 if family in ("gpt2", "opt", "xglm") else 0.15)
            for norm in (module for module in model.modules() if type(module).__name__.endswith("Norm")):
                norm.weight += 1
        model = model.to(dtype)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def convert(capsys):
    """convert(source, output, *flags) -> what it printed. Raises AssertionError with its message where it fails."""
    from momentum_lm.cli.convert import main

    def run(*args):
        capsys.readouterr()  # what transformers said before
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys):
    """refused(source, output, *flags) -> the one line with which it is refused."""
    from momentum_lm.cli.convert import main

    def run(*args):
        capsys.readouterr()  # what transformers said before
        status = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
        return err

    return run
