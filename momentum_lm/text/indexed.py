"""fairseq's memory-mapped token files (``PREFIX.bin`` and ``PREFIX.idx``), read and written without fairseq.

``PREFIX.bin`` holds the items' token ids one after another, little-endian. ``PREFIX.idx`` holds, in this order: the
magic ``MMIDIDX\\0\\0``, the version (uint64, 1), the code of the ids' type (uint8), the number of items (uint64), the
items' sizes in tokens (int32 each) and their offsets in ``.bin`` in bytes (int64 each). In this project an item is a
document that ends with ``</s>``.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQ")  # magic, version, type code, number of items
_TYPES = {
    1: "u1",
    2: "i1",
    3: "<i2",
    4: "<i4",
    5: "<i8",
    8: "<u2",
    9: "<u4",
    10: "<u8",
}  # 6 and 7 are floats: no token ids
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_BLOCK = 1 << 18  # items per step where the whole index would not do in memory


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type for ids below ``vocab_size``, by fairseq's own limits: uint16 below 65,500, then uint32, then
    int64.
    """
    return np.dtype("<u2" if vocab_size < 65500 else "<u4" if vocab_size < 4294967295 else "<i8")


class IndexedDatasetWriter:
    """Streams items into ``PREFIX.bin`` and ``PREFIX.idx``, which appear only in ``finish()``, whole; until then, and
    if the program dies, there are only ``PREFIX.bin.partial`` and ``PREFIX.sizes.partial``. Memory does not grow with
    the items.

        with IndexedDatasetWriter("data/train", vocab_size) as writer:   # finishes, or removes everything on an
            exception writer.add(ids)

    To go on after a crash, keep what ``checkpoint()`` returned and pass it as ``resume``: whatever was written later is
    cut off. Raises UserError where ``resume`` does not fit the partial files, OSError as ``open`` and ``write`` do.
    """

    def __init__(
        self, path_prefix: str | os.PathLike[str], vocab_size: int, resume: tuple[int, int] | None = None
    ) -> None:
        self.prefix = os.fspath(path_prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.items, self.tokens = resume or (0, 0)
        self._partial = (f"{self.prefix}.bin.partial", f"{self.prefix}.sizes.partial")
        mode = "r+b" if resume else "wb"
        if resume and Path(self._partial[1]).exists() and not Path(self._partial[0]).exists():
            os.replace(
                f"{self.prefix}.bin", self._partial[0]
            )  # it died inside finish(), which renames .bin before it removes the sizes
        try:
            self._bin, self._sizes = (open(path, mode) for path in self._partial)  # noqa: SIM115 - closed in finish/discard
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is gone: this run cannot go on where it stopped; start it afresh"
            ) from error
        lengths = (self.tokens * self.dtype.itemsize, self.items * 4)
        for file, length in zip((self._bin, self._sizes), lengths, strict=True):
            if file.seek(0, os.SEEK_END) < length:
                raise UserError(
                    f"{file.name} is shorter than when it was last saved; delete it and start the run afresh"
                )
            file.truncate(length)
            file.seek(length)

    def add(self, ids: ArrayLike) -> None:
        """Appends one item, token ids of shape (T,). Raises ValueError if an id is not in [0, vocab_size)."""
        array = np.asarray(ids).reshape(-1)
        self.add_many(array, [array.size])

    def add_many(self, ids: ArrayLike, sizes: ArrayLike) -> None:
        """Appends ``len(sizes)`` items whose ids are concatenated in ``ids`` (N,); ``sizes`` (items,) sum to N.

        Raises ValueError where they do not, and for ids that are not within the vocabulary.
        """
        array, lengths = np.asarray(ids), np.asarray(sizes, dtype="<i4")
        if lengths.sum(dtype=np.int64) != array.size:
            raise ValueError(f"sizes sum to {lengths.sum(dtype=np.int64)}, but there are {array.size} ids")
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(
                f"token ids from {array.min()} to {array.max()} do not fit a vocabulary of {self.vocab_size}"
            )
        self._bin.write(array.astype(self.dtype, copy=False).tobytes())
        self._sizes.write(lengths.tobytes())
        self.items += lengths.size
        self.tokens += array.size

    def checkpoint(self) -> tuple[int, int]:
        """Puts everything added so far on disk. Returns (items, tokens) for a later ``resume``."""
        for file in (self._bin, self._sizes):
            file.flush()
            os.fsync(file.fileno())
        return self.items, self.tokens

    def finish(self) -> None:
        """Writes the index and gives both files their names; a pair of that name that was there is replaced."""
        self.checkpoint()
        index = f"{self.prefix}.idx"
        with atomic_write(f"{index}.partial", "wb") as file:  # whole before the old pair goes
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.items))
            self._sizes.close()
            for sizes in self._stored_sizes():
                file.write(sizes.tobytes())
            offset = 0
            for sizes in self._stored_sizes():
                ends = offset + np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
                file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
        self._bin.close()
        Path(index).unlink(missing_ok=True)  # never an index of one dataset beside the tokens of another
        os.replace(self._partial[0], f"{self.prefix}.bin")
        os.replace(f"{index}.partial", index)
        os.unlink(self._partial[1])

    def discard(self) -> None:
        """Closes and removes the partial files."""
        for file in (self._bin, self._sizes):
            file.close()
            Path(file.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the partial files and leaves them, to be resumed."""
        self._bin.close()
        self._sizes.close()

    def _stored_sizes(self) -> Iterator[NDArray[np.int32]]:
        with open(self._partial[1], "rb") as file:
            while block := file.read(4 * _BLOCK):
                yield np.frombuffer(block, dtype="<i4")

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def check_files(path_prefix: str | os.PathLike[str]) -> None:
    """What can be told of the two files in constant time, from the index's header and end and from their lengths.

    Raises UserError naming the file where one is missing, cut short or not of this format.
    """
    prefix = os.fspath(path_prefix)
    _, _, end = _header(prefix)
    _check_length(prefix, os.path.getsize(f"{prefix}.bin"), end)


def _header(prefix: str) -> tuple[np.dtype, int, int]:
    """The ids' type, the number of items, and the bytes of ``.bin`` that they fill by what the index says of the last
    one.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise UserError(
                f"{path} is missing; make it with `momentum-lm prepare` or `fairseq-preprocess --dataset-impl mmap`"
            )
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(
                f"{index} is not an index of fairseq's mmap format; make it anew with `--dataset-impl mmap`"
            )
        _, version, code, items = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            raise UserError(
                f"{index} has version {version} and type code {code}, which this program does not know; make it anew"
            )
        dtype = np.dtype(_TYPES[code])
        if index.stat().st_size != _HEADER.size + 12 * items:
            raise UserError(
                f"{index} says {items} items and should have {_HEADER.size + 12 * items} bytes, but has "
                f"{index.stat().st_size}: "
                "it is cut short or damaged; copy or make it anew"
            )
        if not items:
            return dtype, 0, 0
        file.seek(_HEADER.size + 4 * (items - 1))
        (size,) = struct.unpack("<i", file.read(4))
        file.seek(-8, os.SEEK_END)
        (offset,) = struct.unpack("<q", file.read(8))
        if size < 0 or offset < 0:
            raise UserError(
                f"{index} is damaged: its last item has {size} tokens at byte {offset}; copy or make it anew"
            )
        return dtype, items, offset + size * dtype.itemsize


def _check_length(prefix: str, length: int, end: int) -> None:
    if length < end:
        raise UserError(
            f"{prefix}.bin has {length} bytes, but {prefix}.idx needs {end}: it is cut short; copy or make it anew"
        )


class IndexedDataset:
    """Items of ``PREFIX.bin`` and ``PREFIX.idx`` as read-only arrays of token ids over the mapped file: nothing is read
    until used.

    ``sizes`` (items,) int32 are the items' lengths in tokens. Opening reads the index once, in memory that does not
    grow with it. Raises UserError naming the file where one is missing, cut short or not of this format.
    """

    def __init__(self, path_prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(path_prefix)
        self.dtype, items, end = _header(self.prefix)
        index = f"{self.prefix}.idx"
        raw = (
            np.memmap(index, mode="r", dtype=np.uint8).view(np.ndarray)
            if items
            else np.empty(_HEADER.size, dtype=np.uint8)
        )
        middle = _HEADER.size + 4 * items
        if raw.size != _HEADER.size + 12 * items:
            raise UserError(f"{index} was written to while it was read; make it anew")
        self.sizes: NDArray[np.int32] = raw[_HEADER.size : middle].view("<i4")
        self._offsets: NDArray[np.int64] = raw[middle:].view("<i8")
        if not self._offsets_fit():
            raise UserError(f"{index} is damaged: its offsets do not fit its sizes; copy or make it anew")
        self._data: NDArray[np.generic] = np.empty(0, self.dtype)
        with open(f"{self.prefix}.bin", "rb") as file:
            # of the file that is mapped, whatever has its name later
            _check_length(self.prefix, os.fstat(file.fileno()).st_size, end)
            if end:
                self._map = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ)
                self._data = np.frombuffer(self._map, self.dtype)

    def _offsets_fit(self) -> bool:
        end = 0
        for start in range(0, len(self), _BLOCK):
            sizes, offsets = (array[start : start + _BLOCK] for array in (self.sizes, self._offsets))
            ends = end + np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
            if sizes.min() < 0 or offsets[0] != end or (offsets[1:] != ends[:-1]).any():
                return False
            end = int(ends[-1])
        return True

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return type(self), (self.prefix,)  # to another process goes the name, not the tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all items together."""
        return len(self._data)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> NDArray[np.generic]:
        """Token ids (T,) of one item, a view of the mapped file in its own type: ``astype`` before arithmetic."""
        start = int(self._offsets[item]) // self.dtype.itemsize
        return self._data[start : start + int(self.sizes[item])]

    def tokens(self, start: int, stop: int) -> NDArray[np.generic]:
        """Token ids (stop - start,) by their positions in the file, whatever the items; a view, as of one item."""
        return self._data[start:stop]

    def read_ahead(self, start: int, stop: int) -> None:
        """Has the system read the tokens of these positions, if they are not in memory yet, and no more of the file;
        returns at once.
        """
        first = start * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            self._map.madvise(mmap.MADV_WILLNEED, first, stop * self.dtype.itemsize - first)

    def item_at(self, position: int) -> tuple[int, int]:
        """The item that the token at ``position`` belongs to, and the token's place in it."""
        item = bisect.bisect_right(self._offsets, position * self.dtype.itemsize) - 1
        return item, position - int(self._offsets[item]) // self.dtype.itemsize

    def blocks(self, size: int = 1 << 22) -> Iterator[NDArray[np.generic]]:
        """All token ids in order, (n,) with n up to ``size`` at a time whatever the items, so that memory stays at one
        block.

        Raises UserError if the file is shorter by now.
        """
        for start in range(0, len(self._data), size):
            count = min(size, len(self._data) - start)
            block = np.fromfile(f"{self.prefix}.bin", self.dtype, count, offset=start * self.dtype.itemsize)
            if len(block) != count:
                raise UserError(f"{self.prefix}.bin was cut short while it was read; copy or make it anew")
            yield block

    def __iter__(self) -> Iterator[NDArray[np.generic]]:
        return (self[item] for item in range(len(self)))
