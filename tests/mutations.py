"""Damages files in every way that we can think of, and sees what reads them: nothing but one clear line, or an answer.

    python tests/mutations.py                      the names of the readers
    python tests/mutations.py READER [FIRST COUNT] mutations FIRST to FIRST + COUNT - 1 of that reader's files:
                                                   prints what went wrong

A reader is one line of ``READERS``: a name, a function that makes its good files in a folder, and a function that reads
them from there. Everything follows from the reader's name and the mutation's number. ``run`` reads in a child process
that may take 1 GB more than it has at first, and 10 s of time; a child that crashes, or is ended for these, is one
failure, and the next mutations get another child.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 1 << 30

# Bytes


def _boundary(rng: random.Random, size: int) -> bytes:
    """An integer of ``size`` bytes that programs stumble over."""
    bits = 8 * size
    value = rng.choice(
        [
            0,
            1,
            2,
            3,
            7,
            (1 << bits) - 1,
            1 << (bits - 1),
            (1 << (bits - 1)) - 1,
            1 << (bits // 2),
            1 << (bits - 2),
            1000,
        ]
    )
    return (value % (1 << bits)).to_bytes(size, rng.choice(["little", "little", "big"]))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, doubles, moves or overwrites some bytes; what is near the beginning or the end, headers and tables,
    more often.
    """
    if not data:
        return rng.randbytes(rng.choice([1, 10, 1000]))
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        length = len(result)
        at = min(
            rng.choice(
                [rng.randrange(length), rng.randrange(min(length, 64)), length - 1 - rng.randrange(min(length, 128))]
            ),
            length - 1,
        )
        span = rng.choice([1, 2, 4, 8, 16, 100, 1000])
        match rng.randrange(8):
            case 0:
                result[at] ^= 1 << rng.randrange(8)
            case 1:
                result[at] = rng.randrange(256)
            case 2:
                size = rng.choice([1, 2, 4, 8])
                result[at : at + size] = _boundary(rng, size)
            case 3:
                del result[at:]
            case 4:
                del result[at : at + span]
            case 5:
                result[at:at] = result[at : at + span] * rng.choice([1, 1, 2, 50])
            case 6:
                result[at:at] = rng.randbytes(span)
            case 7:
                other = rng.randrange(length)
                result[at : at + span], result[other : other + span] = (
                    result[other : other + span],
                    result[at : at + span],
                )
        if not result:
            break
    return bytes(result)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Bytes, or words of which formats think something: quotes, brackets, long numbers, control characters, whole lines
    again.
    """
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    lines = data.split(b"\n")
    words = [
        b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"\0", b"\xff", b"\r", b"\t", b"&a", b"*a",
            b"!!python/object:os.system x", b"---",
        b"9" * 5000, b"1e999", b"-1", b"NaN", b"2024-01-01", b"null", b"[" * 3000, b"{\"a\":" * 3000,
        b"#fairseq:overwrite", b"\xe2\x80\xa8",
        b"$\\frac{1}{0}$", b"\x1b[31m", b"-0", b"a" * 100_000, b"\xed\xa0\x80", b"<s> 1", b"true",
    ]  # fmt: skip
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                line = lines[at]
                where = rng.randrange(len(line) + 1)
                lines[at] = line[:where] + rng.choice(words) + line[where + rng.choice([0, 0, 1, 5]) :]
            case 1:
                lines[at] = rng.choice(words)
            case 2:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 3:
                del lines[at]
                lines = lines or [b""]
            case 4:
                parts = lines[at].split(b" ")
                parts[rng.randrange(len(parts))] = rng.choice(words)
                lines[at] = b" ".join(parts)
    return b"\n".join(lines)


# Values: what JSON, YAML and pickle hold


def _odd_value(rng: random.Random) -> Any:
    return rng.choice([
        None, True, 0, -1, 1, 2, 5, 10**9, 2**63, -(2**63), 10**30, 0.0, -0.5, float("nan"), float("inf"), 1e308, "",
        "x", "1", "\x1b[31m\n",
        "${oc.env:HOME}", "a" * 10_000, "../../etc/passwd", "$\\frac{1}{0}$", "\u2028", [], {}, [1, 2], [[]], {"a": 1},
        {"": None}, "<script>",
    ])  # fmt: skip


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every node."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(entry, (dict, list)):
            _nodes(entry, found)
    return found


def mutate_value(value: Any, rng: random.Random, odd: Callable[[random.Random], Any] = _odd_value) -> Any:
    """A copy with some nodes changed, doubled, renamed or gone."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        nodes = _nodes(value, [])
        if not nodes:
            break
        container, key = rng.choice(nodes)
        match rng.randrange(6):
            case 0 | 1 | 2:
                container[key] = odd(rng)
            case 3:
                del container[key]
            case 4 if isinstance(container, dict):
                container[rng.choice(["", "x", "\x1b", key * 2 if isinstance(key, str) else "y"])] = container.pop(key)
            case 4:
                container.insert(key, container[key])
            case 5:
                other, where = rng.choice(nodes)
                if not isinstance(other[where], (dict, list)) or not _nodes(other[where], []):
                    container[key] = other[where]
    return value


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_text(data, rng)
    return json.dumps(mutate_value(json.loads(data), rng)).encode()


