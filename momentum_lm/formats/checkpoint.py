"""Checkpoints, and other files of torch.save, read without running code from them, and within bounds that the file's
own size sets.

Both of torch's formats: since 1.6 a ZIP archive without compression, whose ``data.pkl`` describes the tensors and whose
``data/N`` are their numbers; before, pickles one after another, and the numbers behind them. Neither format's parts are
larger together than the file, and here that is checked before anything is made from them, so that reading takes no more
memory than the file has bytes (mapped: next to none), and a little for what lies around the tensors.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from momentum_lm.errors import CheckpointError, TornCheckpoint, UserError, arg
from momentum_lm.files import open_ordinary
from momentum_lm.untrusted import trusted

from .pickles import Malformed, Reader, Refused, Storage

_TRUST = ("If you trust where it comes from, add ", arg(trust=True), " or set FAIRSEQ_TRUST_CHECKPOINT=1")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch's own, before 1.6
# Of a ZIP archive, what is read here: an entry's own header (signature, lengths of its name and of its extra field); an
# entry of the table of contents (signature, flags, method, checksum, both sizes, lengths of name, extra field and
# comment, place); the end (signature, size and place of the table); where the end of a large archive is; and that end.
_LOCAL = struct.Struct("<4s22xHH")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")
_END = struct.Struct("<4s8xII2x")
_LOCATOR = struct.Struct("<4s4xQ4x")
_END64 = struct.Struct("<4s36xQQ")
_DAMAGED = "its archive is cut short or damaged"
_ALIGNMENT = 16  # bytes: mapped numbers that do not start at such a place are copied


def load_checkpoint(path: str | os.PathLike[str], trust: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint without running code from it: tensors, on the CPU, and the few plain types that fairseq's
    trainer saves.

    ``trust=True`` (or FAIRSEQ_TRUST_CHECKPOINT=1) lifts that limit: torch.load reads whatever it is. ``mmap=True`` maps
    tensors instead of reading them, privately: writing into one leaves the file alone. What is read is the file that
    was there at first, also if another one takes its name meanwhile. (A mapped file must not be cut short while its
    tensors are in use: the system then ends the program.)

    Raises CheckpointError for a file that holds anything else, and of that kind TornCheckpoint if it is missing,
    damaged or no checkpoint.
    """
    path = os.fspath(path)
    try:
        descriptor = open_ordinary(path, os.O_RDONLY, follow=True)
    except (OSError, ValueError) as error:  # ValueError: no ordinary file, or a null byte in the name
        raise TornCheckpoint(f"cannot read checkpoint {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        anything = trust or trusted()
        state = _load_anything(path, mmap) if anything else _load_safely(path, descriptor, status.st_size, mmap)
        if os.fstat(descriptor).st_size != status.st_size:
            raise TornCheckpoint(f"{path} was written to while it was read; use a checkpoint that is whole")
    finally:
        os.close(descriptor)
    if not isinstance(state, dict):
        raise TornCheckpoint(f"{path} is not a checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def _torn(path: str, reason: str) -> TornCheckpoint:
    size = f"{os.path.getsize(path):,} bytes" if os.path.exists(path) else "gone"
    return TornCheckpoint(
        f"{path} ({size}) is torn or not a checkpoint: {reason}; "
        "use another one, such as an earlier checkpoint_*.pt beside it"
    )


def _load_anything(path: str, mmap: bool) -> Any:
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap and zipfile.is_zipfile(path))
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} needs Python code that is not here: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError) as error:
        if "allocate" in str(error):
            raise  # too little memory: the file may be fine
        raise _torn(path, f"torch cannot load it ({type(error).__name__})") from error


def _load_safely(path: str, descriptor: int, size: int, mmap: bool) -> Any:
    try:
        start = os.pread(descriptor, 2, 0)
        if start == b"PK":
            return _Zip(descriptor, size, mmap).load()
        if start[:1] == b"\x80":
            return _Legacy(descriptor, size).load()
        raise Malformed("it is empty" if not size else "it is of another format")
    except Refused as refused:
        if refused.unusable:
            raise CheckpointError(f"checkpoint {path} holds {refused.name}, which nothing here can use") from refused
        raise CheckpointError(
            f"checkpoint {path} holds {refused.name}, which is not on the list of types known to be safe: loading it "
            "can run code. ",
            *_TRUST,
        ) from refused
    except Malformed as error:
        raise _torn(path, str(error)) from error
    except (struct.error, UnicodeDecodeError) as error:
        raise _torn(path, _DAMAGED) from error
    except OSError as error:
        raise _torn(path, str(error.strerror or error)) from error
    except (MemoryError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} ({size:,} bytes) does not fit into the memory that is free: {error}"
        ) from error


