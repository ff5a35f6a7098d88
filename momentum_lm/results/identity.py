"""Digests of what results depend on: model, data, settings. Records with equal digests may share a folder or be
paired."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any

from momentum_lm import __version__
from momentum_lm.icl.datasets.loading import Example, LabelledDataset
from momentum_lm.lm.protocol import LanguageModel

# Raise it with every change of the code that changes numbers. Records of another revision are other results; the
# versions of this package
# and of those below it are recorded for the reader and not compared, so that an upgrade that changes nothing goes on
# with what is there.
REVISION = 1
# Entries of a record, at any depth, that no number depends on. The last is in all configurations of transformers, and
# tells which one is installed.
FOR_THE_READER = ("path", "command", "versions", "transformers_version")
_PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "numpy")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def compared(value: Any) -> Any:
    """A JSON value without what is only there for the reader."""
    if isinstance(value, Mapping):
        return {name: compared(part) for name, part in value.items() if name not in FOR_THE_READER}
    return [compared(part) for part in value] if isinstance(value, list) else value


def versions() -> dict[str, str]:
    """Of this package and of those that compute its numbers."""
    found = {"momentum_lm": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def examples_sha256(examples: Iterable[Example]) -> str:
    """Digest of examples as texts: row, inputs, choices and the right one. It does not depend on a tokenizer."""
    found = hashlib.sha256()
    for example in examples:
        # ascii: what repr escapes depends on the characters that this Python knows
        found.update(ascii((example.index, example.inputs, example.continuations, example.gold)).encode())
    return found.hexdigest()


def dataset_sha256(data: LabelledDataset) -> str:
    """Digest of a data set as it was read: its examples and its YAML file, without its path and description."""
    names = [field.name for field in dataclasses.fields(data.spec)]
    about = {
        name: getattr(data.spec, name)
        for name in names
        if name not in ("path", "description", "licence", "hub", "files")
    }
    text = json.dumps(about, sort_keys=True, default=dataclasses.asdict)
    return digest([text, examples_sha256(data.train), examples_sha256(data.evaluation)])


def of_model(lm: LanguageModel) -> dict[str, Any]:
    """What is compared of a model: its weights, architecture, tokenizer, dtype and kind of device. Raises UserError
    where its files are no longer those that were read."""
    described = compared(lm.describe())
    lm.check_unchanged()
    return {**described, "tokenizer": lm.tokenizer_sha256, "dtype": dtype(lm), "device": lm.device.type}


def dtype(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")
