"""Lines of UTF-8 text files, of bounded length. What is no such text is a UserError that names the file
and the byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import BinaryIO

from momentum_lm.errors import UserError
from momentum_lm.untrusted import check_marks

MAX_LINE = 8 << 20  # bytes


def lines_of(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines with their endings, without a byte order mark. Raises UserError for other encodings and for lines above
    ``MAX_LINE``.
    """
    offset = 0
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if number == 1 and not line.endswith(b"\n") and b"\r" in line.rstrip(b"\r"):
            raise UserError(
                f"{name}: its lines end in carriage returns alone, as on old Macs; convert the file first, as with "
                "`tr '\\r' '\\n'`"
            )
        if len(line) > MAX_LINE:
            raise UserError(f"{name}:{number}: a line of more than {MAX_LINE >> 20} MiB; break it up")
        text = decode(line, name, offset)
        yield text.removeprefix("\ufeff") if not offset else text
        offset += len(line)


def decode(text: bytes, name: str, offset: int) -> str:
    """UTF-8 that stands at byte ``offset`` of a file. Raises UserError for other encodings."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        if not offset:
            check_marks(text, name)
        raise UserError(
            f"{name}: byte {offset + error.start} is not UTF-8 (0x{text[error.start]:02x}); convert the file first, "
            "as with "
            "`iconv -f latin1 -t utf-8`"
        ) from error
    refuse_nuls(text, f"{name}: byte {offset}", offset)
    return decoded


def refuse_nuls(text: bytes, where: str, offset: int = 0) -> None:
    """UTF-16 without a byte order mark is valid UTF-8, with a NUL beside every letter. A stray NUL is let through.
    Raises UserError.
    """
    nuls = text.count(0)
    if nuls < 8 or 8 * nuls < len(text):
        return
    first_is_nul = text[offset % 2 :: 2].count(0) > nuls / 2  # counted in the file, whose letters are two bytes each
    encoding = "utf-32" if 5 * nuls > 3 * len(text) else "utf-16"
    encoding += "be" if first_is_nul else "le"
    raise UserError(
        f"{where}: {nuls:,} of {len(text):,} bytes are NUL: this is no text, or it is {encoding.upper()} without a "
        f"byte order mark; then convert it first, as with `iconv -f {encoding} -t utf-8`"
    )