class _File:
    """Ranges of an open file, which were checked to lie in it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.vectors: dict[str, Tensor] = {}  # by the storage's name, so that tensors which share one share it here

    @property
    def budget(self) -> int:
        """Steps for a pickle: a large file may describe more tensors."""
        return min(4_000_000 + self.size // 256, 40_000_000)

    @property
    def most(self) -> int:
        """Bytes of a pickle."""
        return min((1 << 26) + self.size // 64, 1 << 30)

    def read(self, offset: int, count: int) -> bytes:
        data = os.pread(self.descriptor, count, offset)
        if len(data) != count:
            raise Malformed("it is cut short")
        return data

    def read_vector(self, offset: int, count: int) -> Tensor:
        vector = torch.empty(count, dtype=torch.uint8)
        if count:
            data: Any = vector.numpy()
            view, done = memoryview(data), 0
            while done < count:
                step = os.preadv(self.descriptor, [view[done : done + (1 << 30)]], offset + done)
                if not step:
                    raise Malformed("it is cut short")
                done += step
        return vector


class _Zip(_File):
    """torch's format since 1.6."""

    def __init__(self, descriptor: int, size: int, mmap: bool) -> None:
        super().__init__(descriptor, size)
        self.entries = self._entries()
        first = next(iter(self.entries), "")
        self.folder = first.partition("/")[0]
        self.whole = self._mapped() if mmap and size else None

    def load(self) -> Any:
        order = self._entry("byteorder")
        if order is not None and self.read(order[0], min(order[1], 20)) != sys.byteorder.encode():
            raise Malformed("it was written on a machine of another byte order")
        pickle = self._entry("data.pkl")
        if pickle is None:
            raise Malformed("its archive has no data.pkl")
        offset, count, checksum = pickle
        if count > self.most:
            raise Malformed(f"its data.pkl has {count:,} bytes")
        data = self.read(offset, count)
        if checksum and zlib.crc32(data) != checksum:
            raise Malformed("its data.pkl is damaged (checksum)")
        return Reader(data, self._storage, budget=self.budget).load()

    def _entry(self, name: str) -> tuple[int, int, int] | None:
        return self.entries.get(f"{self.folder}/{name}")

    def _entries(self) -> dict[str, tuple[int, int, int]]:
        """Where each entry's bytes begin, how many they are, and their checksum (0: torch was told to write none)."""
        entries: dict[str, tuple[int, int, int]] = {}
        directory, position, total = self._directory(), 0, 0
        while position < len(directory):
            magic, flags, method, checksum, packed, count, name, extra, comment, start = _ENTRY.unpack_from(
                directory, position
            )
            position += _ENTRY.size
            text = directory[position : position + name].decode("utf-8")
            fields = directory[position + name : position + name + extra]
            position += name + extra + comment
            count, packed, start = _large(fields, count, packed, start)
            if magic != b"PK\1\2" or position > len(directory) or start + _LOCAL.size > self.size:
                raise Malformed(_DAMAGED)
            if method or packed != count or flags & 1:
                raise Malformed("its archive is compressed or encrypted, and torch.save writes it plain")
            local, names, extras = _LOCAL.unpack(self.read(start, _LOCAL.size))
            start += _LOCAL.size + names + extras
            total += count
            if local != b"PK\3\4" or start + count > self.size or total > self.size or text in entries:
                raise Malformed(_DAMAGED)
            entries[text] = (start, count, checksum)
        return entries

    def _directory(self) -> bytes:
        """The archive's table of contents, which its end tells the place of."""
        tail = self.read(max(0, self.size - (1 << 16) - _END.size), min(self.size, (1 << 16) + _END.size))
        end = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
        if end < 0:
            raise Malformed(_DAMAGED)
        _, count, start = _END.unpack_from(tail, end)
        if 0xFFFFFFFF in (count, start):
            end += self.size - len(tail)
            magic, place = _LOCATOR.unpack(self.read(max(0, end - _LOCATOR.size), _LOCATOR.size))
            if magic != b"PK\6\7" or place > end:
                raise Malformed(_DAMAGED)
            magic, count, start = _END64.unpack(self.read(place, _END64.size))
            if magic != b"PK\6\6":
                raise Malformed(_DAMAGED)
        if start + count > self.size or count > self.most // 4:
            raise Malformed(_DAMAGED)
        return self.read(start, count)

    def _storage(self, storage: Storage) -> Tensor:
        if storage.key not in self.vectors:
            found = self._entry(f"data/{storage.key}")
            if found is None or found[1] != storage.nbytes:
                raise Malformed("its archive lacks numbers of its tensors")
            self.vectors[storage.key] = self._vector(*found)
        return self.vectors[storage.key]

    def _vector(self, offset: int, count: int, checksum: int) -> Tensor:
        if self.whole is not None and count and offset % _ALIGNMENT == 0:
            return torch.empty(0, dtype=torch.uint8).set_(self.whole[offset : offset + count])
        vector = self.read_vector(offset, count)
        data: Any = vector.numpy()
        if self.whole is None and checksum and zlib.crc32(data) != checksum:
            raise Malformed("numbers of its tensors are damaged (checksum)")
        return vector

    def _mapped(self) -> torch.UntypedStorage:
        name = f"/proc/self/fd/{self.descriptor}"  # the file that was checked, whatever has its name by now
        name = name if os.path.exists(name) else f"/dev/fd/{self.descriptor}"
        whole: torch.UntypedStorage = torch.UntypedStorage.from_file(name, False, self.size)  # type: ignore[assignment]
        return whole


