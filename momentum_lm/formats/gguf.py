"""GGUF files, llama.cpp's form of a model: what they say as a config.json would, and their tensors, which are read when
they are needed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import importlib
import math
import mmap
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.model import DecoderConfig
from momentum_lm.model.config import RotaryScaling
from momentum_lm.model.positions import Rotary

from .families import INSTEAD, Family
from .lazy import Lazy
from .pickles import shown

_reading = threading.RLock()
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # general.architecture, and so model_type; Mistral's is llama too
_ENTRIES = {  # of config.json, by what follows the architecture in the name there
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_NAMES = {  # of our tensors
    r"token_embd\.": "embed_tokens.",
    r"output_norm\.": "layer_norm.",
    r"output\.": "output_projection.",
    r"blk\.(\d+)\.attn_norm\.": r"layers.\1.self_attn_layer_norm.",
    r"blk\.(\d+)\.attn_([qkv])\.": r"layers.\1.self_attn.\2_proj.",
    r"blk\.(\d+)\.attn_output\.": r"layers.\1.self_attn.out_proj.",
    r"blk\.(\d+)\.attn_([qk])_norm\.": r"layers.\1.self_attn.\2_norm.",
    r"blk\.(\d+)\.ffn_norm\.": r"layers.\1.final_layer_norm.",
    r"blk\.(\d+)\.ffn_gate\.": r"layers.\1.fc_gate.",
    r"blk\.(\d+)\.ffn_up\.": r"layers.\1.fc1.",
    r"blk\.(\d+)\.ffn_down\.": r"layers.\1.fc2.",
}
_FACTORS = "rope_freqs.weight"  # by which rotary frequencies are divided
_INSTEAD = f"{INSTEAD} and --hf-gguf-file"
_LLAMA3 = (1.0, 4.0, 8192)  # of all published models whose positions are scaled so; the file has the factors alone
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}  # fmt: skip


@dataclass(frozen=True)
class GGUF:
    """A GGUF file of which the header was read. fields: its entries by name, of arrays their length in words. tensors:
    under the names there. quantised: what types of numbers were, whose tensors are fp32 here.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Lazy]
    quantised: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        """What a config.json would say. Raises UserError, naming the entry, for what the decoder does not compute."""
        kind = self.fields.get("general.architecture")
        if kind not in ARCHITECTURES:
            known = f"none of {', '.join(ARCHITECTURES)}"
            raise UserError(f"general.architecture is {shown(repr(kind))}, {known}{_INSTEAD}")
        own = {name.removeprefix(f"{kind}."): value for name, value in self.fields.items()}
        result = {theirs: own[name] for name, theirs in _ENTRIES.items() if name in own}
        width, heads = result.get("hidden_size"), result.get("num_attention_heads")
        if "head_dim" not in result and isinstance(width, int) and isinstance(heads, int) and heads > 0:
            result["head_dim"] = width // heads
        whole = {name: (result.get("head_dim"),) for name in ("rope.dimension_count", "attention.value_length")}
        needed = {**whole, "expert_count": (0,), "rope.scaling.type": ("none",), "attention.sliding_window": (0,)}
        for name, values in needed.items():
            if name in own and own[name] not in values:
                problem = f"the decoder computes something else where it is not {values[0]}"
                raise UserError(f"{kind}.{name} is {shown(repr(own[name]))}: {problem}{_INSTEAD}")
        if "token_embd.weight" in self.tensors:
            result["vocab_size"] = self.tensors["token_embd.weight"].shape[0]
        for name in ("bos_token_id", "eos_token_id"):
            result[name] = self.fields.get(f"tokenizer.ggml.{name}")
        tied = "output.weight" not in self.tensors
        return {**result, **self._scaling(result), "model_type": kind, "tie_word_embeddings": tied}

    def weights(self, family: Family, decoder: DecoderConfig) -> dict[str, Lazy]:
        """The tensors under the names and in the form of transformers; what it does not have keeps its name."""
        result = {}
        for name, lazy in self.tensors.items():
            ours = next((re.sub(there, here, name) for there, here in _NAMES.items() if re.match(there, name)), None)
            if match := re.search(r"\.attn_([qk])\.", name) if family.model_type == "llama" else None:
                heads = decoder.heads if match[1] == "q" else decoder.kv_heads
                if lazy.shape and lazy.shape[0] == heads * decoder.head_dim:
                    lazy = lazy.map(lazy.shape, functools.partial(_unpaired, heads=heads))
            if name != _FACTORS:
                result[name if ours is None else family.theirs(ours)] = lazy
        return result

    def _scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """``rope_scaling`` of which the factors in the file are. Raises UserError where they are others."""
        if _FACTORS not in self.tensors:
            return {}
        low, high, original = _LLAMA3
        factors = self.tensors[_FACTORS].load().double()
        dim, base = config.get("head_dim"), config.get("rope_theta")
        if isinstance(dim, int) and dim == 2 * factors.numel() and isinstance(base, float) and base > 1:
            scaling = RotaryScaling(factors.max().item(), low, high, original)
            found = Rotary(dim, base).frequency / Rotary(dim, base, scaling).frequency
            if torch.allclose(found.double(), factors, rtol=1e-4):
                return {"rope_scaling": scaling.rope_scaling()}
        problem = "scales rotary positions in another way than Llama 3's models"
        raise UserError(f"{_FACTORS} {problem}{_INSTEAD}")


