"""The same text has the same ids in Hugging Face's tokenizers and in ours, both ways."""

import copy
import json
import random
import re
import shutil

import pytest
import sentencepiece
import transformers

from momentum_lm.formats.tokenizers import special_tokens, write_tokenizer
from momentum_lm.text.dictionary import SPECIALS, Dictionary
from momentum_lm.text.tokenizer import GPT2Tokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from momentum_lm.text.vocabulary import train_sentencepiece

from .conftest import TEXTS, TOKENIZERS, gpt2_files, sentences, shuffled


def awkward_texts(count, seed=0):
    draw = random.Random(seed)
    pieces = [
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
        "<0x41>",
        "▁",
        " ",
        "\n",
        "é",
        "日",
        "😀",
        "film",
        "Hello",
        "<",
        ">",
        "/",
        "s",
        "\x00",
        "\t",
        "madeupword0000",
    ]
    return ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(count)]


def with_specials(tokenizer, text):
    """Its ids, where the names of fairseq's special tokens are these: as what goes to transformers reads them."""
    parts = re.split("(" + "|".join(SPECIALS) + ")", text)
    return [
        i
        for part in parts
        for i in ([SPECIALS.index(part)] if part in SPECIALS else tokenizer.encode(part) if part else [])
    ]


def test_special_tokens_are_those_that_a_user_adds_too(tmp_path):
    (tmp_path / "sentencepiece.model").write_bytes(train_sentencepiece(sentences(2000, seed=1), 330))
    for tokenizer in (SentencePieceTokenizer(tmp_path / "sentencepiece.model"), gpt2_files(tmp_path / "gpt2")):
        out = tmp_path / tokenizer.kind
        out.mkdir(exist_ok=True)
        write_tokenizer(tokenizer, out, 100, bos=2)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        size = len(theirs)
        theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "[PAD]"})
        ids = theirs("a<|user|> [PAD]</s>", add_special_tokens=False).input_ids
        assert len(theirs) == size + 2 and [i for i in ids if i >= size] == [
            theirs("<|user|>").input_ids[-1],
            theirs.pad_token_id,
        ]
        assert ids[-1] == theirs.eos_token_id == 2 and theirs.decode(ids, skip_special_tokens=True).strip() == "a"
        ordinary = theirs("</s> [PAD]", add_special_tokens=False, split_special_tokens=True).input_ids
        assert ordinary == tokenizer.encode("</s> [PAD]")


@pytest.mark.parametrize("family", TOKENIZERS)
def test_theirs_here(make_model, convert, tmp_path, family, tokenizer_of):
    _, theirs = make_model(family)
    convert(theirs, tmp_path / "ours")
    tokenizer, reference = load_tokenizer(tmp_path / "ours"), transformers.AutoTokenizer.from_pretrained(theirs)
    ids = tokenizer.own_to_dictionary
    if family in ("opt", "xglm"):
        assert ids == list(range(len(ids)))
    else:  # the others follow fairseq's specials, in their order
        specials = [i for i in ids if i < 4]
        assert len(set(specials)) == len(specials) and [i for i in ids if i >= 4] == list(
            range(4, 4 + len(ids) - len(specials))
        )
        assert ids[reference.eos_token_id] == 2
    begins_with = {"llama": [0], "mistral": [0], "opt": [2], "xglm": [2]}.get(family, [])
    assert tokenizer.prefix == begins_with
    for text in TEXTS + awkward_texts(300) + sentences(50, seed=5):
        assert tokenizer.encode(text) == [ids[i] for i in reference(text, add_special_tokens=False).input_ids], text
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        assert again(text).input_ids == reference(text).input_ids
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert all(getattr(again, role) == getattr(reference, role) for role in roles)


