import dataclasses
import hashlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from momentum_lm.icl.datasets.loading import Example
from momentum_lm.results.identity import compared, digest, examples_sha256

transformers = pytest.importorskip("transformers")


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1}) != digest({"a": 1, "b": [2.5]})


def test_what_is_for_the_reader_is_not_compared():
    assert compared({"a": {"path": 1, "b": [{"command": 2, "c": 3}]}, "versions": {}}) == {"a": {"b": [{"c": 3}]}}


@pytest.mark.parametrize("change", [{"index": 1}, {"inputs": ("b",)}, {"continuations": (" x", " z")}, {"gold": 0}])
def test_everything_of_an_example_is_in_its_digest(change):
    example = Example(0, ("a",), (" x", " y"), 1)
    assert examples_sha256([example]) == examples_sha256([dataclasses.replace(example)])
    assert examples_sha256([example]) != examples_sha256([dataclasses.replace(example, **change)])
    assert examples_sha256([example]) != examples_sha256([example, example])


def test_digests_do_not_depend_on_the_characters_that_python_knows():
    for letter in ("\u00e9", "\U0001fae8", "\ud800"):  # the second is a character from Python 3.12 on
        example = Example(0, (letter,), (" x", " y"), 1)
        text = f"(0, ({letter!a},), (' x', ' y'), 1)"
        assert examples_sha256([example]) == hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.fixture(scope="module")
def model():
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def tokenizer(merges, **special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*alphabet, "ab", "bc"])}
    made = Tokenizer(models.BPE(vocab=words, merges=merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def test_a_changed_tokenizer_has_another_digest(model):
    from momentum_lm.lm.huggingface import HuggingFaceLM

    def lm(*merges, **special):
        return HuggingFaceLM(model, tokenizer(list(merges), **special), "m", "")

    one, same, fewer, special = lm(("a", "b")), lm(("a", "b")), lm(), lm(("a", "b"), eos_token="a")
    assert one.encode(["abc"]) != fewer.encode(["abc"])
    assert one.tokenizer_sha256 == same.tokenizer_sha256
    assert len({one.tokenizer_sha256, fewer.tokenizer_sha256, special.tokenizer_sha256}) == 3


def test_a_tokenizer_has_one_digest_before_and_after_its_first_text(model):
    from momentum_lm.lm.huggingface import HuggingFaceLM

    digests = set()
    for text in (None, "abc"):
        made = tokenizer([("a", "b")])
        made.backend_tokenizer.enable_padding(length=4)  # as a tokenizer.json may have it
        made.backend_tokenizer.enable_truncation(2)
        lm = HuggingFaceLM(model, made, "m", "")
        if text is not None:
            assert len(lm.encode([text])[0]) == 2
        digests.add(lm.tokenizer_sha256)
    assert len(digests) == 1


def test_another_transformers_is_no_other_model(model):
    from momentum_lm.lm.huggingface import HuggingFaceLM

    described = HuggingFaceLM(model, tokenizer([("a", "b")]), "m", "").describe()
    assert described["architecture"]["transformers_version"] == transformers.__version__
    later = described | {"architecture": described["architecture"] | {"transformers_version": "99.0"}}
    assert compared(later) == compared(described)


def test_weights_that_are_replaced_after_loading_are_noticed(model, tmp_path):
    from momentum_lm.errors import UserError
    from momentum_lm.lm.huggingface import load_huggingface

    model.save_pretrained(tmp_path)
    tokenizer([("a", "b")]).save_pretrained(tmp_path)
    lm = load_huggingface(str(tmp_path))
    lm.check_unchanged()
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors was changed while it was read"):
        lm.check_unchanged()
