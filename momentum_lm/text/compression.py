"""Reading .gz and .zst as a stream that knows when it was cut short, in memory that does not depend on the data."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

MAX_WINDOW = 1 << 27  # bytes that a .zst may have its reader keep: the zstd command's own limit
_MAGIC, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_BLOCK = 1 << 17  # bytes that a block holds at most
_PIECE = 1 << 16


class ZstdError(ValueError):
    """The data is not zstd's, or damaged."""


class WindowError(ValueError):
    """A frame of zstd that needs more memory than MAX_WINDOW; ``size`` is how much."""

    def __init__(self, size: int) -> None:
        super().__init__(f"a window of {size} bytes")
        self.size = size


def open_decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """``raw`` itself, or what it holds if ``suffix`` is .gz or .zst. Reading raises EOFError where compressed data ends
    too early, gzip.BadGzipFile, zlib.error or ZstdError where it is not such data, WindowError for what takes too much
    memory.
    """
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), _PIECE))
    return raw


class _ZstdReader(io.RawIOBase):
    """zstandard's own stream_reader takes a truncated file for a whole one, and its decompressobj expands at once
    whatever it is given: 32 KiB of compressed data may hold a gigabyte. So the frames and their blocks (RFC 8878,
    3.1.1) are followed here: a block becomes 128 KiB at the most.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._pieces = _zstd_pieces(raw)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _zstd_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """What the frames of a .zst file hold, block by block."""
    while start := raw.read(4):
        magic = int.from_bytes(start, "little")
        if len(start) == 4 and magic & ~0xF == _SKIPPABLE:
            left = int.from_bytes(_exactly(raw, 4), "little")
            while left:
                left -= len(_exactly(raw, min(left, _PIECE)))
        elif magic == _MAGIC:
            yield from _frame(raw, start)
        else:
            raise ZstdError("a frame does not begin with zstd's magic number")


def _frame(raw: BinaryIO, start: bytes) -> Iterator[bytes]:
    import zstandard

    start += _exactly(raw, 1)
    flags = start[4]
    single, checksum = bool(flags & 0x20), bool(flags & 0x04)
    # The window's size, the dictionary's number and the content's size
    start += _exactly(raw, (not single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6])
    try:
        window = zstandard.get_frame_parameters(start).window_size
        if window > MAX_WINDOW:
            raise WindowError(window)
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
        yield frame.decompress(start)
        last = False
        while not last:
            header = _exactly(raw, 3)
            fields = int.from_bytes(header, "little")
            last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
            if kind == 3 or size > _BLOCK:
                raise ZstdError("a block's header is damaged")
            yield frame.decompress(header + _exactly(raw, 1 if kind == 1 else size))  # kind 1: one byte, repeated
        if checksum:
            yield frame.decompress(_exactly(raw, 4))
    except zstandard.ZstdError as error:
        raise ZstdError(str(error)) from error
    if not frame.eof:
        raise ZstdError("a frame is damaged")


def _exactly(raw: BinaryIO, count: int) -> bytes:
    data = raw.read(count)
    if len(data) < count:
        raise EOFError("zstd frame ends too early")
    return data