def test_files_of_the_old_kind(make_model, convert, tmp_path):
    """vocab.json and merges.txt, as OPT and GPT-2 came first."""
    _, theirs = make_model("opt")
    content = json.loads((theirs / "tokenizer.json").read_text())["model"]
    (theirs / "tokenizer.json").unlink()
    (theirs / "vocab.json").write_text(json.dumps(content["vocab"]))
    (theirs / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["merges"]))
    reference = transformers.AutoTokenizer.from_pretrained(theirs)
    convert(theirs, tmp_path / "ours")
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert len(tokenizer.encode("Hello world")) < 6
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids, text


def test_the_first_role_wins_and_names_may_say_it_too(tmp_path, tokenizer_of):
    tokenizer_of("gpt2").save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    size = len(tokenizer_of("gpt2"))
    given = {
        "bos_token": tokenizer_of("gpt2").convert_ids_to_tokens(280),
        "eos_token": {"content": "<|endoftext|>"},
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    settings.write_text(json.dumps(given))
    symbols = HuggingFaceTokenizer(tmp_path).symbols
    assert symbols[size - 1] == "</s>" and symbols[280] == "<s>" and "<pad>" not in symbols and "<unk>" not in symbols
    assert all(symbol == str(i) for i, symbol in enumerate(symbols) if i not in (280, size - 1))
    settings.unlink()
    assert HuggingFaceTokenizer(tmp_path).symbols == [str(i) for i in range(size)]
    tokenizer_of("opt").save_pretrained(tmp_path)
    settings.unlink()
    assert HuggingFaceTokenizer(tmp_path).symbols[:5] == ["<s>", "<pad>", "</s>", "<unk>", "4"]
    settings.write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        HuggingFaceTokenizer(tmp_path)


def test_special_tokens_in_a_text_may_be_ordinary(tmp_path, tokenizer_of):
    tokenizer_of("opt").save_pretrained(tmp_path)
    assert HuggingFaceTokenizer(tmp_path).encode("a</s>")[-1] == 2
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"split_special_tokens": True}))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.splits_special_tokens and 2 not in tokenizer.encode("a</s>")
    assert tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"