def _quick(reader: type[Any]) -> type[Any]:
    """gguf's reader on a plain array: a slice of a memory map, of which it takes a million, costs three times as
    much."""

    class Quick(reader):
        @property
        def data(self) -> NDArray[np.uint8]:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return Quick


@contextmanager
def header_read_once(gguf_file: str | None) -> Iterator[None]:
    """Within it transformers reads the header of a GGUF file once, not for configuration, tokenizer and weights anew,
    and makes gguf's table of names once, not for each module: more than half of the time in which a small model loads.
    Without a file nothing is done."""
    try:
        gguf: Any = importlib.import_module("gguf") if gguf_file else None
    except ImportError:  # transformers says what is missing
        gguf = None
    with _reading:  # of other threads none may take what stands here meanwhile for gguf's own
        faster: dict[str, Callable[[Any], Any]] = {
            "GGUFReader": _quick,
            "get_tensor_name_map": lambda function: function,
        }
        plain = {name: getattr(gguf, name) for name in faster if hasattr(gguf, name)}
        for name, function in plain.items():  # transformers imports both from there at each call
            setattr(gguf, name, functools.cache(faster[name](function)))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(gguf, name, function)


def read_gguf(path: Path) -> GGUF:
    """Reads the header. Raises UserError for a file that is torn or none, and for numbers that nothing dequantises."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("a GGUF file needs the package gguf: pip install 'momentum_lm[transformers]'") from error
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, found, start = _header(data)
        tensors = {}
        for name, (shape, number, offset) in found.items():
            kind = gguf.GGMLQuantizationType(number)
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f"{shown(name)} is {shape}, in blocks of {block}")
            length = math.prod(shape) // block * nbytes
            if start + offset + length > size:
                raise ValueError(f"{shown(name)} ends after the file")
            tensors[name] = _tensor(path, kind, shape, start + offset, length)
    except (ValueError, KeyError, TypeError, OverflowError, struct.error) as error:
        problem = f"{path} ({size:,} bytes) is torn or not a GGUF file: {error}; fetch it again"
        raise UserError(problem) from error
    kinds = {gguf.GGMLQuantizationType(number) for _, number, _ in found.values()}
    quantised = sorted(kind for kind in kinds if kind.name not in _PLAIN)
    for kind in quantised:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(f"{path} has numbers of type {kind.name}, which gguf does not dequantise") from error
    return GGUF(path, fields, tensors, tuple(kind.name for kind in quantised))


def _tensor(path: Path, kind: Any, shape: tuple[int, ...], start: int, length: int) -> Lazy:
    """The tensor of this ``gguf.GGMLQuantizationType`` that lies there."""
    dtype = _PLAIN.get(kind.name)

    def load() -> Tensor:
        import gguf

        data = np.fromfile(path, np.uint8, count=length, offset=start)
        if dtype is not None:
            return torch.from_numpy(data).view(dtype).view(shape)
        return torch.from_numpy(gguf.dequantize(data.reshape(*shape[:-1], -1), kind)).view(shape)

    return Lazy(shape, dtype or torch.float32, load)


def _unpaired(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) of a projection whose rotary positions turn neighbours, as llama.cpp has them -> those that
    turn dimension i with i + D / 2, as transformers and the decoder have them.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class _Reader:
    """Reads values one after the other. Raises struct.error or ValueError where there are none."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return float(str(np.float32(value))) if form == "f" else value  # 1e-05, not 9.999999747378752e-06

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it ends within a text")
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value; of an array, such as a vocabulary, in words how many there are."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_FORMATS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            for _ in range(count):
                length = self.number("Q")
                self.at += length
        else:
            self.at += struct.calcsize(_FORMATS[inner]) * count
        return f"{count} values"


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """The entries; of each tensor its shape, the number of its type and its place; and where the tensors begin."""
    reader = _Reader(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    reader.at = 4
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3")
    tensors, entries = reader.number("Q"), reader.number("Q")
    fields, found = {}, {}
    for _ in range(entries):
        name = reader.text()
        fields[name] = reader.value(reader.number("I"))
    for _ in range(tensors):
        name = reader.text()
        dims = [reader.number("Q") for _ in range(min(reader.number("I"), 8))]
        found[name] = (tuple(reversed(dims)), reader.number("I"), reader.number("Q"))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    return fields, found, reader.at + -reader.at % alignment
