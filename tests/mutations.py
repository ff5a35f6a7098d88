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

import contextlib
import copy
import csv
import faulthandler
import importlib.util
import io
import json
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SECONDS = 10
MEMORY = 1 << 30

# Bytes


def _boundary(rng: random.Random, size: int) -> bytes:
    """An integer of ``size`` bytes that programs stumble over."""
    bits = 8 * size
    high = 1 << (bits - 1)
    value = rng.choice([0, 1, 2, 3, 7, (1 << bits) - 1, high, high - 1, 1 << (bits // 2), 1 << (bits - 2), 1000])
    return (value % (1 << bits)).to_bytes(size, rng.choice(["little", "little", "big"]))


# Of which one format or another thinks something
PIECES = [
    b"", b'"', b'""', b"'", b"`", b"{", b"}", b"{{", b"[", b"]", b"[]", b"{}", b":", b": ", b",", b"%s", b"- ",
    b"---\n",
    b"\0", b"\0" * 40, b"\n", b"\n\n", b"\r", b"\r\n", b"\t", b"\x1b[31m", b"\xe2\x80\xa8", b"\xc4\xb0",
    b"\xff", b"\xe9", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\ud83d", b"\\u0000",
    b"null", b"~", b"true", b"no", b"NaN", b"-Infinity", b"1e999", b"-0", b"-1", b"2024-01-01", b"2024-99-99",
    b"9" * 5000, b"0x" + b"f" * 5000, b"a" * 100_000, b"[" * 3000, b"[" * 30_000, b'{"a":' * 9000,
    b"&a", b"*a", b"&a [*a, *a]", b"<<: *a", b"!!int z", b"!!python/object/apply:os.system [ls]",
    b"text", b"label", b'"text": "x",', b"{text.9}", b"{text[0]}", b"$\\frac{1}{0}$",
    b"#fairseq:overwrite", b"<s> 1",
    b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x80" * 9 + b"\x01",
    b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\xff\xff\xff\xff", b"\x1f\x8b\x08\x1c",  # beginnings of zstd and gzip
]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, pieces: list[bytes] | None = None) -> bytes:
    """Flips, cuts, doubles, moves or overwrites some bytes, also with one of ``pieces``; what is near the beginning or
    the end, headers and tables, more often.
    """
    if not data:
        return rng.randbytes(rng.choice([1, 10, 1000]))
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        length = len(result)
        near = min(length, 64), min(length, 128)
        at = rng.choice([rng.randrange(length), rng.randrange(near[0]), length - 1 - rng.randrange(near[1])])
        span = rng.choice([1, 2, 4, 8, 16, 100, 1000])
        match rng.randrange(8 if pieces is None else 10):
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
                here, there = result[at : at + span], result[other : other + span]
                result[at : at + span], result[other : other + span] = there, here
            case _:
                result[at : at + rng.choice([0, 1, span])] = rng.choice(pieces or [b""])
        if not result:
            break
    return bytes(result)


mutate_packed = partial(mutate_bytes, pieces=PIECES)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Bytes, words or lines: put in, changed into one of PIECES, left out, there again, elsewhere."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        lines = data.splitlines(keepends=True) or [b""]
        at = rng.randrange(len(lines))
        words = list(re.finditer(rb"[\w.]+|[^\s\w]", data))
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                data = mutate_packed(data, rng)
            case 4 | 5 | 6 if words:
                word = rng.choice(words)
                data = data[: rng.choice(word.span())] + rng.choice(PIECES) + data[word.end() :]
            case 7:
                data = b"".join([*lines[:at], rng.choice([rng.choice(lines), rng.choice(PIECES) + b"\n"]), *lines[at:]])
            case 8:
                data = b"".join(lines[:at] + lines[at + 1 :])
            case 9:
                rng.shuffle(lines)
                data = b"".join(lines[at:] + lines[:1])
    return data


# Values: what JSON, YAML and pickle hold


ODD = [
    None, True, 0, -1, 1, 2, 5, 10**9, 2**63, -(2**63), 10**30, 0.0, -0.5, float("nan"), float("inf"), 1e308, "",
    "x", "1", "\x1b[31m\n",
    "${oc.env:HOME}", "a" * 10_000, "../../etc/passwd", "$\\frac{1}{0}$", "\u2028", [], {}, [1, 2], [[]], {"a": 1},
    {"": None}, "<script>",
]  # fmt: skip
ODD_JSON = [*ODD, 10**400, "\0", [None], {"a": {}}, [1, 2, 3]]


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every node."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(entry, (dict, list)):
            _nodes(entry, found)
    return found


def mutate_value(value: Any, rng: random.Random, odd: Callable[[random.Random], Any]) -> Any:
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
    return json.dumps(mutate_value(json.loads(data), rng, lambda rng: rng.choice(ODD_JSON))).encode()


def mutate_json_lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate_text(data, rng)
    values = mutate_value([json.loads(line) for line in data.splitlines()], rng, lambda rng: rng.choice(ODD_JSON))
    return "".join(json.dumps(value) + "\n" for value in values).encode()


# torch.save's files


def _odd_tensor(rng: random.Random) -> Any:
    import torch

    if rng.random() < 0.5:
        return rng.choice(ODD)
    shape = rng.choice([(), (0,), (1,), (2, 8), (16, 16), (40, 16), (3, 0), (1, 1, 1)])
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    kind = rng.choice([*kinds, torch.int64, torch.int8, torch.bool, torch.complex64])
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

    from momentum_lm.model import Decoder, DecoderConfig

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
    from momentum_lm.text.dictionary import Dictionary

    Dictionary.load(folder / "dict.txt")


def _load_fairseqs_dictionary(folder: Path) -> None:
    from fairseq.data import Dictionary

    Dictionary.load(str(folder / "dict.txt"))


def _token_files(folder: Path) -> None:
    from momentum_lm.text.indexed import IndexedDatasetWriter

    rng = random.Random(0)
    with IndexedDatasetWriter(folder / "train", 40) as writer:
        for _ in range(30):
            writer.add([rng.randrange(4, 40) for _ in range(rng.randrange(1, 20))])


def _read_token_files(folder: Path) -> None:
    from momentum_lm.text.blocks import Documents
    from momentum_lm.text.indexed import IndexedDataset, check_files

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
           "seconds": 1.0,
           "by_position": [{"end": 2**k, "loss": 5.0 - k, "ci95": [4.0 - k, 6.0 - k], "blocks": 9} for k in range(5)],
           "icl_score": {"score": -0.2, "ci95": [-0.3, -0.1], "blocks": 9}}  # fmt: skip
    _write_results(folder, "lm_perplexity", {"dtype": "float32"}, [run])


def _classification(folder: Path) -> None:
    from momentum_lm.studies.classification_summary import summary

    runs, lines = [], []
    for dataset, shots, seed in [(d, n, s) for d in ("mr", "piqa") for n in (0, 4) for s in (1, 2)]:
        key = {"dataset": dataset, "seed": seed, "shots": shots, "order": 0, "calibration": "none"}
        run = key | {"num_examples": 4, "accuracy": 0.75, "ci95": [0.3, 0.95], "shots_fitted": shots,
                     "demonstrations": list(range(shots)), "prefix_tokens": 30, "seconds": 1.5}  # fmt: skip
        if dataset == "mr":
            runs.append(run | {"macro_f1": 0.7, "confusion": [[2, 0], [1, 1]], "majority": 0.5})
        else:  # of choices, not labels
            runs.append(run | {"macro_f1": None, "confusion": None, "majority": None, "chance": 0.5})
        setting = "in_context" if shots else "zero_shot"
        lines += [
            key | {"setting": setting, "index": i, "gold": i % 2, "pred": int(i == 1), "scores": [0.1, 0.2]}
            for i in range(4)
        ]
    about = {"labels": ["Negative", "Positive"], "template": "paper", "source": {"kind": "local"}}
    config = {"score": "mean", "sampling": "random", "dtype": "float32", "separator": "\n\n", "bos": [0],
              "datasets": {"mr": about, "piqa": about | {"labels": None}},
              "command": "fairseq-eval --task x"}  # fmt: skip
    _write_results(folder, "icl_classification", config, runs, summary=summary(runs))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"dataset": "mr", "seed": 1, "prompt": "x", "continuations": [" a", " b"], "gold": 1}
    (folder / "samples.json").write_text(json.dumps([sample | {"shots": 0}, sample | {"shots": 4}]))


def _analysis(folder: Path) -> None:
    from momentum_lm.studies.finetuning_summary import summary

    spec = importlib.util.spec_from_file_location("report_conftest", Path(__file__).parent / "report" / "conftest.py")
    assert spec and spec.loader
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    runs = [conftest._analysed(seed=seed, depth=2, heads=2, controls=("untrained",)) for seed in (1, 2)]
    config = {"finetune_lr": [0.01, 0.003], "finetune_loss": "sequence", "datasets": {}, "command": "fairseq-eval"}
    _write_results(folder, "icl_finetune_analysis", config, runs, summary=summary(runs))


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
    """Tables and sometimes the page of one folder, and what ``momentum-lm report`` makes of two."""
    from momentum_lm.cli.report import main
    from momentum_lm.report import classification, finetuning_verdicts, icl_vs_finetuning, perplexity
    from momentum_lm.results.records import read_results
    from momentum_lm.studies import finetuning_summary
    from momentum_lm.studies.registry import STUDIES

    results, pages = read_results(folder / "a"), zlib.crc32((folder / "a" / "results.json").read_bytes()) % 20 == 0
    runs, task = results["runs"], results["task"]
    if runs and task == "icl_classification":
        json.dumps(STUDIES[task].summarise(runs)), classification.conclusions(runs)
        if pages:
            classification.write_report(folder / "a")
    elif runs and task == "icl_finetune_analysis":
        json.dumps(STUDIES[task].summarise(runs)), finetuning_verdicts.conclusions(runs)
        icl_vs_finetuning.results_table(runs), icl_vs_finetuning.accuracy_table(runs)
        for chosen in finetuning_summary.settings(runs).values():  # drawing them all would take half a minute
            icl_vs_finetuning.panels(chosen), icl_vs_finetuning.attention_panels(chosen[0])
            finetuning_verdicts.verdict(chosen), finetuning_summary.mean_heads(chosen, "kendall")
    elif task == "lm_perplexity":
        perplexity.results_table(runs).text()
        if pages:
            perplexity.write_report(folder / "a")
    page = [] if not pages or task == "icl_finetune_analysis" else ["--output", str(folder / "page.html")]
    main.__wrapped__([str(folder / "a"), str(folder / "b"), *page])