@pytest.mark.parametrize("dictionary", [None, shuffled], ids=["own", "published"])
def test_gpt2_bpe_there(tmp_path, dictionary):
    tokenizer = gpt2_files(tmp_path / "ours", dictionary)
    assert isinstance(tokenizer, GPT2Tokenizer)
    out = tmp_path / "theirs"
    out.mkdir()
    assert write_tokenizer(tokenizer, out, 100, bos=2) is None
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS + awkward_texts(1000) + sentences(100, seed=7):
        ids = with_specials(tokenizer, text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == tokenizer.encode(text), (
            text
        )
        assert theirs(text).input_ids == [2, *ids]
        if 3 not in ids:
            assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (2, 2, 1, 3)
    assert theirs.decode([0, 1, 2, 3]) == "<s><pad></s><unk>" and theirs.model_max_length == 100
    assert load_tokenizer(out).encode("Hello") == tokenizer.encode("Hello")


@pytest.mark.parametrize("begins_with", [0, 2])
def test_sentencepiece_there(tmp_path, begins_with):
    (tmp_path / "sentencepiece.model").write_bytes(train_sentencepiece(sentences(2000, seed=1), 330))
    tokenizer = SentencePieceTokenizer(tmp_path / "sentencepiece.model")
    out = tmp_path / "theirs"
    out.mkdir()
    assert "where cuts tie, as in long runs of one sign, pieces may differ" in write_tokenizer(
        tokenizer, out, 100, begins_with
    )
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS + awkward_texts(1000) + sentences(300, seed=7):
        ids = with_specials(tokenizer, text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == tokenizer.encode(text), (
            text
        )
        assert theirs(text).input_ids == [begins_with, *ids]
        assert theirs.decode(ids) == text
    assert theirs.bos_token_id == begins_with and theirs.eos_token_id == 2


def test_a_sentencepiece_model_that_changes_texts_goes_as_it_is(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(500)), model_prefix=str(tmp_path / "other"), vocab_size=60, minloglevel=2
    )
    out = tmp_path / "theirs"
    out.mkdir()
    note = write_tokenizer(SentencePieceTokenizer(tmp_path / "other.model"), out, 100, 2)
    assert note == "no tokenizer.json does exactly what sentencepiece.model does, which is there as it is"
    assert sorted(path.name for path in out.iterdir()) == ["dict.txt", "sentencepiece.model"]


@pytest.mark.parametrize("family", ["gpt2", "xglm"])
def test_a_tokenizer_json_in_the_dictionarys_order(tmp_path, tokenizer_of, family):
    """Models trained here on data of `prepare --hf-tokenizer` have fairseq's specials first, whatever the tokenizer
    had.
    """
    source, out = tmp_path / "ours", tmp_path / "theirs"
    tokenizer_of(family).save_pretrained(source)
    own = HuggingFaceTokenizer(source)
    if family == "xglm":
        Dictionary(random.Random(0).sample(own.dictionary.symbols[4:], len(own.dictionary) - 4)).save(
            source / "dict.txt"
        )
    else:
        own.dictionary.save(source / "dict.txt")
    tokenizer = load_tokenizer(source)
    out.mkdir()
    assert write_tokenizer(tokenizer, out, 100, 2) is None
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    for text in TEXTS + awkward_texts(200) + sentences(50, seed=9):
        names = special_tokens(tokenizer)  # tokens that it did not have, and has now
        parts = re.split("(" + "|".join(names) + ")", text) if names else [text]
        ids = [i for part in parts for i in ([names[part]] if part in names else tokenizer.encode(part))]
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids[0] == 2
    assert (theirs.eos_token_id, theirs.pad_token_id) == (2, 1)
    back = HuggingFaceTokenizer(out)
    assert back.own_to_dictionary[:4] == [0, 1, 2, 3] and back.encode("Hello film") == tokenizer.encode("Hello film")


def test_a_dictionary_that_lacks_tokens_of_a_tokenizer_json(tmp_path, tokenizer_of):
    tokenizer_of("gpt2").save_pretrained(tmp_path / "ours")
    Dictionary([str(i) for i in range(200)]).save(tmp_path / "ours" / "dict.txt")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be given the ids of dict\.txt"):
        write_tokenizer(load_tokenizer(tmp_path / "ours"), tmp_path, 100, 2)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_prepare_takes_both_files(tmp_path, tokenizer_of, run_cli, family):
    """`momentum-lm prepare --hf-tokenizer` keeps what says which tokens are special."""
    tokenizer_of(family).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(50)))
    result = run_cli(
        ["momentum-lm", "prepare", tmp_path / "text.txt", "--hf-tokenizer", tmp_path / "tokenizer" / "tokenizer.json",
        "--document",
         "blank-line", "--output", tmp_path / "data", "--workers", "1", "--valid", "0", "--test", "0"]
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    before = HuggingFaceTokenizer(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "tokenizer")
    after = load_tokenizer(tmp_path / "data")
    assert after.own_to_dictionary == before.own_to_dictionary
    assert after.encode("Hello <|endoftext|></s>") == before.encode("Hello <|endoftext|></s>")


def test_a_role_elsewhere_leaves_fairseqs_ids(tmp_path, tokenizer_of):
    """OPT with a padding token and an end of its own, as chat models have."""
    tokenizer = copy.deepcopy(tokenizer_of("opt"))
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path)
    ours = HuggingFaceTokenizer(tmp_path)
    assert ours.symbols == ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(4, size + 2))]
    assert ours.encode("a</s>[PAD]<|im_end|>")[-3:] == [2, size, size + 1]


def test_a_tokenizer_without_an_end_has_the_models(make_model, convert, tmp_path, tokenizer_of):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("gpt2").backend_tokenizer)
    _, theirs = make_model("gpt2")
    for path in theirs.glob("tokenizer*"):
        path.unlink()
    tokenizer.save_pretrained(theirs)
    convert(theirs, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").encode("a<|endoftext|>")[-1] == 2
    (tmp_path / "ours" / "tokenizer_config.json").unlink()
    convert(tmp_path / "ours", tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(again) == len(tokenizer) and again.eos_token == again.bos_token == "<|endoftext|>"
