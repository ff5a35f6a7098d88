"""prepare(): the output is what it says, whatever the workers, the order of the documents, and how often
it is killed.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from momentum_lm.errors import UserError
from momentum_lm.text.corpus import PrepareConfig, _chunks, prepare
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.encoding import Chunk, DocumentStream, encode_in_order
from momentum_lm.text.indexed import IndexedDataset
from momentum_lm.text.selection import Splitter
from momentum_lm.text.sources import find_sources
from momentum_lm.text.tokenizer import load_tokenizer
from momentum_lm.text.workplace import reserved


def config(output, *sources, **settings):
    defaults = {"vocab_size": 600, "valid": "0.1", "test": "20"}
    return PrepareConfig(sources=tuple(map(str, sources)), output=str(output), **defaults | settings)


def texts(folder, split):
    """The documents of a split, decoded; each must end with </s> and hold no other."""
    tokenizer = load_tokenizer(folder)
    found = []
    for item in IndexedDataset(Path(folder) / split):
        assert item[-1] == 2 and 2 not in item[:-1]
        found.append(tokenizer.decode(item))
    return found


def all_texts(folder):
    return [
        text
        for split in ("train", "valid", "test")
        if (Path(folder) / f"{split}.idx").exists()
        for text in texts(folder, split)
    ]


def content(folder, *without):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.name not in without}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, jsonl):
    output = tmp_path_factory.mktemp("prepared") / "data"
    return output, prepare(config(output, jsonl), workers=1)


def test_all_documents_are_there_once_and_whole(prepared, documents):
    output, result = prepared
    found = {split: texts(output, split) for split in ("train", "valid", "test")}
    assert sorted(all_texts(output)) == sorted(documents)
    assert len(found["test"]) == 20
    assert 10 < len(found["valid"]) < 55
    order = {text: i for i, text in enumerate(documents)}
    for split, own in found.items():
        assert own == sorted(own, key=order.__getitem__)
        data = IndexedDataset(output / split)
        assert result["splits"][split] == {
            "documents": len(own), "tokens": data.num_tokens, "bytes": sum(len(text.encode()) for text in own),
            "unknown": 0,
        }  # fmt: skip


def test_prepare_json(prepared, documents):
    output, result = prepared
    assert json.loads((output / "prepare.json").read_text()) == result
    assert result["version"] == 1
    assert result["tokenizer"] == {
        "kind": "sentencepiece",
        "vocab_size": 600,
        "lossless": True,
        "sha256": load_tokenizer(output).sha256(),
    }
    assert sorted([*result["files"], "prepare.json"]) == sorted(p.name for p in output.iterdir())
    assert (result["documents_read"], result["duplicates"], result["empty"]) == (len(documents), 0, 0)


def test_dictionary_counts_the_training_tokens(prepared):
    output, _ = prepared
    dictionary = Dictionary.load(output / "dict.txt")
    counted = np.bincount(np.concatenate(list(IndexedDataset(output / "train"))), minlength=len(dictionary))
    assert dictionary.counts[4:] == counted[4:].tolist()
    assert sum(dictionary.counts[4:]) > 1000


def test_fairseqs_task_loads_it(prepared):
    """The stock task, with documents as they are and packed into blocks."""
    pytest.importorskip("fairseq")
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    output, _ = prepared
    for mode in ("eos", "none"):
        plain = {
            "dataset_impl": None,
            "use_plasma_view": False,
            "seed": 1,
        }  # whose defaults stand elsewhere in fairseq's configuration
        settings = LanguageModelingConfig(data=str(output), sample_break_mode=mode, tokens_per_sample=4096, **plain)
        task = LanguageModelingTask.setup_task(settings)
        task.load_dataset("train")
        tokens = np.concatenate([task.dataset("train")[i]["target"].numpy() for i in range(len(task.dataset("train")))])
        np.testing.assert_array_equal(tokens, np.concatenate(list(IndexedDataset(output / "train"))))
    tokenizer = load_tokenizer(output)
    assert task.dictionary.symbols == tokenizer.dictionary.symbols


def test_fairseq_preprocess_makes_the_same_of_the_pieces(prepared, tmp_path, run_cli, documents):
    """Its output with our dict.txt as --srcdict is read by us, and has our ids."""
    pytest.importorskip("fairseq")
    output, _ = prepared
    tokenizer = load_tokenizer(output)
    lines = [" ".join(tokenizer.dictionary.symbols[i] for i in tokenizer.encode(text)) for text in documents]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["fairseq-preprocess", "--only-source", "--srcdict", output / "dict.txt"]
    done = run_cli([*command, "--trainpref", tmp_path / "train.txt", "--destdir", tmp_path / "bin"])
    assert done.returncode == 0, done.stderr
    theirs = IndexedDataset(tmp_path / "bin" / "train")
    assert [item.tolist() for item in theirs] == [[*tokenizer.encode(text), 2] for text in documents]
    assert (tmp_path / "bin" / "dict.txt").read_text() == (output / "dict.txt").read_text()


def test_workers_change_nothing(prepared, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("momentum_lm.text.corpus.CHUNK", 2000)
    output, _ = prepared
    prepare(config(tmp_path / "data", jsonl), workers=3)
    assert content(tmp_path / "data") == content(output)


def test_order_changes_no_split_and_no_tokenizer(prepared, documents, tmp_path):
    output, _ = prepared
    order = random.Random(5).sample(documents, len(documents))
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
    prepare(config(tmp_path / "data", path), workers=1)
    for split in ("train", "valid", "test"):
        assert sorted(texts(tmp_path / "data", split)) == sorted(texts(output, split))
    assert (tmp_path / "data" / "dict.txt").read_bytes() == (output / "dict.txt").read_bytes()
    assert (tmp_path / "data" / "sentencepiece.model").read_bytes() == (output / "sentencepiece.model").read_bytes()


def test_the_seed_changes_the_splits(prepared, jsonl, tmp_path):
    output, _ = prepared
    prepare(config(tmp_path / "data", jsonl, seed=2), workers=1)
    assert texts(tmp_path / "data", "test") != texts(output, "test")


def test_duplicates_and_empty_documents_are_dropped(documents, jsonl, tmp_path):
    """From several sources of different kinds."""
    (tmp_path / "again.csv").write_text('text\n" "\nx\n\n')
    (tmp_path / "one.txt").write_text(documents[7])
    result = prepare(config(tmp_path / "data", jsonl, jsonl, tmp_path / "again.csv", tmp_path / "one.txt"), workers=1)
    assert (result["documents_read"], result["duplicates"], result["empty"]) == (
        2 * len(documents) + 3,
        len(documents) + 1,
        1,
    )
    assert sorted(all_texts(tmp_path / "data")) == sorted([*documents, "x"])


def test_max_documents(jsonl, documents, tmp_path):
    prepare(config(tmp_path / "data", jsonl, max_documents=100, test="0"), workers=1)
    assert sorted(all_texts(tmp_path / "data")) == sorted(documents[:100])
    assert not (tmp_path / "data" / "test.bin").exists()


def test_given_tokenizers(prepared, jsonl, gpt2_folder, documents, tmp_path):
    output, _ = prepared
    again = prepare(config(tmp_path / "again", jsonl, sentencepiece=str(output / "sentencepiece.model")), workers=1)
    same = ("train.bin", "train.idx", "dict.txt", "sentencepiece.model")
    assert [content(tmp_path / "again")[name] for name in same] == [content(output)[name] for name in same]
    assert again["config"]["vocab_size"] is None
    result = prepare(config(tmp_path / "gpt2", jsonl, gpt2_bpe=str(gpt2_folder)), workers=2)
    assert result["tokenizer"]["kind"] == "gpt2_bpe" and (tmp_path / "gpt2" / "encoder.json").exists()
    assert sorted(all_texts(tmp_path / "gpt2")) == sorted(documents)


def test_a_dictionary_beside_a_tokenizer_is_kept(prepared, jsonl, tmp_path):
    """So that data fits a checkpoint whose dictionary has its own order."""
    output, _ = prepared
    symbols = load_tokenizer(output).dictionary.symbols[4:]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sp.model").write_bytes((output / "sentencepiece.model").read_bytes())
    Dictionary(symbols[::-1]).save(tmp_path / "model" / "dict.txt")
    prepare(config(tmp_path / "data", jsonl, sentencepiece=str(tmp_path / "model" / "sp.model")), workers=1)
    assert load_tokenizer(tmp_path / "data").dictionary.symbols[4:] == symbols[::-1]
    assert texts(tmp_path / "data", "valid") == texts(output, "valid")


def test_large_vocabularies_take_wider_tokens(jsonl, tmp_path, gpt2_folder):
    from momentum_lm.text.tokenizer import GPT2Tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    for file in gpt2_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    own = GPT2Tokenizer(gpt2_folder).dictionary.symbols[4:]
    Dictionary([f"filler{i}" for i in range(70000)] + own).save(folder / "dict.txt")
    prepare(config(tmp_path / "data", jsonl, gpt2_bpe=str(folder)), workers=1)
    assert IndexedDataset(tmp_path / "data" / "train").dtype == np.uint32
    assert int(IndexedDataset(tmp_path / "data" / "train")[0][0]) > 70000


# --- running again


def test_finished_data_is_left_alone(prepared, jsonl):
    output, result = prepared
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    said = []
    assert prepare(config(output, jsonl), workers=2, say=said.append) == result
    assert said == [f"{output} is already prepared with these settings"]
    assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before


def test_other_settings_are_refused_unless_forced(jsonl, tmp_path, documents):
    output = tmp_path / "data"
    prepare(config(output, jsonl), workers=1)
    before = content(output)
    with pytest.raises(
        UserError, match=r"was prepared with other settings: seed 1 \(now 2\); use another output, or force=True"
    ):
        prepare(config(output, jsonl, seed=2), workers=1)
    with pytest.raises(UserError, match="no document to train on; check column"):
        prepare(config(output, jsonl, max_documents=1), workers=1, force=True)
    assert content(output) == before
    result = prepare(config(output, jsonl, test="0", seed=2), workers=1, force=True)
    assert set(result["splits"]) == {"train", "valid"}
    assert sorted(p.name for p in output.iterdir()) == sorted([*result["files"], "prepare.json"])
    assert sorted(all_texts(output)) == sorted(documents)


def test_changed_sources_are_refused_unless_forced(tmp_path, documents):
    path, output = tmp_path / "c.txt", tmp_path / "data"
    path.write_text("\n\n".join(documents))
    settings = config(output, path, document="blank-line")
    prepare(settings, workers=1)
    path.write_text("\n\n".join(documents[:-1]) + " ")
    with pytest.raises(
        UserError, match="was prepared with a source whose content has changed since; use another output, or force=True"
    ):
        prepare(settings, workers=1)
    prepare(settings, workers=1, force=True)


def test_text_changed_in_the_middle_is_noticed_whatever_its_size_and_time(tmp_path, documents):
    path, output = tmp_path / "c.txt", tmp_path / "data"
    path.write_text("\n".join(documents))
    settings = config(output, path, document="line", valid="0")
    prepare(settings, workers=1)
    before, times = content(output), path.stat()
    time.sleep(0.02)  # file systems count time in steps
    middle = times.st_size // 2
    raw = path.read_bytes()
    path.write_bytes(raw[:middle] + b"XYZ" + raw[middle + 3 :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="was prepared with a source whose content has changed since"):
        prepare(settings, workers=1)
    assert content(output) == before
    path.write_bytes(raw)
    assert prepare(settings, workers=1)["documents_read"] == len("\n".join(documents).splitlines())


def test_other_times_with_the_same_documents_are_the_same_data(tmp_path, jsonl, monkeypatch):
    """As of a copy, or packed otherwise; it is looked once, and then the times are known."""
    path, output = tmp_path / "c.jsonl", tmp_path / "data"
    path.write_bytes(jsonl.read_bytes())
    first = prepare(config(output, path), workers=1)
    before = content(output, "prepare.json")
    os.utime(path, (1, 1))
    said = []
    again = prepare(config(output, path), workers=1, say=said.append)
    assert said == [f"{output} is already prepared with these settings"]
    assert again == first | {"sources_as_of": again["sources_as_of"]}
    assert again["sources_as_of"] != first["sources_as_of"]
    assert content(output, "prepare.json") == before
    monkeypatch.setattr("momentum_lm.text.corpus._Run.read_all", None)
    assert prepare(config(output, path), workers=1) == again


def test_a_file_more_in_a_folder_is_noticed(tmp_path, documents):
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(documents[:100]):
        (tmp_path / "corpus" / f"{i:03}.txt").write_text(text)
    settings = config(tmp_path / "data", tmp_path / "corpus", vocab_size=400)
    prepare(settings, workers=1)
    (tmp_path / "corpus" / "050b.txt").write_text("one more")
    with pytest.raises(UserError, match="a source whose content has changed since"):
        prepare(settings, workers=1)


def test_data_of_an_earlier_version_is_not_taken_for_the_same(tmp_path, jsonl):
    output = tmp_path / "data"
    made = prepare(config(output, jsonl), workers=1)
    made.pop("sources_as_of")
    (output / "prepare.json").write_text(
        json.dumps(made | {"config": made["config"] | {"source_fingerprint": "of its ends"}})
    )
    with pytest.raises(
        UserError, match="was prepared by an earlier version, which kept no record of the sources' content; use another"
    ):
        prepare(config(output, jsonl), workers=1)


# --- what is others'


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_called_prepare_that_is_not_ours_stays(tmp_path, jsonl, force):
    mine = tmp_path / "data" / ".prepare"
    mine.mkdir(parents=True)
    for name in ("config.json", "notes.txt"):
        (mine / name).write_text('{"my": "settings"}')
    with pytest.raises(
        UserError, match=r"data/\.prepare holds config\.json, which this command did not make; move it away, or use"
    ):
        prepare(config(tmp_path / "data", jsonl), workers=1, force=force)
    assert content(mine) == dict.fromkeys(("config.json", "notes.txt"), b'{"my": "settings"}')


def test_a_file_beside_unfinished_work_stays(tmp_path, jsonl, prepared, monkeypatch):
    interrupt(monkeypatch, tmp_path, jsonl)
    (tmp_path / "data" / ".prepare" / "notes.txt").write_text("mine")
    prepare(config(tmp_path / "data", jsonl), workers=1)
    assert content(tmp_path / "data" / ".prepare") == {"notes.txt": b"mine", "lock": b""}
    assert content_of_files(tmp_path / "data") == content(prepared[0])


def interrupt(monkeypatch, tmp_path, *sources, **settings):
    """Leaves unfinished work, as Ctrl-C does once some of it is saved."""
    from momentum_lm.text import corpus

    real = corpus._Run._save

    def save(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus._Run, "_save", save)
        patch.setattr(corpus, "_SAVE_EVERY", -1)
        patch.setattr(corpus, "CHUNK", 3000)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path / "data", *sources, **settings), workers=1)


def content_of_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("what", [".prepare", "lock", "a lock with text", "a pipe as lock"])
def test_links_in_place_of_ours_are_not_followed(tmp_path, jsonl, what):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    work = tmp_path / "data" / ".prepare"
    if what == ".prepare":
        (tmp_path / "data").mkdir()
        work.symlink_to(tmp_path / "precious")
    else:
        work.mkdir(parents=True)
        if what == "lock":
            (work / "lock").symlink_to(tmp_path / "precious" / "file")
        elif what == "a pipe as lock":
            os.mkfifo(work / "lock")
        else:
            (work / "lock").write_text("mine")
    message = "is a link or a file" if what == ".prepare" else r"lock is not a lock of this command"
    with pytest.raises(UserError, match=message + "; move it away, or use another output"):
        prepare(config(tmp_path / "data", jsonl), workers=1, force=True)
    assert content(tmp_path / "precious") == {"file": b"mine"}
    assert work.is_symlink() or [p.name for p in work.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["train.bin", "dict.txt", "prepare.json"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_ordinary_files_alone_are_replaced(tmp_path, jsonl, name, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "data" / name
    {"link": lambda: path.symlink_to(tmp_path / "precious"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[
        kind
    ]()
    with pytest.raises(
        UserError, match=rf"{name} is a link, a folder or a device, which is not replaced; move it away"
    ):
        prepare(config(tmp_path / "data", jsonl), workers=1, force=True)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [name] and (tmp_path / "precious").read_text() == "mine"


def test_an_output_that_is_no_folder_stays_what_it_is(tmp_path, jsonl):
    (tmp_path / "to nothing").symlink_to("nothing")
    (tmp_path / "to a device").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for output, kind in (("/dev/null", "device"), (tmp_path / "to a device", "device"),
        (tmp_path / "pipe", "device or pipe"),
                         (tmp_path / "to nothing", "link to nothing")):  # fmt: skip
        with pytest.raises(UserError, match=f"output=.*{output}.* is a {kind}"):
            prepare(config(output, jsonl), workers=1, force=True)
    assert Path("/dev/null").is_char_device() and (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "to a device", "to nothing"]


@pytest.mark.parametrize("text", ["[1]", "nonsense", "[" * 100_000])
def test_a_prepare_json_that_is_none_is_refused(tmp_path, jsonl, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepare.json").write_text(text)
    with pytest.raises(UserError, match=r"prepare\.json is (damaged|not a file of this command)"):
        prepare(config(tmp_path / "data", jsonl), workers=1)
    assert content(tmp_path / "data") == {"prepare.json": text.encode()}


def test_what_another_run_finished_meanwhile_is_not_replaced(tmp_path, jsonl, monkeypatch):
    """It is looked again once the folder is locked."""
    from momentum_lm.text import corpus

    output, real = tmp_path / "data", corpus.reserved

    def late(folder):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "reserved", real)
            prepare(config(output, jsonl, seed=2), workers=1)
        return real(folder)

    monkeypatch.setattr(corpus, "reserved", late)
    with pytest.raises(UserError, match=r"was prepared with other settings: seed 2 \(now 1\)"):
        prepare(config(output, jsonl), workers=1)
    assert (
        json.loads((output / "prepare.json").read_text())["config"]["seed"] == 2 and not (output / ".prepare").exists()
    )


# --- what becomes of the text


def end_of_text_tokenizer(folder, kind):
    """tokenizer.json with <|endoftext|> as </s>. A model of words or of unigrams knows it as an ordinary entry, too."""
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "bpe":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        model.train_from_iterator(["some text"], trainer)
        model.pre_tokenizer, model.decoder = (
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tokenizers.decoders.ByteLevel(),
        )
    else:
        words = {word: i for i, word in enumerate(["<unk>", "<|endoftext|>", "a", "text", "ends", "1", "2", "3"])}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "unk_token": "<unk>"}))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_special_tokens_that_the_text_spells_end_no_document(tmp_path, kind):
    lines = [f"a {i} <|endoftext|> text ends {i}" for i in (1, 2, 3)] + ["a text"]
    (tmp_path / "c.txt").write_text("\n".join(lines))
    settings = config(tmp_path / "data", tmp_path / "c.txt", document="line", valid="0", test="0",
                      hf_tokenizer=end_of_text_tokenizer(tmp_path / "tokenizer", kind))  # fmt: skip
    result = prepare(settings, workers=1)
    items = [item.tolist() for item in IndexedDataset(tmp_path / "data" / "train")]
    assert len(items) == 4 and all(item.count(2) == 1 and item[-1] == 2 for item in items)
    assert result["special_tokens"] == 3
    assert result["splits"]["train"]["unknown"] == (0 if kind == "bpe" else 3)
    if kind == "bpe":
        assert texts(tmp_path / "data", "train") == lines


def test_rows_without_text_and_quoted_ones_are_counted(tmp_path, gpt2_folder):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ["one", None, "two", None]))
    (tmp_path / "b.tsv").write_text('text\n"a ""quoted"" text"\nplain\n')
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    sources = [tmp_path / name for name in ("a.jsonl", "b.tsv", "c.jsonl")]
    settings = config(tmp_path / "data", *sources, valid="0", test="1", gpt2_bpe=str(gpt2_folder))
    result = prepare(settings, workers=1)
    assert (result["nulls"], result["quoted"], result["documents_read"]) == (3, 1, 5)


@pytest.mark.parametrize("survives", [0, 1, 2, 3, 4, 5])
def test_killed_while_it_clears_up(prepared, jsonl, tmp_path, monkeypatch, survives):
    """What is left is still known to be its own, is not gone on with, and goes the next time."""
    output, removed = tmp_path / "data", []
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if ".prepare" in str(path):
            removed.append(path)
            if len(removed) > survives:
                raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises((KeyboardInterrupt, UserError)):
            prepare(config(output, jsonl, valid="0.0001"), workers=1)  # refused when all is tokenised
    with pytest.raises(UserError, match=r"leaves the valid split empty"):
        prepare(config(output, jsonl, valid="0.0001"), workers=1)
    assert not output.exists() or not list(output.iterdir())
    prepare(config(output, jsonl), workers=1)
    assert content(output) == content(prepared[0])


def test_data_made_by_others_is_refused_unless_forced(jsonl, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").write_bytes(b"precious")
    (tmp_path / "data" / "notes").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds train\.bin, which this command did not make; use another output"):
        prepare(config(tmp_path / "data", jsonl), workers=1)
    assert content(tmp_path / "data") == {"train.bin": b"precious", "notes": b"mine"}
    prepare(config(tmp_path / "data", jsonl), workers=1, force=True)
    assert (tmp_path / "data" / "notes").read_bytes() == b"mine"


def test_a_failure_leaves_nothing(jsonl, tmp_path):
    with pytest.raises(UserError, match="vocab_size=60000 is too large"):
        prepare(config(tmp_path / "new", jsonl, vocab_size=60000), workers=1)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="vocab_size=60000 is too large"):
        prepare(config(tmp_path / "old", jsonl, vocab_size=60000), workers=1)
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"valid": "0.0001"},
            "--valid 0.0001 leaves the valid split empty, of 300 documents: give a larger fraction, a number",
        ),
        ({"test": "0.0001"}, "--test 0.0001 leaves the test split empty"),
        ({"valid": "200", "test": "100"}, "no document to train on; check"),
        ({"valid": "300", "test": "100"}, "no document to train on; check"),
        ({"column": "body"}, "no column 'body'; there are: id, text"),
    ],
)
def test_splits_that_come_out_empty_are_refused(jsonl, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path / "data", jsonl, **settings), workers=1)
    assert not (tmp_path / "data").exists()


def test_empty_train_split_with_a_given_tokenizer(jsonl, tmp_path, gpt2_folder):
    with pytest.raises(UserError, match="valid='280' and test='20' leave none of 300 documents to train on"):
        prepare(config(tmp_path / "data", jsonl, valid="280", gpt2_bpe=str(gpt2_folder)), workers=1)


def test_output_inside_a_source_folder_is_not_a_source(tmp_path, documents):
    for i, text in enumerate(documents[:120]):
        (tmp_path / f"{i:03}.txt").write_text(text)
    settings = config(tmp_path / "data", tmp_path, vocab_size=400)
    first = prepare(settings, workers=1)
    assert first["documents_read"] == 120
    assert prepare(settings, workers=1) == first


# --- killed

DRIVER = """
import sys
import momentum_lm.text.corpus as corpus
corpus._SAVE_EVERY, corpus.CHUNK = 0, 3000
settings = corpus.PrepareConfig((sys.argv[1],), sys.argv[2], vocab_size=600, valid="0.1", test="20")
if __name__ == "__main__":
    corpus.prepare(settings, int(sys.argv[3]), say=lambda line: print(line, flush=True))
