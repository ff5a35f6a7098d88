"""zstd frames followed block by block: what zstandard itself makes of them, in bounded memory, and cut ones noticed."""

import io
import random
import resource
import time

import pytest
import zstandard

from momentum_lm.text.compression import MAX_WINDOW, WindowError, ZstdError, open_decompressed

RNG = random.Random(0)
DATA = b" ".join(RNG.choice([b"the", b"same", RNG.randbytes(9)]) for _ in range(60_000))
SKIPPABLE = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"


def decompressed(data):
    return open_decompressed(io.BytesIO(data), ".zst").read()


def streamed(data, **settings):
    packer = zstandard.ZstdCompressor(**settings).compressobj()
    flushed = [
        packer.compress(data[:1000]),
        packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        packer.compress(data[1000:]),
    ]
    return b"".join([*flushed, packer.flush()])


@pytest.mark.parametrize("size", [0, 1, 255, 256, 1000, 70_000, len(DATA)])
@pytest.mark.parametrize(
    "settings", [{}, {"level": 19, "write_checksum": True}, {"level": 1, "write_content_size": False}]
)
def test_every_kind_of_frame(size, settings):
    data = DATA[:size]
    whole, stream = zstandard.ZstdCompressor(**settings).compress(data), streamed(data, **settings)
    for packed in (whole, stream):
        assert decompressed(packed) == data
    assert decompressed(SKIPPABLE + whole + SKIPPABLE + stream + SKIPPABLE) == 2 * data
    assert decompressed(b"") == b""


@pytest.mark.parametrize("write_checksum", [False, True])
def test_cut_anywhere_is_noticed(write_checksum):
    packed = SKIPPABLE + zstandard.ZstdCompressor(write_checksum=write_checksum).compress(DATA[:500]) + SKIPPABLE
    whole = {len(SKIPPABLE), len(packed) - len(SKIPPABLE), len(packed), 0}
    for length in range(len(packed)):
        if length in whole:
            assert decompressed(packed[:length]) in (b"", DATA[:500])
        else:
            with pytest.raises((EOFError, ZstdError)):
                decompressed(packed[:length])


def test_no_flipped_byte_passes_the_checksum():
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(DATA[:2000])
    for place in range(4, len(packed), 7):
        with pytest.raises((EOFError, ZstdError, WindowError)):
            decompressed(packed[:place] + bytes([packed[place] ^ 0xFF]) + packed[place + 1 :])


def test_repetitive_text_takes_no_memory_and_time_in_proportion():
    """Half a gigabyte out of 40 kB, which was in memory at once."""
    packed = zstandard.ZstdCompressor().compress(b"the same line\n" * 750_000) * 50
    assert len(packed) < 100_000
    before, began, size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0
    file = open_decompressed(io.BytesIO(packed), ".zst")
    while piece := file.read(1 << 16):
        size += len(piece)
    assert size == 50 * 750_000 * 14
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB
    assert time.process_time() - began < 20


def test_a_window_that_is_too_large_is_refused_before_it_is_taken():
    parameters = zstandard.ZstdCompressionParameters(window_log=MAX_WINDOW.bit_length() - 1)
    assert decompressed(streamed(DATA, compression_params=parameters)) == DATA
    wide = bytearray(streamed(DATA, compression_params=parameters))
    wide[5] = (MAX_WINDOW.bit_length() - 10) << 3  # the window's descriptor: twice that
    with pytest.raises(WindowError) as caught:
        decompressed(bytes(wide))
    assert caught.value.size == 2 * MAX_WINDOW