def _document_sums(folder: Path) -> None:
    from momentum_lm.report import perplexity

    perplexity.document_sums(folder, {"documents": "documents/valid-16.npz", "num_tokens": 60})


def _go_on(folder: Path) -> None:
    """As an evaluation that goes on in a folder reads its predictions and samples."""
    from momentum_lm.report.classification_comparison import ClassificationComparison
    from momentum_lm.results.records import Predictions, Results, Samples

    found = json.loads((folder / "results.json").read_text())
    key = ("dataset", "seed", "shots", "order", "calibration")
    results = Results(folder, found["task"], found["model"], {"other": 1}, key, True)
    results.data["runs"], results.force = found["runs"], False
    Samples(results)
    ClassificationComparison([folder], between=("shots", [0, 4]))
    Predictions(results)


CHOICES = [2, 2, 3]  # of three queries


def _scores() -> Any:
    import numpy

    from momentum_lm.icl.engine import Scores

    there = numpy.arange(3)[None] < numpy.array(CHOICES)[:, None]
    return Scores(numpy.where(there, -1.5, numpy.nan), there.astype(numpy.int64))


def _journal(folder: Path) -> None:
    from momentum_lm.results.journal import Journal

    journal = Journal(folder, "mr-0shot", "ab")
    journal.begin(100, [[0, 1], [2]], CHOICES)
    journal.add(0, {0: [-1.0, -2.0], 1: [-1.0, -2.0]})
    unfinished = (folder / "mr-0shot.0.jsonl").read_bytes()
    journal.finish(_scores())
    (folder / "mr-0shot.0.jsonl").write_bytes(unfinished)


def _read_journal(folder: Path) -> None:
    import numpy

    from momentum_lm.results.journal import Journal

    journal = Journal(folder, "mr-0shot", "ab")
    read = journal.scores(CHOICES)
    assert read is None or numpy.array_equal(read.sums, _scores().sums, equal_nan=True)
    journal.begin(100, [[0, 1], [2]], CHOICES)
    assert journal.batches.keys() <= {0, 1}


# Labelled data

TICKETS = """\
description: "tickets"
files: {train: FILE, evaluation: FILE}
label: {column: label, values: [[no, nothing], 1, two]}
choices: &o [one, two, three]
lowercase_choices: true
templates:
  paper: "Ticket: {text}. {body.1.part}\\nDepartment: {kind}"
  code: '{text} {kind}'
fields: {kind: {column: kind, words: {1: a, 2: b}}, body: {column: text, without_final: "."}}
"""
FILMS = """\
files: {train: FILE, evaluation: FILE}
label: {column: label, values: [False, True]}
labels: [Bad, Good]
templates: {code: "Review: {text} Sentiment:"}
"""
ROWS = [
    {"text": f"ticket {i}.", "body": [{"part": "a"}, {"part": "b\u00e9"}], "kind": 1 + i % 2,
     "one": "x", "two": "Y", "three": None, "label": i % 2}
    for i in range(5)
]  # fmt: skip


