"""Tensors that are read when they are needed, and the two files that hold them: torch's checkpoint and safetensors.

torch and safetensors write what lies in memory. A conversion changes every tensor of a model that may be larger than
memory, so here each one is read, changed, written and forgotten.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from momentum_lm.errors import UserError, arg
from momentum_lm.model.precision import DTYPES

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of weights
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGES = {torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
             torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage}  # fmt: skip
_FLAGS = {dtype: name for name, dtype in DTYPES.items()}
_ROOM = {  # what holds more
    torch.float16: ("use ", arg(dtype="bf16"), " or fp32"),
    torch.bfloat16: ("use ", arg(dtype="fp32"), ", or leave out ", arg("dtype")),
    torch.float32: ("leave out ", arg("dtype")),
}
_ALIGNMENT = 64  # of tensors in torch's file, as torch itself aligns them


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor of known shape and dtype, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor of any shape that is there already, if only as pages of a file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def map(self, shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> Lazy:
        """``change`` of it, which has this shape."""
        return replace(self, shape=tuple(shape), load=lambda: change(self.load()))

    def to(self, dtype: torch.dtype | None) -> Lazy:
        """In this dtype, if it is one for floating-point numbers; None: as it is."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, load=lambda: self.load().to(dtype))

    def weight(self, name: str, dtype: torch.dtype | None) -> Lazy:
        """As :meth:`to`, of numbers that must be there afterwards: reading it raises UserError, which calls it
        ``name``, if it holds NaN or infinity, or what ``dtype`` would make infinite. What ``dtype`` makes 0 is close to
        it."""
        result = replace(self, dtype=dtype) if dtype is not None and self.dtype.is_floating_point else self

        def load() -> Tensor:
            tensor = self.load()
            if tensor.is_floating_point() and tensor.numel():
                extremes = torch.stack(tensor.aminmax())  # which are NaN if any is
                if not extremes.isfinite().all():
                    held = "NaN" if extremes.isnan().any() else "infinity"
                    raise UserError(
                        f"{name} holds {held}: the model is broken; convert an earlier checkpoint or another copy"
                    )
                if not extremes.to(result.dtype).isfinite().all():
                    largest, limit = extremes.abs().max(), torch.finfo(result.dtype).max
                    what = f"{name} reaches {largest:.6g}, and {_FLAGS[result.dtype]} ends at {limit:.6g}"
                    raise UserError(f"{what}: ", *_ROOM[result.dtype])
            return tensor.to(result.dtype)

        return replace(result, load=load)

    def transposed(self) -> Lazy:
        """(A, B) -> (B, A)."""
        return self.map(self.shape[::-1], Tensor.t)

    def chunks(self, count: int, runs: int = 1) -> list[Lazy]:
        """``count`` equal parts along the first dimension; of ``runs`` equal runs of rows, each in such parts, the
        first part of all of them, and so on.
        """
        shape = (self.shape[0] // count, *self.shape[1:])

        def part(tensor: Tensor, i: int) -> Tensor:
            return tensor.unflatten(0, (runs, count, -1))[:, i].flatten(0, 1)

        return [self.map(shape, lambda tensor, i=i: part(tensor, i)) for i in range(count)]  # type: ignore[misc]

    def rows(self, index: Tensor) -> Lazy:
        """Row ``index[i]`` at i, zeros where that is negative: index (N,), this (V, ...) -> (N, ...)."""

        def gather(tensor: Tensor) -> Tensor:
            result = tensor[index.clamp(min=0)]
            result[index < 0] = 0
            return result

        return self.map((len(index), *self.shape[1:]), gather)


def concatenated(parts: Sequence[Lazy], runs: int = 1) -> Lazy:
    """Parts of one dtype, along the first dimension; with ``runs``, the reverse of :meth:`Lazy.chunks`."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def load() -> Tensor:
        return torch.cat([part.load().unflatten(0, (runs, -1)) for part in parts], 1).flatten(0, 1)

    return Lazy(shape, parts[0].dtype, load)


def write_torch(path: Path, tree: Mapping[str, Any], progress: Callable[[int], object] = lambda nbytes: None) -> None:
    """Writes what ``torch.save`` would, each :class:`Lazy` in ``tree`` as a tensor; one that stands in two places is
    stored once.

    ``progress`` is told of the bytes as they are written.
    """
    pickled = BytesIO()
    pickler = _Pickler(pickled, protocol=2)
    pickler.dump(tree)
    records = {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in records.items():
                archive.writestr(f"archive/{name}", content)
            for number, lazy in enumerate(pickler.stored):
                entry = zipfile.ZipInfo(f"archive/data/{number}")
                # The header is 30 bytes, the name and what is extra: 20 bytes for a size of 64 bits, and this padding.
                entry.extra = struct.pack(
                    "<2sH", b"FB", padding := -(file.tell() + 54 + len(entry.filename)) % _ALIGNMENT
                ) + bytes(padding)
                with archive.open(entry, "w", force_zip64=True) as record:
                    _write(record, lazy, progress)
        _sync(file)


def write_safetensors(
    path: Path, tensors: Mapping[str, Lazy], progress: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Writes a ``.safetensors`` file. ``progress`` is told of the bytes as they are written."""
    ends = list(itertools.accumulate((lazy.nbytes for lazy in tensors.values()), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, lazy), offsets in zip(tensors.items(), itertools.pairwise(ends), strict=True):
        header[name] = {"dtype": _NAMES[lazy.dtype], "shape": list(lazy.shape), "data_offsets": list(offsets)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for lazy in tensors.values():
            _write(file, lazy, progress)
        _sync(file)


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a ``.safetensors`` file. Raises UserError for one that is torn or none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            "a .safetensors file needs the package safetensors: pip install 'momentum_lm[transformers]'"
        ) from error

    def load(name: str) -> Callable[[], Tensor]:
        def open_and_read() -> Tensor:  # opened for each tensor, so that the pages of one are given back with it
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return open_and_read

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it has no __iter__)
            dtypes = {name: SAFETENSORS_DTYPES.get(part.get_dtype()) for name, part in slices.items()}
            strange = next((name for name, dtype in dtypes.items() if dtype is None), None)
            if strange is not None:
                raise UserError(
                    f"{path}: {strange} has numbers of type {slices[strange].get_dtype()}, which torch checkpoints do "
                    "not hold"
                )
            return {name: Lazy(tuple(part.get_shape()), dtypes[name], load(name)) for name, part in slices.items()}  # type: ignore[arg-type]
    except SafetensorError as error:
        raise UserError(
            f"{path} ({os.path.getsize(path):,} bytes) is torn or not a safetensors file: {error}; fetch it again"
        ) from error


class _Storage:
    def __init__(self, lazy: Lazy) -> None:
        self.lazy = lazy


class _Pickler(pickle.Pickler):
    """Pickles as torch does: of a tensor its shape, and a number under which its values are stored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stored: list[Lazy] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Lazy):
            return NotImplemented
        strides = torch.empty(value.shape, device="meta").stride()
        # a public name there is none; that of the format, which cannot change without losing all checkpoints there are
        return torch._utils._rebuild_tensor_v2, (_Storage(value), 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        self.stored.append(value.lazy)
        return "storage", _STORAGES[value.lazy.dtype], str(len(self.stored) - 1), "cpu", value.lazy.numel


def _write(file: IO[bytes], lazy: Lazy, progress: Callable[[int], object]) -> None:
    tensor = lazy.load().contiguous()
    if tensor.shape != torch.Size(lazy.shape) or tensor.dtype != lazy.dtype:
        raise ValueError(f"{lazy} gave {tuple(tensor.shape)} {tensor.dtype}")
    for block in _blocks(tensor.reshape(-1).view(torch.uint8)):
        progress(file.write(block.numpy().data))


def _blocks(flat: Tensor, size: int = 1 << 24) -> Iterator[Tensor]:
    return iter(flat.split(size)) if len(flat) else iter(())


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
