"""Reading .gz and .zst as a stream that knows when it was cut short."""

from __future__ import annotations

import gzip
import io
from typing import Any, BinaryIO, cast

_BLOCK = 1 << 15


class ZstdError(ValueError):
    """The data is not zstd's, or damaged."""


def open_decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """``raw`` itself, or what it holds if ``suffix`` is .gz or .zst. Reading raises EOFError where compressed data ends too early,
    gzip.BadGzipFile, zlib.error or ZstdError where it is not such data."""
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 16))
    return raw


class _ZstdReader(io.RawIOBase):
    """zstandard's own stream_reader takes a truncated file for a whole one, so the frames are followed here."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not (self._compressed or self._fill()):
                if self._frame is not None:
                    raise EOFError("zstd frame ends too early")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bytes:
        self._compressed = self._raw.read(_BLOCK)
        return self._compressed

    def _decompress(self) -> None:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            self._ready = self._frame.decompress(self._compressed)
        except zstandard.ZstdError as error:
            raise ZstdError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