# torch.save's files


def _odd_tensor(rng: random.Random) -> Any:
    import torch

    if rng.random() < 0.5:
        return _odd_value(rng)
    shape = rng.choice([(), (0,), (1,), (2, 8), (16, 16), (40, 16), (3, 0), (1, 1, 1)])
    kind = rng.choice(
        [
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int8,
            torch.bool,
            torch.complex64,
        ]
    )
    tensor = torch.zeros(shape, dtype=kind)
    match rng.randrange(6):
        case 0:
            return torch.zeros(1).expand(10**5, 10**5)
        case 1:
            return tensor.to("meta")
        case 2 if shape:
            return tensor.to_sparse()
        case 3 if kind.is_floating_point:
            return tensor * float("nan")
    return tensor


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Changes instructions: numbers to others, names to others, some instructions twice, elsewhere or not at all."""
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:  # an earlier mutation was here
        return mutate_bytes(data, rng)
    parts = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    numbers = [
        b"K\x00", b"K\x01", b"K\xff", b"J\xff\xff\xff\xff", b"J\x00\x00\x00\x80", b"J\xff\xff\xff\x7f",
        b"\x8a\x05\x00\x00\x00\x00\x01",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255, b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    ]  # fmt: skip
    names = [
        b"cos\nsystem\n", b"cbuiltins\nbytearray\n", b"cbuiltins\neval\n", b"ctorch\nLongStorage\n",
        b"ctorch\nBoolStorage\n", b"cnumpy\ndtype\n",
        b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_parameter\n", b"c_codecs\nencode\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n", b"cnumpy._core.multiarray\nscalar\n",
        b"ctorch.storage\nUntypedStorage\n",
    ]  # fmt: skip
    others = [b"N", b"\x88", b")", b"]", b"}", b"(", b".", b"R", b"b", b"\x81", b"t", b"\x85", b"\x86", b"\x87", b"Q",
        b"s", b"u", b"a", b"e",
              b"0", b"2", b"X\x01\x00\x00\x00x", b"X\xff\xff\xff\x7fx", b"B\xff\xff\xff\xffx", b"h\x00", b"q\x00",
              b"j\xff\xff\xff\xff",
              b"r\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"}" * 1000,
                  b"N\x85" * 1000]  # fmt: skip
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(parts))
        alike = [i for i, part in enumerate(parts) if part[:1] == parts[at][:1]]
        match rng.randrange(7):
            case 0:
                chosen = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x8a")] or [at]
                parts[rng.choice(chosen)] = rng.choice(numbers)
            case 1:
                chosen = [i for i, part in enumerate(parts) if part[:1] == b"c"] or [at]
                parts[rng.choice(chosen)] = rng.choice(names)
            case 2:
                parts[at] = rng.choice(others)
            case 3:
                parts.insert(at, rng.choice(others + numbers + names))
            case 4:
                parts[at] = parts[rng.choice(alike)]
            case 5 if len(parts) > 2:
                del parts[at]
            case 6:
                parts[at:at] = parts[at : at + rng.choice([1, 3, 10])]
    return b"".join(parts)


def write_zip(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """As torch lays them out: plain, each entry's bytes at a multiple of 64."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            padding = -(file.tell() + 30 + len(name) + 4) % 64
            entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(entry, content)
    return file.getvalue()