def _data_set(folder: Path, suffix: str) -> None:
    path = folder / f"rows.{suffix}"
    nested = suffix in ("jsonl", "parquet")
    (folder / "set.yaml").write_text((TICKETS if nested else FILMS).replace("FILE", path.name))
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([{**row, "three": "z" if i else None} for i, row in enumerate(ROWS)])
        pyarrow.parquet.write_table(table.append_column("dictionary", table["text"].dictionary_encode()), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        lines = [["text", "label", "more"], *([f'"a {i}"', "True" if i % 2 else "False", "x"] for i in range(5))]
        path.write_bytes("".join({"csv": ",", "tsv": "\t"}[suffix].join(line) + "\r\n" for line in lines).encode())


def _load_data_set(folder: Path) -> None:
    from momentum_lm.icl.datasets.loading import load_dataset

    with _naming(folder.name):
        data = load_dataset(str(folder / "set.yaml"))
    for example in (*data.train, *data.evaluation):
        assert 0 <= example.gold < len(example.continuations) >= 2
        assert all(isinstance(text, str) and text.encode() is not None for text in example.inputs)
        assert all(text.strip() and text.encode() is not None for text in example.continuations)
        assert len(example.inputs) in (1, len(example.continuations))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whoever refuses a file says which one, in one line."""
    try:
        yield
    except ValueError as error:
        if name not in str(error) or "\n" in str(error):
            raise AssertionError(str(error)) from error
        raise


# Corpora

TEXTS = [
    "one", 'a "quoted" text,\nof two lines', "", "naïve café 日本語", "  spaces  ",
    "tab\tand\r\nreturn", "long " * 300,
    "last",
]  # fmt: skip
CORPORA: dict[str, dict[str, str]] = {  # and how each is read
    "file.txt": {}, "lines.txt": {"document": "line"}, "blocks.txt": {"document": "blank-line"},
    "t.csv": {}, "t.tsv": {}, "t.jsonl": {}, "nested.jsonl": {"column": "doc.text.0"},
    "t.jsonl.gz": {}, "repetitive.txt.gz": {"document": "line"},
    "t.jsonl.zst": {}, "repetitive.txt.zst": {"document": "line"},
    "t.parquet": {}, "kind.parquet": {"column": "kind"}, "plain.parquet": {"column": "doc.text"},
}  # fmt: skip


def _corpus(folder: Path, name: str) -> None:
    import gzip

    import zstandard

    lines = [json.dumps({"id": i, "text": text, "doc": {"text": [text]}}) + "\n" for i, text in enumerate(TEXTS)]
    again = b"the same line\n" * 20_000
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    makers: dict[str, Callable[[], bytes]] = {
        "txt": lambda: "\n\n".join(TEXTS).encode(),
        "csv": lambda: _csv(TEXTS),
        "tsv": lambda: _csv(
            [" ".join(t.split()) for t in TEXTS], delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None
        ),
        "jsonl": lambda: "".join(lines).encode(),
        "jsonl.gz": lambda: gzip.compress("".join(lines).encode(), mtime=0),
        "jsonl.zst": lambda: b"".join(zstd.compress("".join(part).encode()) for part in (lines[:5], lines[5:])),
        "txt.gz": lambda: gzip.compress(again, mtime=0),
        "txt.zst": lambda: zstandard.compress(again),
        "parquet": lambda: _parquet(name),
    }
    (folder / name).write_bytes(makers[name.partition(".")[2]]())


def _csv(texts: list[str], **style: Any) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **style).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def _parquet(name: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    settings: dict[str, Any] = {
        "kind.parquet": {"compression": "zstd"},
        "plain.parquet": {"use_dictionary": False, "compression": "none", "write_statistics": False},
    }.get(name, {})
    columns = {"id": list(range(len(TEXTS))), "text": TEXTS, "kind": pyarrow.array(TEXTS).dictionary_encode(),
               "doc": [{"text": text} for text in TEXTS]}  # fmt: skip
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=3, **settings)
    return file.getvalue()


def _read_corpus(folder: Path, name: str) -> None:
    from momentum_lm.text.sources import MAX_DOCUMENT, find_sources

    settings: dict[str, Any] = {"column": "text", "document": None, **CORPORA[name]}
    with _naming(name):
        sources = find_sources([str(folder / name)], **settings)
        documents = [document for source in sources for document in source.documents()]
    assert all(len(document) <= MAX_DOCUMENT and document.decode() is not None for document in documents)
    right = _right_documents(name, (folder / name).read_bytes())
    assert right is None or right == documents, f"{len(documents)} documents, not the right ones"


def _right_documents(name: str, data: bytes) -> list[bytes] | None:
    """The documents of a mutated file, found in a plain way; None where they are not known."""
    plain = data.removeprefix(b"\xef\xbb\xbf")
    if name == "file.txt":
        return [plain]
    if name == "lines.txt":
        return [line.rstrip(b"\r") for line in plain.removesuffix(b"\n").split(b"\n")]
    if name == "t.csv":
        rows = [row for row in csv.reader(io.StringIO(plain.decode(), newline="")) if row]
        return [row[rows[0].index("text")].encode() for row in rows[1:]]
    if name == "t.jsonl":
        texts = [json.loads(line)["text"] for line in plain.split(b"\n") if line.strip()]
        return [text.encode() for text in texts if text is not None]
    return [text.encode() for text in TEXTS] if name.startswith("t.jsonl.") else None  # with a checksum


# Tokenizers


def _sentencepiece(folder: Path) -> None:
    from momentum_lm.text.vocabulary import train_sentencepiece

    words = "a film that is good bad long dull warm thin".split()
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(words, k=8)) for _ in range(500)]
    (folder / "sentencepiece.model").write_bytes(train_sentencepiece(sentences, 290))


def _load_tokenizer(folder: Path) -> None:
    from momentum_lm.text.tokenizer import load_tokenizer

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
        Reader("results of icl_finetune_analysis", _twice(_analysis), _report, mutate_json, "a/results.json"),
        Reader("predictions.jsonl", _classification, _go_on, mutate_json_lines, "predictions.jsonl"),
        Reader("samples.json", _classification, _go_on, mutate_json, "samples.json"),
        Reader("scores", _journal, _read_journal, mutate_packed),
        Reader("documents.npz", _perplexity, _document_sums, mutate_packed, "documents/*.npz"),
        Reader("data set: YAML", partial(_data_set, suffix="jsonl"), _load_data_set, mutate_text, "*.yaml"),
        Reader("data set: jsonl", partial(_data_set, suffix="jsonl"), _load_data_set, mutate_json_lines, "*.jsonl"),
        Reader("data set: csv", partial(_data_set, suffix="csv"), _load_data_set, mutate_text, "*.csv"),
        Reader("data set: tsv", partial(_data_set, suffix="tsv"), _load_data_set, mutate_text, "*.tsv"),
        Reader("data set: parquet", partial(_data_set, suffix="parquet"), _load_data_set, mutate_packed, "*.parquet"),
        *(
            Reader(f"corpus: {name}", partial(_corpus, name=name), partial(_read_corpus, name=name), mutate_packed)
            for name in CORPORA
        ),
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


READ, REFUSED = "read", "refused"


def outcome(reader: Reader, folder: Path) -> str:
    """READ, REFUSED (in one clear line), or else what is wrong with how the files are read."""
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
        return REFUSED
    return READ


def run(name: str, folder: Path, first: int = 0, count: int = 1000) -> dict[int, str]:
    """Mutations of one reader's files, each read in a limited child process -> what is wrong, by its number (-1: with
    all of them together).
    """
    reader = READERS[name]
    good, work = folder / "good", folder / "work"
    good.mkdir(parents=True)
    reader.make(good)
    if (wrong := outcome(reader, good)) != READ:
        return {-1: wrong}  # and everything that reading imports is here before the children are
    outcomes: dict[int, str] = {}
    following = first
    while following < first + count:
        done, ended = _child(reader, good, work, following, first + count, outcomes)
        following += done
        if following < first + count:
            outcomes[following] = ended
            following += 1
    shutil.rmtree(folder)
    failures = {number: found for number, found in outcomes.items() if found not in (READ, REFUSED)}
    tally = Counter(outcomes.values())
    if count >= 1000 and not tally[READ] * tally[REFUSED]:
        failures[-1] = f"the mutations are too weak, or too strong: {tally[READ]} are read, {tally[REFUSED]} refused"
    return failures


def _child(reader: Reader, good: Path, work: Path, first: int, end: int, outcomes: dict[int, str]) -> tuple[int, str]:
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
                found = outcome(reader, work)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                os.write(target, json.dumps([number, found[-3000:]]).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(target)
    with open(source, encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    _, status = os.waitpid(child, 0)
    outcomes.update(answers)
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
