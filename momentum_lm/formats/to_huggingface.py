"""A fairseq checkpoint -> a folder of a Hugging Face model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from momentum_lm.errors import UserError, arg
from momentum_lm.files import file_sha256, write_json
from momentum_lm.model import DecoderConfig
from momentum_lm.model.config import BUILT_IN_FILTERS
from momentum_lm.model.filters import filter_class, is_of_filter, own_source
from momentum_lm.text.dictionary import EOS, PAD, SPECIALS, Dictionary
from momentum_lm.text.tokenizer import HuggingFaceTokenizer, Tokenizer, has_tokenizer

from .families import FAMILIES, MOMENTUM, Family
from .lazy import Lazy, write_safetensors
from .native import NativeCheckpoint
from .tokenizers import special_tokens, write_tokenizer

PART = 5_000_000_000  # bytes, as transformers cuts
_OWN_KINDS = "OWN_KINDS: dict[str, Any] = {}\n"  # a line of the code that travels with a model
_REMOTE = Path(__file__).parent / "remote"
_MODULES = {
    "AutoConfig": "configuration_momentum_lm.MomentumLMConfig",
    "AutoModel": "modeling_momentum_lm.MomentumLMModel",
    "AutoModelForCausalLM": "modeling_momentum_lm.MomentumLMForCausalLM",
}


def write_model(
    lm: NativeCheckpoint, folder: Path, dtype: torch.dtype | None, progress: Callable[[int], object]
) -> tuple[str, int, list[str]]:
    """Writes the weights, ``config.json``, ``generation_config.json`` and the tokenizer into a folder. ``dtype`` None:
    as they are.

    Returns the class of transformers that loads it, its number of parameters, and what a user should know.
    """
    tokenizer, dictionary = _vocabulary(lm)
    bos, decoder = lm.bos[0], lm.config
    family, order = choose(decoder, dictionary, tokenizer, bos)
    ours = {name: Lazy.of(tensor) for name, tensor in lm.model.state_dict().items()}
    tensors = family.to_theirs(ours, decoder, order)
    tensors = {
        name: lazy.weight(f"{lm.name}: {name}", None if is_of_filter(name) else dtype) for name, lazy in tensors.items()
    }
    names = _write_parts(tensors, folder, progress)
    where = (
        {our: i for i, our in enumerate(order.tolist())}
        if order is not None
        else {i: i for i in range(decoder.vocab_size)}
    )
    ids = {"bos_token_id": where[bos], "eos_token_id": where[EOS], "pad_token_id": where.get(PAD)}
    stored = tensors[family.theirs("embed_tokens.weight")].dtype
    config = {**ids, **family.config(decoder, len(where)), "dtype": str(stored).removeprefix("torch.")}
    if family is MOMENTUM:
        config["auto_map"] = _MODULES
        _write_code(decoder, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
    notes = [f"{len(names)} files of weights"] if len(names) > 1 else []
    if family is MOMENTUM and own_source(decoder) is not None:
        notes.append("own_filters.py goes with it, a copy of your filter's file: to load the model takes momentum_lm")
    if tokenizer is not None:
        note = write_tokenizer(tokenizer, folder, decoder.max_positions, bos, None if order is None else order.tolist())
        notes += [note] if note else []
    else:
        notes.append(
            "there is no tokenizer beside the checkpoint, so none was written; name its folder as the tokenizer"
        )
    return family.architecture, sum(lazy.numel for lazy in tensors.values()), notes


def _write_code(decoder: DecoderConfig, folder: Path) -> None:
    """Writes the code that travels with a model of ours, and with it the file of a filter of somebody's own."""
    for module in sorted({name.partition(".")[0] for name in _MODULES.values()}):
        shutil.copyfile(_REMOTE / f"{module}.py", folder / f"{module}.py")
    source = own_source(decoder)
    if source is not None:
        shutil.copyfile(source, folder / "own_filters.py")
        # transformers keeps one model class for each configuration's code, and another filter is another class
        with open(folder / "configuration_momentum_lm.py", "a", encoding="utf-8") as configuration:
            configuration.write(f"# of the model with own_filters.py {file_sha256(source)}\n")
        modelling, kind = folder / "modeling_momentum_lm.py", filter_class(decoder).__name__
        own = f'from .own_filters import {kind}\n\nOWN_KINDS: dict[str, Any] = {{"{decoder.momentum_kind}": {kind}}}\n'
        modelling.write_text(modelling.read_text("utf-8").replace(_OWN_KINDS, own), "utf-8")