def mutate_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Bytes, instructions, entries of the archive, or values of what torch.save is given."""
    import torch

    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(data, rng)
    old = data[:2] != b"PK"
    if kind < 0.6:
        state = torch.load(io.BytesIO(data), weights_only=False)
        file = io.BytesIO()
        torch.save(mutate_value(state, rng, _odd_tensor), file, _use_new_zipfile_serialization=not old)
        return file.getvalue()
    if old:
        return mutate_pickle(data[:-2000], rng) + data[-2000:]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    if kind < 0.9:
        return write_zip(
            [(name, mutate_pickle(content, rng) if name.endswith("data.pkl") else content) for name, content in entries]
        )
    at = rng.randrange(len(entries))
    name, content = entries[at]
    match rng.randrange(6):
        case 0:
            entries[at] = (name, mutate_bytes(content, rng))
        case 1:
            del entries[at]
        case 2:
            entries[at] = (rng.choice(["", "x", "../x", "archive/data/0", entries[0][0]]), content)
        case 3:
            entries[at] = (name, content * 3)
        case 4:
            return write_zip(entries, zipfile.ZIP_DEFLATED)
        case 5:
            return write_zip([*entries, ("archive/data/99", bytes(50_000_000))], zipfile.ZIP_DEFLATED)
    return write_zip(entries)


# Readers


@dataclass(frozen=True)
class Reader:
    """``make(folder)`` writes good files; ``read(folder)`` reads them; ``mutate`` changes one of them, chosen by
    ``files`` (a glob).
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes
    files: str = "*"


OPTIONS = {
    "_name": "momentum_lm_tiny", "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "activation_fn": "gelu", "position": "sinusoidal", "momentum_kind": "ema", "momentum_learned": True, "dropout": 0.0,
    "max_target_positions": 32, "tokens_per_sample": 32,
}  # fmt: skip


def _state() -> dict[str, Any]:
    import numpy
    import torch

    from momentum_lm.modules import Decoder, DecoderConfig

    torch.manual_seed(0)
    model = Decoder(DecoderConfig(40, 16, 24, 2, 4, max_positions=32, momentum_kind="ema", momentum_learned=True))
    return {
        "args": None,
        "cfg": {"model": dict(OPTIONS), "task": {"_name": "language_modeling", "data": "nowhere",
            "tokens_per_sample": 32, "add_bos_token": True,
                                                 "max_target_positions": 32},
                "criterion": {"_name": "cross_entropy"}, "common": {"seed": 1}},
        "model": {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer_history": [{"num_updates": 7, "optimizer_name": "FairseqAdam", "criterion_name": "X",
        "lr_scheduler_state": {"best": 1.5}}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 3}, "best": float(numpy.float64(2.5)),
        "n": numpy.int64(3)},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(4), "step": 7}},
        "param_groups": [{"params": [0], "lr": 0.1}]},
    }  # fmt: skip


def _whole(folder: Path, new: bool = True) -> None:
    import torch

    torch.save(_state(), folder / "model.pt", _use_new_zipfile_serialization=new)


def _parts(folder: Path) -> None:
    import torch

    for rank in range(2):
        state = _state()
        tensors = state["model"]
        for name, tensor in tensors.items():
            size = -(-len(tensor) // 2)
            tensors[name] = tensor[rank * size : (rank + 1) * size].clone()
        state["fsdp_metadata"] = {"rank": rank, "world_size": 2, "divided": list(tensors)}
        torch.save(state, folder / f"model-shard{rank}.pt")


def _load_native(folder: Path) -> None:
    import torch

    from momentum_lm.lm.native import load_native

    load_native(folder).token_losses(torch.tensor([[2, 3, 3]]), torch.tensor([[3, 3, 2]]))


def _load_everything(folder: Path) -> None:
    from momentum_lm.formats.checkpoint import load_checkpoint

    state = load_checkpoint(folder / "model.pt")
    assert isinstance(state, dict)


def _with_dictionary(folder: Path) -> None:
    _whole(folder)
    _dictionary(folder)


def _load_with_fairseq(folder: Path) -> None:
    from fairseq import checkpoint_utils

    checkpoint_utils.load_model_ensemble_and_task([str(folder / "model.pt")], arg_overrides={"data": str(folder)})


def _dictionary(folder: Path) -> None:
    (folder / "dict.txt").write_text("".join(f"word{i} {100 - i}\n" for i in range(36)))


def _load_dictionary(folder: Path) -> None:
    from momentum_lm.data.dictionary import Dictionary

    Dictionary.load(folder / "dict.txt")


def _load_fairseqs_dictionary(folder: Path) -> None:
    from fairseq.data import Dictionary

    Dictionary.load(str(folder / "dict.txt"))


def _token_files(folder: Path) -> None:
    from momentum_lm.data.indexed import IndexedDatasetWriter

    rng = random.Random(0)
    with IndexedDatasetWriter(folder / "train", 40) as writer:
        for _ in range(30):
            writer.add([rng.randrange(4, 40) for _ in range(rng.randrange(1, 20))])


def _read_token_files(folder: Path) -> None:
    from momentum_lm.data.blocks import Documents
    from momentum_lm.data.indexed import IndexedDataset, check_files

    check_files(folder / "train")
    data = IndexedDataset(folder / "train")
    items = [item.tolist() for item in data]
    assert sum(map(len, items)) == sum(map(len, data.blocks(50))) == data.num_tokens
    documents = Documents([data], 40)
    for number in range(len(data)):
        documents[number]


def _perplexity(folder: Path) -> None:
    import numpy

    (folder / "documents").mkdir()
    nll, tokens = numpy.linspace(1, 9, 8), numpy.arange(4, 12)
    numpy.savez_compressed(folder / "documents" / "valid-16.npz", nll=nll, tokens=tokens)
    run = {"split": "valid", "context_length": 16, "perplexity": 5.5, "ci95": [5.0, 6.0], "bits_per_byte": 1.5,
        "num_tokens": int(tokens.sum()),
           "num_documents": 8, "nll": float(nll.sum()), "data_sha256": "ab", "documents": "documents/valid-16.npz",
           "device": "cpu",
           "seconds": 1.0}  # fmt: skip
    _write_results(folder, "lm_perplexity", {"dtype": "float32"}, [run])


def _classification(folder: Path) -> None:
    runs, lines = [], []
    for seed in (1, 2):
        key = {"dataset": "mr", "seed": seed, "shots": 4, "order": 0, "calibration": "none"}
        runs.append(key | {"num_examples": 4, "accuracy": 0.75, "ci95": [0.3, 0.95], "macro_f1": 0.7,
            "confusion": [[2, 0], [1, 1]],
                           "majority": 0.5, "shots_fitted": 4, "demonstrations": [0, 1, 2, 3], "prefix_tokens": 30,
                               "seconds": 1.5})  # fmt: skip
        lines += [
            key | {"setting": "in_context", "index": i, "gold": i % 2, "pred": int(i == 1), "scores": [0.1, 0.2]}
            for i in range(4)
        ]
    about = {"labels": ["Negative", "Positive"], "template": "paper", "source": {"kind": "local"}}
    config = {"score": "mean", "sampling": "random", "dtype": "float32", "separator": "\n\n", "bos": [0],
        "datasets": {"mr": about},
              "command": "fairseq-eval --task x"}  # fmt: skip
    summary = {"mr": {"4": {"mean": 0.75, "ci95": [0.7, 0.8], "num_seeds": 2}}}
    _write_results(folder, "icl_classification", config, runs, summary=summary)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_results(folder: Path, task: str, config: Any, runs: Any, **more: Any) -> None:
    model = {"path": "model.pt", "sha256": "ab", "parameters": 10, "architecture": {"hidden_size": 8}}
    (folder / "results.json").write_text(
        json.dumps({"task": task, "model": model, "config": config, "runs": runs, **more})
    )


def _twice(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Good results in two folders, so that a report compares them."""

    def both(folder: Path) -> None:
        for name in "ab":
            (folder / name).mkdir()
            make(folder / name)

    return both


def _report(folder: Path) -> None:
    from momentum_lm.cli.report import main

    assert main([str(folder / "a"), str(folder / "b"), "--output", str(folder / "page.html")]) in (0, 2)


def _rows() -> list[dict[str, Any]]:
    return [
        {"text": f"a film that is {word}", "label": i % 2}
        for i, word in enumerate("good bad long dull warm thin".split())
    ]


def _data_set(folder: Path, suffix: str) -> None:
    files = f"files: {{train: train.{suffix}, evaluation: test.{suffix}}}"
    labels = "label: label\nlabels: [Negative, Positive]\ndescription: films"
    (folder / "films.yaml").write_text(f'{files}\n{labels}\ntemplates:\n  code: "Review: {{text}} Sentiment:"\n')
    for split in ("train", "test"):
        _table(folder / f"{split}.{suffix}")


def _table(path: Path) -> None:
    rows = _rows()
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _load_data_set(folder: Path) -> None:
    from momentum_lm.data.classification import load_dataset

    load_dataset(str(folder / "films.yaml"))


def _compressed(folder: Path, suffix: str) -> None:
    import gzip

    import zstandard

    text = "".join(json.dumps(row) + "\n" for row in _rows() * 20).encode()
    packed = gzip.compress(text) if suffix == "gz" else zstandard.ZstdCompressor().compress(text)
    (folder / f"corpus.jsonl.{suffix}").write_bytes(packed)


def _read_corpus(folder: Path) -> None:
    from momentum_lm.data.sources import find_sources

    for source in find_sources([str(path) for path in folder.iterdir()], "text", None):
        source.fingerprint()
        for _ in source.documents():
            pass


def _sentencepiece(folder: Path) -> None:
    from momentum_lm.data.vocabulary import train_sentencepiece

    words = " ".join(row["text"] for row in _rows()).split()
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(words, k=8)) for _ in range(500)]
    (folder / "sentencepiece.model").write_bytes(train_sentencepiece(sentences, 290))


def _load_tokenizer(folder: Path) -> None:
    from momentum_lm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a film that is good"))


READERS = {
    reader.name: reader
    for reader in (
        Reader("checkpoint", _whole, _load_native, mutate_checkpoint),
        Reader("checkpoint, unmapped", _whole, _load_everything, mutate_checkpoint),
        Reader("checkpoint of old torch", lambda folder: _whole(folder, new=False), _load_native, mutate_checkpoint),
        Reader("checkpoint in parts", _parts, _load_native, mutate_checkpoint),
        Reader("checkpoint, by fairseq", _with_dictionary, _load_with_fairseq, mutate_checkpoint, "*.pt"),
        Reader("token files", _token_files, _read_token_files),
        Reader("dict.txt", _dictionary, _load_dictionary, mutate_text),
        Reader("dict.txt, by fairseq", _dictionary, _load_fairseqs_dictionary, mutate_text),
        Reader("results of lm_perplexity", _twice(_perplexity), _report, mutate_json, "a/results.json"),
        Reader("results of icl_classification", _twice(_classification), _report, mutate_json, "a/results.json"),
        Reader("predictions.jsonl", _twice(_classification), _report, mutate_text, "a/predictions.jsonl"),
        Reader("documents.npz", _twice(_perplexity), _report, mutate_bytes, "a/documents/*.npz"),
        Reader("data set: YAML", lambda folder: _data_set(folder, "jsonl"), _load_data_set, mutate_text, "*.yaml"),
        Reader(
            "data set: JSON Lines", lambda folder: _data_set(folder, "jsonl"), _load_data_set, mutate_text, "*.jsonl"
        ),
        Reader("data set: CSV", lambda folder: _data_set(folder, "csv"), _load_data_set, mutate_text, "*.csv"),
        Reader(
            "data set: parquet", lambda folder: _data_set(folder, "parquet"), _load_data_set, mutate_bytes, "*.parquet"
        ),
        Reader("corpus: JSON Lines", lambda folder: _table(folder / "corpus.jsonl"), _read_corpus, mutate_text),
        Reader("corpus: CSV", lambda folder: _table(folder / "corpus.csv"), _read_corpus, mutate_text),
        Reader("corpus: parquet", lambda folder: _table(folder / "corpus.parquet"), _read_corpus),
        Reader("corpus: gzip", lambda folder: _compressed(folder, "gz"), _read_corpus),
        Reader("corpus: zstd", lambda folder: _compressed(folder, "zst"), _read_corpus),
        Reader("sentencepiece.model", _sentencepiece, _load_tokenizer),
    )
}

# Running


def mutated(reader: Reader, number: int, good: Path, folder: Path) -> None:
    """Makes ``folder`` a copy of ``good`` with mutation ``number`` in it."""
    rng = random.Random(f"{reader.name}/{number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    path = rng.choice(sorted(folder.glob(reader.files)))
    path.write_bytes(reader.mutate(path.read_bytes(), rng))


def problem(reader: Reader, folder: Path) -> str:
    """What is wrong with how the files are read; empty if nothing: they are, or one line says why not."""
    try:
        reader.read(folder)
    except Exception as error:
        text = str(error)
        if not getattr(error, "user_error", False):
            return "".join(traceback.format_exception(error)[-3:])
        if not text.strip() or len(text) > 2000:  # line breaks and control characters are taken out where it is printed
            return f"not one clear line: {text[:300]!r}"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate" in str(cause):
                return f"takes too much memory: {text}"
            cause = cause.__cause__ or cause.__context__
    return ""


def run(name: str, folder: Path, first: int = 0, count: int = 1000) -> dict[int, str]:
    """Mutations of one reader's files, each read in a limited child process -> what is wrong, by its number."""
    reader = READERS[name]
    good, work = folder / "good", folder / "work"
    good.mkdir(parents=True)
    reader.make(good)
    if wrong := problem(reader, good):
        return {-1: wrong}  # and everything that reading imports is here before the children are
    failures: dict[int, str] = {}
    following = first
    while following < first + count:
        done, ended = _child(reader, good, work, following, first + count, failures)
        following += done
        if following < first + count:
            failures[following] = ended
            following += 1
    shutil.rmtree(folder)
    return failures


def _child(reader: Reader, good: Path, work: Path, first: int, end: int, failures: dict[int, str]) -> tuple[int, str]:
    """How many mutations from ``first`` on the child has read, and how it ended where these are not all."""
    source, target = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(source)
            _limit()
            for number in range(first, end):
                mutated(reader, number, good, work)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: the machine may be busy
                signal.alarm(6 * SECONDS)
                found = problem(reader, work)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                os.write(target, json.dumps([number, found[-3000:]]).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(target)
    with open(source, encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    _, status = os.waitpid(child, 0)
    failures.update({number: wrong for number, wrong in answers if wrong})
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an exit"
    return len(answers), f"the process was ended by {how}"


def _limit() -> None:
    faulthandler.disable()  # pytest's would print a crash
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def main(words: list[str]) -> int:
    import tempfile

    if not words:
        print("\n".join(READERS))
        return 0
    first, count = map(int, words[1:] or (0, 1000))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        failures = run(words[0], Path(folder) / "mutations", first, count)
    for number, wrong in sorted(failures.items()):
        print(f"{words[0]} {number}: {wrong}\n")
    print(f"{words[0]}: {len(failures)} of {count} went wrong, in {time.monotonic() - begun:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
