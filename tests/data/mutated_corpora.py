"""Corpora changed at random, from a seed, and what the readers make of them.

python mutated_corpora.py FIRST COUNT FOLDER [KIND...]

Prints one line of JSON for each file that is neither read rightly nor refused in one line of a UserError, in 10 seconds
and a gigabyte. A process of its own, so that its memory can be told, and so that a signal ends it alone.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from momentum_lm.data.sources import MAX_DOCUMENT, find_sources
from momentum_lm.errors import UserError

SECONDS, BYTES = 10, 1 << 30
TEXTS = [
    "one",
    'a "quoted" text,\nof two lines',
    "",
    "naïve café 日本語",
    "  spaces  ",
    "tab\tand\r\nreturn",
    "long " * 300,
    "last",
]
PIECES = [
    *(
        b'"',
        b'""',
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"\0" * 40,
        b"\t",
        b",",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xff",
        b"{",
        b"}",
    ),
    *(b"[" * 30_000, b'{"a":' * 9_000, b"9" * 5000, b"1e999", b"NaN", b"null", b'"text": "x",', b"\\ud83d", b"\\u0000"),
    *(b"\xe2\x80\xa8", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x80" * 9 + b"\x01"),
    *(b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\xff\xff\xff\xff", b"\x1f\x8b\x08\x1c"),  # beginnings of zstd and gzip
]


def as_csv(texts: list[str], **style: object) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **style).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def as_parquet(**settings: object) -> bytes:
    file = io.BytesIO()
    category = pyarrow.array(TEXTS).dictionary_encode()
    table = pyarrow.table(
        {"id": list(range(len(TEXTS))), "text": TEXTS, "kind": category, "doc": [{"text": text} for text in TEXTS]}
    )
    pyarrow.parquet.write_table(table, file, row_group_size=3, **settings)
    return file.getvalue()


JSON_LINES = "".join(
    json.dumps({"id": i, "text": text, "doc": {"text": [text]}}) + "\n" for i, text in enumerate(TEXTS)
).encode()
LINES = "\n\n".join(TEXTS).encode()
ZSTD = zstandard.ZstdCompressor(write_checksum=True)
KINDS = {  # file name: content, and how it is read
    "file.txt": (LINES, {}),
    "lines.txt": (LINES, {"document": "line"}),
    "blocks.txt": (LINES, {"document": "blank-line"}),
    "t.csv": (as_csv(TEXTS), {}),
    "t.tsv": (as_csv([" ".join(t.split()) for t in TEXTS], delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None), {}),
    "t.jsonl": (JSON_LINES, {}),
    "nested.jsonl": (JSON_LINES, {"column": "doc.text.0"}),
    "t.jsonl.gz": (gzip.compress(JSON_LINES, mtime=0), {}),
    "repetitive.txt.gz": (gzip.compress(b"the same line\n" * 50_000, mtime=0), {"document": "line"}),
    "t.jsonl.zst": (ZSTD.compress(JSON_LINES[:900]) + ZSTD.compress(JSON_LINES[900:]), {}),
    "repetitive.txt.zst": (zstandard.compress(b"the same line\n" * 50_000), {"document": "line"}),
    "t.parquet": (as_parquet(), {}),
    "kind.parquet": (as_parquet(compression="zstd"), {"column": "kind"}),
    "plain.parquet": (
        as_parquet(use_dictionary=False, compression="none", write_statistics=False),
        {"column": "doc.text"},
    ),
}


def mutated(kind: str, number: int) -> bytes:
    """The content of ``kind`` with a few changes: bytes, bits and pieces changed, left out, put in or doubled; cut short."""
    rng = random.Random(f"{kind} {number}")
    data = bytearray(KINDS[kind][0])
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start = rng.choice(
            [
                rng.randrange(len(data) + 1),
                rng.randrange(min(len(data), 64) + 1),
                max(0, len(data) - rng.randrange(200)),
            ]
        )
        stop = min(len(data), start + rng.choice([1, 1, 2, 4, rng.randrange(1, 300)]))
        change = rng.randrange(7)
        if change == 0:
            data[start:stop] = rng.randbytes(stop - start)
        elif change == 1:
            for place in range(start, stop):
                data[place] ^= 1 << rng.randrange(8)
        elif change == 2:
            del data[start:stop]
        elif change == 3:
            data[start:start] = rng.choice(PIECES)
        elif change == 4:
            data[start:stop] = rng.choice(PIECES)
        elif change == 5:
            data[start:start] = data[start:stop] * rng.choice([1, 2, 100])
        else:
            del data[start:]
    return bytes(data)


def expected(kind: str, data: bytes) -> list[bytes] | None:
    """The right answer for a mutated file, found in a plain way; None where that is not known."""
    plain = data.removeprefix(b"\xef\xbb\xbf")
    if kind == "file.txt":
        return [plain]
    if kind == "lines.txt":
        return [line.rstrip(b"\r") for line in plain.removesuffix(b"\n").split(b"\n")]
    if kind == "t.csv":
        rows = [row for row in csv.reader(io.StringIO(plain.decode(), newline="")) if row]
        return [row[rows[0].index("text")].encode() for row in rows[1:]]
    if kind == "t.jsonl":
        texts = [json.loads(line)["text"] for line in plain.split(b"\n") if line.strip()]
        return [text.encode() for text in texts if text is not None]
    if kind.startswith("t.jsonl."):  # with a checksum
        return [text.encode() for text in TEXTS]
    return None


def problem(kind: str, number: int, folder: Path) -> str | None:
    """What is wrong with how a mutated file is read; None if nothing is."""
    data, path = mutated(kind, number), folder / kind
    path.write_bytes(data)
    settings = {"column": "text", "document": None, **KINDS[kind][1]}
    began = time.monotonic()
    try:
        documents = [document for source in find_sources([str(path)], **settings) for document in source.documents()]
    except UserError as error:
        message = str(error)
        return None if kind in message and "\n" not in message else f"message: {message}"
    except BaseException:
        return traceback.format_exc()
    finally:
        took = time.monotonic() - began
    if took > SECONDS:
        return f"took {took:.0f} s"
    if any(len(document) > MAX_DOCUMENT or document.decode() is None for document in documents):
        return "a document is too long"
    right = expected(kind, data)
    return None if right is None or right == documents else f"{len(documents)} documents, not the right ones"


def main(first: int, count: int, folder: Path, kinds: list[str]) -> None:
    def alarm(*_: object) -> None:
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, alarm)
    for kind in kinds:
        for number in range(first, first + count):
            (folder / "now").write_text(f"{kind} {number}")
            signal.alarm(3 * SECONDS)
            found = problem(kind, number, folder)
            signal.alarm(0)
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if peak > BYTES:
                found = f"{peak >> 20} MiB"
            if found:
                print(json.dumps({"kind": kind, "number": number, "problem": found}), flush=True)
            if peak > BYTES:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or list(KINDS))
