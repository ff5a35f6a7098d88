"""A folder of a Hugging Face model -> a folder of a fairseq checkpoint."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from momentum_lm.errors import UserError
from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.formats.pickles import shown
from momentum_lm.model import DecoderConfig
from momentum_lm.model.filters import is_of_filter
from momentum_lm.text.dictionary import BOS, EOS, SPECIALS, Dictionary
from momentum_lm.text.hub import hub_answers
from momentum_lm.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from momentum_lm.untrusted import parse_json

from .decoder_options import nearest, to_fairseq
from .families import Family, family_of
from .gguf import GGUF, read_gguf
from .lazy import Lazy, read_safetensors, write_torch
from .state_dict import extras
from .tokenizers import save_tokenizer

CHECKPOINT = "model.pt"
_MOST_JSON = 1 << 27  # bytes: an index of a hundred thousand tensors has a tenth
_BESIDE = ("*.json", "*.txt", "*.model")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of Hugging Face that has been looked at, and not read yet.

    ``order`` (our vocabulary): the id there of each id here, -1 where it has none; None: ids are the same. ``notes``:
    what a user should know.
    """

    folder: Path
    family: Family
    decoder: DecoderConfig
    tensors: dict[str, Lazy]
    dictionary: Dictionary
    order: torch.Tensor | None
    add_bos: bool
    notes: list[str]


