"""Small corpora and tokenizers, made here from a seed."""

import json
import random

import pytest

from momentum_lm.text.tokenizer import _byte_letters
from momentum_lm.text.vocabulary import train_sentencepiece


def make_documents(count, seed=0, words=40):
    """Distinct texts of invented words, a few lines each."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    documents = []
    for i in range(count):
        text = " ".join(rng.choices(lexicon, k=rng.randint(words // 2, words)))
        documents.append(f"{i} {text}.\n{text[::-1]}".replace(" ba", "  ba"))
    return documents


@pytest.fixture(scope="session")
def fairseq_data():
    """fairseq's own readers and writers. Tests that compare with them are skipped where it is not installed."""
    pytest.importorskip("fairseq")
    import fairseq.data

    return fairseq.data


@pytest.fixture(scope="session")
def documents():
    return make_documents(300)


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory, documents):
    """The documents as JSON Lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    path.write_bytes(train_sentencepiece(documents, 600))
    return path


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A tokenizer of GPT-2's kind: the 256 bytes and a handful of merges."""
    folder = tmp_path_factory.mktemp("gpt2")
    merges = ["Ġ t", "h e", "Ġt he", "e r", "Ġ Ġ", "i s", "b a", "ba n", "Ġ ban", "Ã ©", "l l", "' ll", "q u"]
    tokens = _byte_letters() + ["".join(merge.split()) for merge in merges]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder
