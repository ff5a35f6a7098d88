"""Tokenizers from Hugging Face's files to ours and back, with the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError
from momentum_lm.files import write_json
from momentum_lm.text.dictionary import BOS, EOS, PAD, SPECIALS, UNK
from momentum_lm.text.tokenizer import GPT2Tokenizer, HuggingFaceTokenizer, Tokenizer

from .gguf import header_read_once

NAMES = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
_MOST_TOKENS = 1 << 24
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")  # one of which every tokenizer of transformers has


def save_tokenizer(
    source: Path, folder: Path, eos: int | None, gguf_file: str | None = None
) -> HuggingFaceTokenizer | None:
    """Writes the tokenizer of a Hugging Face model as ``tokenizer.json`` and ``tokenizer_config.json``; None if the
    model has none.

    ``eos``: the id that ends a text by the model's configuration, for a tokenizer that does not say it. ``gguf_file``:
    the file in ``source`` that holds it. transformers builds some tokenizers by its own rules and not as their
    tokenizer.json says, so what it built is what is written. Raises UserError if transformers does not load it, or runs
    it in Python.
    """
    if gguf_file is None and not any(any(source.glob(pattern)) for pattern in _FILES):
        return None
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "tokenizers of Hugging Face need transformers: pip install 'momentum_lm[transformers]'"
        ) from error
    own = source / "tokenizer.json"
    given = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with header_read_once(gguf_file):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **given)
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise UserError(f"{source}: the tokenizer is {kind}, Python code without a tokenizer.json")
        backend = tokenizer.backend_tokenizer
        if gguf_file is None and own.exists() and type(backend).from_file(str(own)).to_str() == backend.to_str():
            shutil.copyfile(own, folder / own.name)  # as it is: scores lose a digit each time they are read and written
        else:
            (folder / own.name).write_text(backend.to_str(pretty=True), encoding="utf-8")
        last = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        roles = {role: str(token) for role in NAMES if (token := getattr(tokenizer, role)) is not None}
        if "eos_token" not in roles and eos is not None and 0 <= eos < len(tokenizer):
            roles["eos_token"] = tokenizer.convert_ids_to_tokens(eos)
        length = tokenizer.model_max_length
        limit = {"model_max_length": length} if isinstance(length, int) and 0 < length < 1 << 40 else {}
    except UserError:
        raise
    except BaseException as error:  # of many kinds: what is written in Rust panics with one of its own
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: transformers does not load the tokenizer: {reason}") from error
    if last > _MOST_TOKENS:
        raise UserError(f"{source}: the tokenizer has an id of {last:,}; no model has so many tokens")
    _write_settings(folder, roles, bool(tokenizer.split_special_tokens), limit)
    return HuggingFaceTokenizer(folder)


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_positions: int, bos: int, order: Sequence[int] | None = None
) -> str | None:
    """Writes Hugging Face's files of one of our tokenizers, with the dictionary's ids.

    ``bos``: what a text begins with. ``order``: the dictionary's id of each of a tokenizer.json's own, which stay;
    None: they do not. Beside them go ``dict.txt`` and the tokenizer's own files where it has others, so that the way
    back gives what there was. Returns what the files do not do exactly, in one line, if anything.
    """
    limit = {"model_max_length": max_positions}
    names = {role: SPECIALS[special] for role, special in NAMES.items()} | {"bos_token": SPECIALS[bos]}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids = tokenizer.own_to_dictionary[: tokenizer.vocab_size]  # tokens beyond the model's have none of its ids
        if order is not None or ids == list(range(len(ids))):
            for name, path in tokenizer.files.items():
                shutil.copyfile(path, folder / name)
            if len(tokenizer.files) == 1:
                if order is not None:
                    names = {
                        role: tokenizer.token(order.index(i)) for role, i in (("bos_token", bos), ("eos_token", EOS))
                    }
                _write_settings(folder, names, False, limit)
        else:
            content, tokens = _in_dictionary_order(tokenizer, bos)
            write_json(folder / "tokenizer.json", content)
            names = {role: tokens[special] for role, special in NAMES.items()} | {"bos_token": tokens[bos]}
            _write_settings(folder, names, tokenizer.splits_special_tokens, limit)
        return None
    for name, path in tokenizer.files.items():
        shutil.copyfile(path, folder / name)
    tokenizer.dictionary.save(folder / "dict.txt")
    model = _gpt2(tokenizer) if isinstance(tokenizer, GPT2Tokenizer) else _unigram(tokenizer)
    if model is None:
        return f"no tokenizer.json does exactly what {next(iter(tokenizer.files))} does, which is there as it is"
    write_json(
        folder / "tokenizer.json",
        model | {"version": "1.0", "added_tokens": _added(SPECIALS), "post_processor": _template(SPECIALS, bos)},
    )
    _write_settings(folder, names, False, limit)
    if isinstance(tokenizer, GPT2Tokenizer):
        return None
    return (
        "SentencePiece adds up in fp32 and tokenizer.json in fp64, so where cuts tie, as in long runs of one sign, "
        "pieces may differ"
    )


def special_tokens(tokenizer: Tokenizer, order: Sequence[int] | None = None) -> dict[str, int]:
    """The names in a text that are tokens, and not text, to what :func:`write_tokenizer` makes of a tokenizer, and not
    to itself: ids.

    fairseq's tokenizers know no special tokens. Those of transformers all do, and whoever writes prompts for them (a
    chat template, what ends a text in finetuning, an evaluation harness) relies on it; to split them would also split
    those that a user adds.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {name: i for i, name in enumerate(SPECIALS)}
    ids = tokenizer.own_to_dictionary[: tokenizer.vocab_size]
    if order is not None or tokenizer.splits_special_tokens or ids == list(range(len(ids))):
        return {}
    return {name: i for i, name in enumerate(SPECIALS) if i not in ids}  # those that it had none for