def find_model(name: str, gguf_file: str | None = None) -> Path:
    """The folder of a model: itself, or what the hub has under a name, which is fetched where it is not there yet.
    ``NAME@REVISION`` is a branch, tag or commit there.

    ``gguf_file``: the file there that is wanted. Raises UserError for what is neither.
    """
    folder = Path(name)
    if folder.exists():
        return folder
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", name)
    if not match or name.endswith(".pt"):
        raise UserError(
            f"{name} does not exist; give a checkpoint, a folder, or the name of a model of the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError("models of the Hugging Face hub need: pip install 'momentum_lm[transformers]'") from error
    online = hub_answers()
    given: dict[str, Any] = {"revision": match[2]}
    if not online:
        given["local_files_only"] = True  # what earlier downloads left
    ways = (
        [[gguf_file]]
        if gguf_file
        else [[*_BESIDE, weights] for weights in ("model*.safetensors", "pytorch_model*.bin")]
    )
    try:
        for patterns in ways:
            folder = Path(snapshot_download(match[1], allow_patterns=patterns, **given))
            if any(folder.glob(patterns[-1])):
                break
    except Exception as error:  # of the library or of its HTTP client, by its version
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = f"does not give it: {reason}" if online else "does not answer, nor was it downloaded earlier"
        raise UserError(f"{name} is no file or folder here, and the Hugging Face hub {reason}") from error
    return folder


def look(folder: Path, output: Path, trust: bool = False, gguf_file: str | None = None) -> Source:
    """What is in a folder with a ``config.json``, or in a GGUF file there; its tokenizer's files go to ``output``.
    ``trust`` lets a ``pytorch_model.bin`` run code.

    Raises UserError for a model that the decoder cannot be, for tensors that do not fit, and for what is torn or
    missing.
    """
    gguf = None if gguf_file is None else read_gguf(folder / gguf_file)
    config, family, decoder = _described(folder / (gguf_file or "config.json"), gguf)
    tensors = _tensors(folder, family, trust) if gguf is None else gguf.weights(family, decoder)
    _tie(folder, family, decoder, tensors)
    try:
        family.check(tensors, decoder, decoder.vocab_size)
    except UserError as error:
        raise UserError(f"{folder}: ", error) from error
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos  # of several, the first is the pretrained model's
    eos = eos if isinstance(eos, int) and not isinstance(eos, bool) else None
    trained_here = gguf is None and (folder / "dict.txt").exists()
    tokenizer: Tokenizer | None = None
    if trained_here:
        tokenizer = _copy_tokenizer(folder, output)
        dictionary, order = _own_dictionary(folder / "dict.txt", decoder.vocab_size), None
    else:
        if gguf is None or "tokenizer.ggml.tokens" in gguf.fields:
            tokenizer = save_tokenizer(folder, output, eos, gguf_file)
        dictionary, order = _vocabulary(folder, family, decoder.vocab_size, tokenizer, eos)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        add_bos = tokenizer.prefix == [BOS]
    else:
        add_bos = tokenizer is not None and config.get("bos_token_id") == BOS
    if order is not None:
        absent = tuple(torch.nonzero(order < 0).flatten().tolist())
        decoder = dataclasses.replace(decoder, vocab_size=len(dictionary), absent_tokens=absent)
    notes = _notes(folder, gguf, tokenizer, decoder)
    if not trained_here and isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.prefix:
        plain = r"to evaluate it without, as --hf-model does, add --bos no --separator '\n\n'"
        notes.append(f"its tokenizer puts nothing before a text, and fairseq's commands </s>; {plain}")
    return Source(folder, family, decoder, tensors, dictionary, order, add_bos, notes)


def _described(path: Path, gguf: GGUF | None) -> tuple[dict[str, Any], Family, DecoderConfig]:
    """What ``config.json``, or a GGUF file's header, says, and the family and configuration that it means."""
    config = _read_json(path) if gguf is None else {}
    try:
        config = config if gguf is None else gguf.config()
        family = family_of(config)
        vocabulary = config.get("vocab_size")
        if not isinstance(vocabulary, int) or isinstance(vocabulary, bool) or not 0 < vocabulary < 1 << 31:
            raise UserError("it gives no vocab_size")
        return config, family, family.decoder_config(config, vocabulary)
    except UserError as error:
        raise UserError(f"{path}: ", error) from error


def _tie(folder: Path, family: Family, decoder: DecoderConfig, tensors: dict[str, Lazy]) -> None:
    """Of a tied model's two embeddings leaves one. Raises UserError where they differ."""
    head, embedding = (family.theirs(name) for name in ("output_projection.weight", "embed_tokens.weight"))
    if decoder.tie_embeddings and head in tensors:
        tied = tensors.pop(head)
        if embedding in tensors and not torch.equal(tied.load(), tensors[embedding].load()):
            raise UserError(
                f"{folder}: {head} differs from the embedding that config.json ties it to; set tie_word_embeddings to "
                "false there"
            )
        tensors.setdefault(embedding, tied)


def _notes(folder: Path, gguf: GGUF | None, tokenizer: Tokenizer | None, decoder: DecoderConfig) -> list[str]:
    notes = []
    if gguf is not None and gguf.quantised:
        notes.append(f"quantised weights ({', '.join(gguf.quantised)}) were dequantised to fp32, which --dtype changes")
    if tokenizer is None:
        notes.append(f"{folder} has no tokenizer; dict.txt has its ids in decimal")
    if decoder.absent_tokens:
        absent = len(decoder.absent_tokens)
        notes.append(f"entries of dict.txt that are not in its vocabulary and are never predicted: {absent}")
    return notes


def write_checkpoint(
    source: Source, folder: Path, dtype: torch.dtype | None, progress: Callable[[int], object]
) -> None:
    """Writes ``model.pt`` and ``dict.txt`` into a folder. ``dtype`` None: as they are."""
    tensors = source.family.to_ours(source.tensors, source.decoder, source.order)
    weights: dict[str, Any] = {}
    made: dict[Lazy, Lazy] = {}  # so that what is tied stays so
    for name, lazy in tensors.items():
        if lazy not in made:
            made[lazy] = lazy.weight(f"{source.folder}: {name}", None if is_of_filter(name) else dtype)
        weights[f"decoder.{name}"] = made[lazy]
    weights |= {f"decoder.{name}": Lazy.of(value) for name, value in extras(source.decoder).items()}
    write_torch(folder / CHECKPOINT, checkpoint(source.decoder, source.add_bos) | {"model": weights}, progress)
    source.dictionary.save(folder / "dict.txt")


def checkpoint(decoder: DecoderConfig, add_bos: bool) -> dict[str, Any]:
    """All that a fairseq checkpoint holds beside the weights: options, and that it was trained for no updates."""
    history = {
        "criterion_name": "ChunkedCrossEntropy",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    return {
        "args": None,
        "cfg": {
            "model": {"_name": nearest(decoder), **to_fairseq(decoder)},
            "task": {
                "_name": "language_modeling",
                "data": None,
                "tokens_per_sample": decoder.max_positions,
                "max_target_positions": decoder.max_positions,
                "add_bos_token": add_bos,
            },
            "criterion": {"_name": "cross_entropy"},
            # what fairseq-validate asks for beside, by reference
            "common": {"seed": 1, "tpu": False, "use_plasma_view": False, "plasma_path": "/tmp/plasma"},
            "dataset": {"batch_size": None, "batch_size_valid": None, "dataset_impl": None, "data_buffer_size": 10},
            "optimization": {"sentence_avg": False},
        },
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
        "last_optimizer_state": None,
    }


def _tensors(folder: Path, family: Family, trust: bool) -> dict[str, Lazy]:
    """The model's tensors by their full names, from one file or several."""
    for single, index in (("model.safetensors",) * 2, ("pytorch_model.bin",) * 2):
        listed = folder / f"{index}.index.json"
        if (folder / single).exists():
            files = [single]
        elif listed.exists():
            weight_map = _read_json(listed).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in weight_map.values()
            ):
                raise UserError(
                    f"{listed} is not the index of a model in parts: it has no weight_map of files beside it"
                )
            files = sorted(set(weight_map.values()))
        else:
            continue
        break
    else:
        raise UserError(f"{folder} holds no weights: model.safetensors or pytorch_model.bin, or their parts and index")
    found: dict[str, Lazy] = {}
    for name in files:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing, a part of the model; fetch it")
        found |= read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, trust)
    return family.full_names(found)