def _check_own_kind(decoder: DecoderConfig) -> None:
    """Raises UserError for a filter of somebody's own whose code cannot go with a model."""
    if decoder.momentum_kind in BUILT_IN_FILTERS:
        return
    source, what = own_source(decoder), ("a model with ", arg(momentum_kind=decoder.momentum_kind))
    if source is None or "." in filter_class(decoder).__qualname__:
        problem = " cannot be written for transformers: its class must stand in a file, not within another definition"
        raise UserError(*what, problem)
    if not filter_class(decoder).additive:
        raise UserError(*what, " cannot be written for transformers: it changes what it is added to")
    package = re.escape(filter_class(decoder).__module__.partition(".")[0])
    if re.search(rf"^\s*(from|import)\s+(\.|{package}\b)", Path(source).read_text("utf-8"), re.MULTILINE):
        raise UserError(*what, f" cannot be written for transformers: {source} imports files beside it, and goes alone")


def names_of_tokens(lm: NativeCheckpoint) -> dict[str, int]:
    """The names in a text that are special tokens to transformers with what :func:`write_model` writes, and text to
    ``lm``: their ids."""
    order = choose(lm.config, lm.tokenizer.dictionary, lm.tokenizer, lm.bos[0])[1]
    return special_tokens(lm.tokenizer, None if order is None else order.tolist())


def choose(
    decoder: DecoderConfig, dictionary: Dictionary | None, tokenizer: Tokenizer | None, bos: int
) -> tuple[Family, torch.Tensor | None]:
    """The family that computes what the decoder does, and its vocabulary, (V,): the id here of each id there (None: the
    same). Raises UserError where none does."""
    order = None
    if dictionary is not None and (tokenizer is None or isinstance(tokenizer, HuggingFaceTokenizer)):
        order = _own_order(decoder, dictionary, tokenizer)
    own = order is not None and bos in order.tolist() and order.tolist() != list(range(decoder.vocab_size))
    if own or not decoder.absent_tokens:
        # those whose published models have such ids first; one trained here may have all rows of a position table
        for family in sorted(FAMILIES, key=lambda family: family.fairseq_ids == own):
            if family is not MOMENTUM and (own or family.position_rows) and family.represents(decoder):
                return family, order if own else None
    _check_own_kind(decoder)
    return MOMENTUM, None


def _own_order(
    decoder: DecoderConfig, dictionary: Dictionary, tokenizer: HuggingFaceTokenizer | None
) -> torch.Tensor | None:
    """The ids of the model's own tokenizer, which dict.txt gives in decimal, if they are all that the model predicts;
    else None."""
    present = [i for i in range(decoder.vocab_size) if i not in decoder.absent_tokens]
    own = {int(symbol): i for i, symbol in enumerate(dictionary.symbols) if symbol.isdecimal()}
    specials = [i for i in present if i < len(SPECIALS)]
    left = sorted(set(range(len(present))) - own.keys())
    if len(specials) == len(left) == 1:
        own[left[0]] = specials[0]
    elif tokenizer is not None:
        own |= {tokenizer.symbols.index(SPECIALS[i]): i for i in specials if SPECIALS[i] in tokenizer.symbols}
    if sorted(own) != list(range(len(present))) or sorted(own.values()) != present:
        return None
    return torch.tensor([own[i] for i in range(len(present))])


def _vocabulary(lm: NativeCheckpoint) -> tuple[Tokenizer | None, Dictionary | None]:
    folder = lm.tokenizer_path if lm.tokenizer_path.is_dir() else lm.tokenizer_path.parent
    if has_tokenizer(folder):
        return lm.tokenizer, lm.tokenizer.dictionary
    file = folder / "dict.txt"
    dictionary = Dictionary.load(file) if file.exists() else None
    if dictionary is not None and len(dictionary) != lm.vocab_size:
        raise UserError(
            f"{file} has {len(dictionary)} entries, but {lm.name} has {lm.vocab_size}: they belong to different models"
        )
    return None, dictionary


def _write_parts(tensors: Mapping[str, Lazy], folder: Path, progress: Callable[[int], object]) -> list[str]:
    """``model.safetensors``, or of a large model its parts and their index. Returns the files' names."""
    parts: list[dict[str, Lazy]] = [{}]
    for name, lazy in tensors.items():
        if parts[-1] and sum(other.nbytes for other in parts[-1].values()) + lazy.nbytes > PART:
            parts.append({})
        parts[-1][name] = lazy
    if len(parts) == 1:
        write_safetensors(folder / "model.safetensors", tensors, progress)
        return ["model.safetensors"]
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_safetensors(folder / name, part, progress)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    total = sum(lazy.nbytes for lazy in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return names
