import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from momentum_lm.data.classification import Example
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