"""


def start(tmp_path, jsonl, workers):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(jsonl), str(tmp_path / "data"), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_while_the_workers_pool_is_made_leaves_no_semaphore(prepared, monkeypatch):
    """Its first one is registered by a process that starts then, which takes a while: as after a fast Ctrl-C."""
    from multiprocessing import resource_tracker

    known, register, unregister = [], resource_tracker.register, resource_tracker.unregister

    def registers(name, kind):
        register(name, kind)
        known.append(name)
        if len(known) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def unregisters(name, kind):
        unregister(name, kind)
        known.remove(name)

    monkeypatch.setattr(resource_tracker, "register", registers)
    monkeypatch.setattr(resource_tracker, "unregister", unregisters)
    try:
        list(encode_in_order([Chunk([(0, b"text")], 4)], prepared[0], 2))
    except KeyboardInterrupt:  # which pytest.raises would keep, and with it the pool
        interrupted = True
    gc.collect()
    assert interrupted and known == []


@pytest.mark.parametrize("workers, step", [(1, 0.04), (2, 0.1)])
def test_killed_at_any_moment_it_goes_on_to_the_same_result(prepared, jsonl, tmp_path, workers, step):
    """kill -9 a little later each time, through sampling, training, tokenising and moving the files, until it gets to
    the end.
    """
    output, _ = prepared
    (tmp_path / "timed").mkdir()
    began = time.monotonic()
    timed = start(tmp_path / "timed", jsonl, workers)
    assert timed.communicate() and timed.returncode == 0
    whole = time.monotonic() - began  # delays are shares of it, so that they mean the same on any machine
    said, kills = [], 0
    for attempt in range(1, 200):
        process = start(tmp_path, jsonl, workers)
        try:
            out, err = process.communicate(timeout=whole * step * attempt)
            said += out.splitlines()
            assert process.returncode == 0, err
            break
        except subprocess.TimeoutExpired:
            process.kill()
            said += process.communicate()[0].splitlines()
            kills += 1
            if (tmp_path / "data" / "prepare.json").exists():
                assert content(tmp_path / "data", ".prepare") == content(output)
    assert process.returncode == 0 and kills >= 3
    assert content(tmp_path / "data") == content(output)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_tokenised_before_a_kill_is_not_tokenised_again(prepared, jsonl, tmp_path, workers):
    output, _ = prepared
    process = start(tmp_path, jsonl, workers)
    state = tmp_path / "data" / ".prepare" / "state.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    saved = json.loads(state.read_text())
    assert not saved["complete"] and saved["counts"]["read"] > 0
    assert not any(
        (tmp_path / "data" / name).exists() for name in ("train.bin", "train.idx", "prepare.json", "dict.txt")
    )
    deadline = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, children)), "workers outlive their parent"

    refused = start(tmp_path, jsonl.parent / "gone.jsonl", workers)
    assert "no such file" in refused.communicate()[1]
    with pytest.raises(
        UserError, match=r"holds unfinished work with .*seed 1 \(now 3\); use another output, or force=True to drop"
    ):
        prepare(config(tmp_path / "data", jsonl, seed=3), workers=1)
    said = start(tmp_path, jsonl, workers).communicate()[0]
    assert said == f"going on after document {saved['counts']['read']}\n"
    assert content(tmp_path / "data") == content(output)


@pytest.mark.parametrize("shares", [{"valid": "0.1", "test": "20"}, {"valid": "0.1", "test": "0.1"}])
@pytest.mark.parametrize("place", ["tokenised", "to come"])
def test_sources_that_change_under_unfinished_work_are_noticed(
    tmp_path, documents, gpt2_folder, monkeypatch, shares, place
):
    """Even where size, beginning and end are what they were. What comes later is free to change, unless the splits
    depend on it.
    """
    path, output = tmp_path / "corpus.jsonl", tmp_path / "data"
    path.write_text("".join(json.dumps({"text": text + " filler" * 40}) + "\n" for text in documents))
    settings = config(output, path, gpt2_bpe=str(gpt2_folder), **shares)
    interrupt(monkeypatch, tmp_path, path, gpt2_bpe=str(gpt2_folder), **shares)
    state = json.loads((output / ".prepare" / "state.json").read_text())
    lines = path.read_text().splitlines(keepends=True)
    assert 1 < state["counts"]["read"] < 100
    changed = 1 if place == "tokenised" else 150
    lines[changed] = lines[changed].replace(" filler", " FILLER")
    path.write_text("".join(lines))
    if place == "to come" and shares["test"] == "0.1":
        assert prepare(settings, workers=1)["documents_read"] == len(documents)
        prepare(config(tmp_path / "afresh", path, gpt2_bpe=str(gpt2_folder), **shares), workers=1)
        assert content(output, "prepare.json") == content(tmp_path / "afresh", "prepare.json")
        return
    with pytest.raises(UserError, match="the sources have changed since this run began, so its work so far is dropped"):
        prepare(settings, workers=1)
    assert not output.exists() or list(output.iterdir()) == []


@pytest.mark.parametrize("change", [True, False])
def test_sources_that_change_when_all_is_only_to_be_moved(tmp_path, jsonl, prepared, monkeypatch, change):
    from momentum_lm.text import corpus

    def die(*args):
        raise KeyboardInterrupt

    path = tmp_path / "c.jsonl"
    path.write_bytes(jsonl.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path / "data", path), workers=1)
    os.utime(path, (1, 1))
    if change:
        path.write_bytes(jsonl.read_bytes().replace(b"ba", b"BA", 1))
    for _ in range(2):
        if change:
            with pytest.raises(
                UserError, match="was prepared with a source whose content has changed since; use another output"
            ):
                prepare(config(tmp_path / "data", path), workers=1)
        else:
            prepare(config(tmp_path / "data", path), workers=1)
    assert content(tmp_path / "data", "prepare.json") == content(prepared[0], "prepare.json")


def test_sources_that_change_between_two_readings_are_noticed(tmp_path, jsonl, monkeypatch):
    from momentum_lm.text import corpus

    path = tmp_path / "c.jsonl"
    path.write_bytes(jsonl.read_bytes())
    real = corpus.train_sentencepiece

    def train(*args):
        path.write_bytes(path.read_bytes().replace(b"ba", b"BA", 1))
        return real(*args)

    monkeypatch.setattr(corpus, "train_sentencepiece", train)
    with pytest.raises(UserError, match="the sources have changed since this run began"):
        prepare(config(tmp_path / "data", path), workers=1)
    assert not (tmp_path / "data").exists()


def test_two_at_once_are_refused(jsonl, tmp_path):
    import fcntl

    (tmp_path / "data" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "data" / ".prepare" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare is at work in"):
            prepare(config(tmp_path / "data", jsonl), workers=1)


def test_a_killed_worker_is_told_and_the_work_kept(jsonl, tmp_path, prepared, monkeypatch):
    import multiprocessing

    from momentum_lm.text import corpus
    from momentum_lm.text.sources import Interrupted

    monkeypatch.setattr(corpus, "_SAVE_EVERY", 0)
    monkeypatch.setattr(corpus, "CHUNK", 3000)
    real, killed = corpus._Run._save, []

    def save_then_kill(self, *args):
        real(self, *args)
        if not killed:
            killed.extend(multiprocessing.active_children())
            for worker in killed:
                worker.kill()

    monkeypatch.setattr(corpus._Run, "_save", save_then_kill)
    with pytest.raises(Interrupted, match=r"a worker process was killed, .* run the command again with fewer workers"):
        prepare(config(tmp_path / "data", jsonl), workers=2)
    said = []
    prepare(config(tmp_path / "data", jsonl), workers=1, say=said.append)
    assert said[0].startswith("going on after document")
    assert content(tmp_path / "data") == content(prepared[0])


@pytest.mark.parametrize("last", ["a document", "the first", ""])
def test_what_was_saved_at_the_end_is_known_again(tmp_path, last):
    """A duplicate or an empty line may follow the last document that counts."""
    path = tmp_path / "lines.txt"
    path.write_text(f"the first\nthe second\n{last}\n")

    def stream():
        return DocumentStream(find_sources([str(path)], "text", "line"), seed=1)

    whole = list(_chunks(stream(), Splitter(0, 0), {"read": 0}))
    ended = stream()
    assert sum(len(chunk.documents) for chunk in whole) == len(list(ended))
    assert whole[-1].counts == ended.counts()
    assert list(_chunks(stream(), Splitter(0, 0), whole[-1].counts)) == []
    path.write_text(f"the first\nanother\n{last}\n")
    with pytest.raises(UserError, match="sources have changed"):
        list(_chunks(stream(), Splitter(0, 0), whole[-1].counts))


def test_on_a_network_file_system_an_open_file_stays_in_its_folder(tmp_path, monkeypatch):
    def unlink(path, missing_ok=False):
        os.rename(path, path.with_name(".nfs01"))

    with monkeypatch.context() as network:
        real, remove = os.close, Path.unlink
        network.setattr("pathlib.Path.unlink", unlink)
        network.setattr("os.close", lambda file: (remove(tmp_path / "out" / ".prepare" / ".nfs01"), real(file)))
        with reserved(tmp_path / "out"):
            pass
    assert os.listdir(tmp_path) == []