def _write_settings(folder: Path, names: dict[str, str], split: bool, more: dict[str, Any]) -> None:
    """``tokenizer_config.json``. ``split``: the names of special tokens are ordinary text, as the tokenizer had it."""
    fixed = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": split,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", {**fixed, **names, **more})


def _added(names: Sequence[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name, **flags} for i, name in enumerate(names)]


def _template(names: Sequence[str], bos: int) -> dict[str, Any]:
    """The post-processor that puts a token before a text."""
    first = {"SpecialToken": {"id": names[bos], "type_id": 0}}
    a, b = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    token = {"id": names[bos], "ids": [bos], "tokens": [names[bos]]}
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, first, b],
        "special_tokens": {names[bos]: token},
    }


def _gpt2(tokenizer: GPT2Tokenizer) -> dict[str, Any] | None:
    ids = tokenizer.own_to_dictionary
    vocabulary = {token: ids[i] for i, token in enumerate(tokenizer.tokens)}
    others = {
        symbol: i
        for i, symbol in enumerate(tokenizer.dictionary.symbols)
        if i < len(SPECIALS) or not symbol.isdecimal()
    }
    if vocabulary.keys() & others.keys():
        return None
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": others | vocabulary, "merges": [list(pair) for pair in tokenizer.merges]}
    return {"normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def _unigram(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Pieces with their scores, with spaces for SentencePiece's signs for them: a sign in the text is then a character
    like others.

    What SentencePiece never finds in a text, bytes and specials, gets a score worse than that of any other way to write
    its name, and the names' characters that no piece has are split off beforehand: each would be bytes anyway. None if
    that is not all there is to it.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files["sentencepiece.model"].read_bytes())
    spec, kinds = model.normalizer_spec, sentencepiece_model_pb2.ModelProto.SentencePiece
    normal = [piece.piece.replace("\u2581", " ") for piece in model.pieces if piece.type == kinds.NORMAL]
    letters = {text for text in normal if len(text) == 1}
    ids = tokenizer.own_to_dictionary
    if (
        not tokenizer.lossless or model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.UNIGRAM
        or spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces
        or not spec.escape_whitespaces
        or any(piece.type in (kinds.USER_DEFINED, kinds.UNUSED) for piece in model.pieces)
        or not letters.issuperset("".join(normal)) or len(set(ids)) < len(ids)
    ):  # fmt: skip
        return None
    never = 10 * min(piece.score for piece in model.pieces)
    vocabulary: list[list[Any]] = [[symbol, never] for symbol in tokenizer.dictionary.symbols]
    for i, piece in zip(ids, model.pieces, strict=True):
        if piece.type == kinds.NORMAL:
            vocabulary[i] = [piece.piece.replace("\u2581", " "), piece.score]
    lost = sorted(set("".join(text for text, score in vocabulary if score == never)) - letters)
    pattern = {"Regex": "[" + "".join(f"\\x{{{ord(letter):x}}}" for letter in lost) + "]"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} if lost else None
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    unigram = {"type": "Unigram", "unk_id": UNK, "vocab": vocabulary, "byte_fallback": True}
    return {"normalizer": None, "pre_tokenizer": split, "decoder": decoder, "model": unigram}


def _in_dictionary_order(tokenizer: HuggingFaceTokenizer, bos: int) -> tuple[dict[str, Any], list[str]]:
    """Its tokenizer.json with the dictionary's ids and a token for each special that it had none for, and what the
    specials are called.

    Raises UserError if the dictionary lacks tokens, or the tokenizer's kind has no place for an order.
    """
    path, ids = tokenizer.files["tokenizer.json"], tokenizer.own_to_dictionary
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model, symbols = content["model"], tokenizer.dictionary.symbols
    vocabulary = model.get("vocab")
    if len(set(ids)) < len(ids) or not isinstance(vocabulary, (dict, list)):
        raise UserError(
            f"{path} cannot be given the ids of dict.txt, which does not have a symbol for each of its tokens"
        )
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    own = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    tokens = {ids[i]: token for token, i in {**own, **added}.items()}
    # what no text comes to has a space in its name: what goes to such models is cut or marked at spaces
    tokens |= {i: symbols[i] if i < len(SPECIALS) else f" {symbols[i]}" for i in range(len(symbols)) if i not in tokens}
    names = [tokens[i] for i in range(len(SPECIALS))]
    if isinstance(vocabulary, dict):
        model["vocab"] = {tokens[i]: i for i in range(len(symbols))}
    else:
        scores = dict(vocabulary)
        model["vocab"] = [[tokens[i], scores.get(tokens[i], min(scores.values()))] for i in range(len(symbols))]
        model["unk_id"] = None if model.get("unk_id") is None else ids[model["unk_id"]]
    kept = [{**token, "id": ids[token["id"]]} for token in content["added_tokens"]]
    fresh = [token for token in _added(names) if token["content"] not in added]
    content["added_tokens"] = sorted([*kept, *fresh], key=lambda token: token["id"])
    content["post_processor"] = _template(names, bos)
    return content, names