def _read_torch(path: Path, trust: bool) -> dict[str, Lazy]:
    state = load_checkpoint(path, trust=trust, mmap=True)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            what = "which is no tensor: it is not the weights of a model of transformers"
            raise UserError(f"{path} holds {shown(name)}, {what}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{path}: {shown(name)} is {tensor.layout} on {tensor.device}, and no weights of a model")
    return {name: Lazy.of(tensor) for name, tensor in state.items()}


def _copy_tokenizer(folder: Path, output: Path) -> Tokenizer:
    """The tokenizer of a model that was trained here, whose files are now in ``output``: it is the one that it had."""
    tokenizer = load_tokenizer(folder)
    for name, path in tokenizer.files.items():
        shutil.copyfile(path, output / name)
    return tokenizer


def _own_dictionary(file: Path, size: int) -> Dictionary:
    """The dictionary of a model that was trained here."""
    dictionary = Dictionary.load(file)
    if len(dictionary) != size:
        raise UserError(
            f"{file} has {len(dictionary)} entries, and the model of config.json {size}: they do not belong together"
        )
    return dictionary


def _vocabulary(
    folder: Path, family: Family, size: int, tokenizer: Tokenizer | None, eos: int | None
) -> tuple[Dictionary, torch.Tensor | None]:
    """The dictionary of a model of others, and where its ids lie there; None: where they are here."""
    symbols = [str(i) for i in range(size)]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        if 2 * len(tokenizer.symbols) < size:
            raise UserError(
                f"{folder}: transformers finds {len(tokenizer.symbols)} tokens in the tokenizer's files, and the "
                f"model has {size}: this "
                "version does not read them; save a tokenizer.json there with an older one"
            )
        known = tokenizer.symbols[:size]
        symbols[: len(known)] = known
    elif family.fairseq_ids and eos in (None, EOS):
        symbols[: len(SPECIALS)] = SPECIALS
    elif eos is not None and 0 <= eos < size:  # -1 is said for none
        symbols[eos] = SPECIALS[EOS]
    if symbols[: len(SPECIALS)] == list(SPECIALS):
        return Dictionary(symbols[len(SPECIALS) :]), None
    if SPECIALS[EOS] not in symbols:
        raise UserError(
            f"{folder} does not say which token ends a text: it needs an eos_token in tokenizer_config.json, or an "
            "eos_token_id"
        )
    dictionary = Dictionary(symbol for symbol in symbols if symbol not in SPECIALS)
    where = {symbol: i for i, symbol in enumerate(symbols)}
    if any(symbol not in where for symbol in SPECIALS):
        dictionary = dictionary.padded()
    return dictionary, torch.tensor([where.get(symbol, -1) for symbol in dictionary.symbols])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; no configuration is so large")
        value = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