def _large(fields: bytes, *values: int) -> tuple[int, ...]:
    """Sizes and place of an entry; those that 32 bits do not hold stand in the extra field of type 1, in this order."""
    position = 0
    while position + 4 <= len(fields):
        kind, length = struct.unpack_from("<HH", fields, position)
        if kind == 1:
            large = iter(struct.unpack_from(f"<{length // 8}Q", fields, position + 4))
            return tuple(next(large, value) if value == 0xFFFFFFFF else value for value in values)
        position += 4 + length
    return values


class _Legacy(_File):
    """torch's format before 1.6: a magic number, a version, the system's sizes, the object, the names of its storages,
    their numbers.
    """

    def load(self) -> Any:
        self.data = self.read(0, min(self.size, self.most))
        magic, position = self._pickle(0)
        if magic != _LEGACY_MAGIC:
            raise Malformed("it is a pickle, but not of torch.save")
        version, position = self._pickle(position)
        system, position = self._pickle(position)
        if (
            version != 1001
            or not isinstance(system, dict)
            or system.get("little_endian") is not (sys.byteorder == "little")
        ):
            raise Malformed("it is of another version, or was written on a machine of another byte order")
        # Once to learn where it ends and what is behind it, and once with the numbers.
        first = Reader(self.data, None, position, self.budget)
        first.load()
        names, numbers = self._pickle(first.end)
        self.places = self._places(names, first.storages, numbers)
        return Reader(self.data, self._storage, position, self.budget).load()

    def _pickle(self, position: int) -> tuple[Any, int]:
        reader = Reader(self.data, None, position, self.budget)
        return reader.load(), reader.end

    def _places(self, names: Any, storages: dict[str, Storage], position: int) -> dict[str, int]:
        places: dict[str, int] = {}
        if not isinstance(names, list) or not all(isinstance(name, str) and name in storages for name in names):
            raise Malformed("its tensors have odd names")
        for name in names:
            count = storages[name].count
            whole = position + 8 + storages[name].nbytes <= self.size
            if not whole or struct.unpack("<q", self.read(position, 8)) != (count,):
                raise Malformed("it is cut short or damaged")
            places[name] = position + 8
            position += 8 + storages[name].nbytes
        return places

    def _storage(self, storage: Storage) -> Tensor:
        if storage.key not in self.vectors:
            if storage.key not in self.places:
                raise Malformed("it lacks numbers of its tensors")
            self.vectors[storage.key] = self.read_vector(self.places[storage.key], storage.nbytes)
        return self.vectors[storage.key]


@contextlib.contextmanager
def read_by_fairseq(path: Any) -> Iterator[None]:
    """What fairseq's own reading of a checkpoint raises within it becomes a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError, RecursionError) as error:
        # It lacks an entry that fairseq's upgrade of old forms needs, or has options that are none.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"checkpoint {path} is not one that fairseq can read: {type(error).__name__}: {reason}"
        ) from error
