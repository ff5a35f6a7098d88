"""Where documents come from: text files and folders, CSV, JSON Lines, parquet, compressed ones, and data sets of the Hugging Face hub.

A source yields documents as UTF-8 bytes, one at a time and always in the same order. No reader holds more than one document of at most
MAX_DOCUMENT bytes and a read buffer (parquet: one column chunk's page). Problems are UserErrors that name file and line or byte.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from momentum_lm.data.compression import ZstdError, open_decompressed
from momentum_lm.errors import UserError

MAX_DOCUMENT = 8 << 20  # bytes; a document is held and tokenised whole
TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = (".gz", ".zst")
DOCUMENTS = ("file", "line", "blank-line", "record")


class Interrupted(UserError):
    """A problem from outside that leaves the work so far usable: the same command goes on."""


class Source:
    """One file or data set. ``size`` is its bytes on disk (None where unknown), ``position()`` how many of them are read."""

    name: str
    size: int | None = None

    def documents(self) -> Iterator[bytes]:
        """Documents as UTF-8, in order. Raises UserError where the input is not what it should be."""
        raise NotImplementedError

    def position(self) -> int:
        """Bytes of the input read so far, for the progress bar; 0 where that is not known."""
        return 0

    def fingerprint(self) -> str:
        """Changes when the content does, as far as can be seen without reading it all."""
        raise NotImplementedError


def find_sources(names: list[str], column: str, document: str | None, exclude: Path | None = None) -> list[Source]:
    """The sources behind file, folder and data set names, in that order; a folder's text files sorted by path.

    ``document`` says what a document is: ``file``, ``line``, ``blank-line`` (runs of lines between blank ones) or ``record`` (a row of
    a table); None is ``file`` for text, ``record`` for tables. Files under ``exclude`` (the output) are left out.
    Raises UserError for names that are nothing, empty files and folders, and a ``document`` that does not go with a file.
    """
    sources: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if name.startswith("hf:") or not path.exists():
            if _looks_like_file(name):
                raise UserError(f"{name}: no such file or folder; check the path")
            sources.append(HubSource(name, column, document))
        elif path.is_dir():
            found = sorted(_text_files(path, exclude), key=os.fspath)
            if not found:
                raise UserError(f"{name}: no {' or '.join(TEXT_SUFFIXES)} files in this folder; name the files that you mean")
            sources += [FileSource(file, column, document) for file in found]
        else:
            source = FileSource(path, column, document)
            if source.size == 0:
                raise UserError(f"{name} is empty; leave it out")
            sources.append(source)
    return sources


class FileSource(Source):
    """A file, whose format its suffix tells: .csv .tsv .jsonl .ndjson .json .parquet, else plain text; .gz and .zst on top of these."""

    def __init__(self, path: Path, column: str, document: str | None) -> None:
        self.path, self.name, self.column = path, str(path), column
        self.size: int = path.stat().st_size
        self.suffix = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()
        is_table = self.suffix in TABLE_SUFFIXES
        self.document = document or ("record" if is_table else "file")
        if is_table != (self.document == "record"):
            other = "record" if is_table else "file, line or blank-line"
            raise UserError(f"--document {self.document} does not go with {self.name}; use --document {other} or leave it out")
        if self.suffix == ".parquet" and path.suffix in _COMPRESSED:
            raise UserError(f"{self.name}: parquet is compressed inside; decompress the file first")
        self._raw: BinaryIO | None = None
        self._done = 0

    def position(self) -> int:
        return self._raw.tell() if self._raw else self._done

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        with open(self.path, "rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, self.size - (1 << 16)))
            digest.update(file.read(1 << 16))
        return digest.hexdigest()

    def documents(self) -> Iterator[bytes]:
        if self.suffix == ".parquet":
            yield from self._parquet()
            return
        with open(self.path, "rb") as raw:
            self._raw = raw
            try:
                file = open_decompressed(raw, self.path.suffix)
                if self.suffix in (".csv", ".tsv"):
                    yield from _read_csv(file, self.name, self.column, "\t" if self.suffix == ".tsv" else ",")
                elif self.suffix in TABLE_SUFFIXES:
                    yield from _read_json_lines(file, self.name, self.column)
                elif self.document == "file":
                    yield from _read_whole(file, self.name)
                else:
                    yield from _read_text(file, self.name, blank_lines=self.document == "blank-line")
            except EOFError as error:
                raise UserError(f"{self.name} is cut short: its compressed data ends too early; fetch it again") from error
            except (gzip.BadGzipFile, zlib.error, ZstdError) as error:
                raise UserError(f"{self.name} is damaged or not a {self.path.suffix} file ({error}); fetch it again") from error
            finally:
                self._raw, self._done = None, self.size

    def _parquet(self) -> Iterator[bytes]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.name} is cut short or not a parquet file; fetch it again") from error
        with file:
            schema = file.schema_arrow
            if self.column not in schema.names:
                raise _no_column(self.name, self.column, schema.names)
            kind = schema.field(self.column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{self.name}: column {self.column!r} holds {kind}, not text; name another with --column")
            total, rows = max(1, file.metadata.num_rows), 0
            try:
                for batch in file.iter_batches(batch_size=64, columns=[self.column]):
                    batch.validate(full=True)  # that the text is UTF-8
                    for row, text in enumerate(batch.column(0).cast(pyarrow.large_binary()).to_pylist(), start=rows + 1):
                        if text is not None:
                            yield _checked(text, f"{self.name}: row {row}")
                    rows += batch.num_rows
                    self._done = self.size * rows // total
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"{self.name} is damaged after row {rows} ({str(error).splitlines()[0]}); fetch it again") from error


class HubSource(Source):
    """``hf:NAME[:CONFIG][@SPLIT]``: a data set that ``datasets`` loads from the hub or a local folder, streamed. SPLIT: train."""

    def __init__(self, name: str, column: str, document: str | None) -> None:
        if document not in (None, "record"):
            raise UserError(f"--document {document} does not go with the data set {name}: its documents are records")
        self.name, self.column = name, column
        path, _, split = name.removeprefix("hf:").partition("@")
        self.path, _, config = path.partition(":")
        self.config, self.split = config or None, split or "train"

    def fingerprint(self) -> str:
        return self.name

    def documents(self) -> Iterator[bytes]:
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"{self.name} is no file here, and loading a data set by name needs: pip install datasets") from error
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it tells of every retry
        number = 0
        try:
            for number, row in enumerate(datasets.load_dataset(self.path, self.config, split=self.split, streaming=True), start=1):
                if self.column not in row:
                    raise _no_column(self.name, self.column, list(row))
                if row[self.column] is not None:
                    yield _text(row[self.column], f"{self.name}: record {number}", self.column)
        except UserError:
            raise
        except Exception as error:  # whatever datasets, huggingface_hub and the network library under them raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            where = f"stopped after record {number}" if number else "could not be loaded"
            raise Interrupted(
                f"{self.name} is no file here, and as a data set it {where} ({reason}). With a network: check NAME[:CONFIG][@SPLIT]. "
                "Without one: fetch its parquet or JSON Lines files elsewhere and give their path instead of the name"
            ) from error


def _looks_like_file(name: str) -> bool:
    """A name that is not there: a file gone missing rather than a data set?"""
    if name.startswith("hf:"):
        return False
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith((*TEXT_SUFFIXES, *TABLE_SUFFIXES, *_COMPRESSED))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@\S+)?", name)
    )


def _text_files(folder: Path, exclude: Path | None) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if not n.startswith(".") and not (exclude and (Path(where) / n).resolve() == exclude)]
        for name in names:
            if not name.startswith(".") and name.lower().removesuffix(".gz").removesuffix(".zst").endswith(TEXT_SUFFIXES):
                yield Path(where, name)


def _read_whole(file: BinaryIO, name: str) -> Iterator[bytes]:
    text = file.read(MAX_DOCUMENT + 1)
    if len(text) > MAX_DOCUMENT:
        raise UserError(
            f"{name} is a document of more than {MAX_DOCUMENT >> 20} MiB; say how its documents are separated: --document line or "
            "--document blank-line"
        )
    _decode(text, name, 0)
    yield text.removeprefix(b"\xef\xbb\xbf")


def _read_text(file: BinaryIO, name: str, blank_lines: bool) -> Iterator[bytes]:
    lines = (line.encode() for line in _lines(file, name))
    if not blank_lines:
        yield from (line.rstrip(b"\r\n") for line in lines)
        return
    block: list[bytes] = []
    size = 0
    for number, line in enumerate(itertools.chain(lines, [b""]), start=1):
        if line.strip():
            block.append(line)
            size += len(line)
            if size > MAX_DOCUMENT:
                raise UserError(f"{name}:{number}: more than {MAX_DOCUMENT >> 20} MiB without a blank line; use --document line")
        elif block:
            yield b"".join(block).rstrip(b"\r\n")
            block, size = [], 0


def _read_json_lines(file: BinaryIO, name: str, column: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file, name), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            hint = "; this is one JSON array: make it JSON Lines, as with `jq -c '.[]'`" if number == 1 and line[0] == "[" else ""
            raise UserError(f"{where}: not a JSON record ({error}){hint}; mend or remove the line") from error
        except RecursionError as error:
            raise UserError(f"{where}: JSON nested too deeply; mend or remove the line") from error
        if not isinstance(record, dict):
            hint = "make the array JSON Lines, as with `jq -c '.[]'`" if isinstance(record, list) else "mend or remove the line"
            raise UserError(f"{where}: expected a JSON object with the column {column!r}, got {type(record).__name__}; {hint}")
        if column not in record:
            raise _no_column(where, column, list(record))
        if record[column] is not None:
            yield _text(record[column], where, column)


def _read_csv(file: BinaryIO, name: str, column: str, delimiter: str) -> Iterator[bytes]:
    previous = csv.field_size_limit(MAX_DOCUMENT)
    rows = csv.reader(_lines(file, name), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if column not in header:
            raise _no_column(name, column, header)
        index = header.index(column)
        for row in rows:
            if len(row) > index:
                yield _checked(row[index].encode(), f"{name}:{rows.line_num}")
            elif row:
                raise UserError(f"{name}:{rows.line_num}: {len(row)} columns, the header has {len(header)}; mend or remove the line")
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not proper CSV ({error}); look for an unclosed quote") from error
    finally:
        csv.field_size_limit(previous)


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines with their endings, without a byte order mark."""
    offset = 0
    for number in itertools.count(1):
        line = file.readline(MAX_DOCUMENT + 1)
        if not line:
            return
        if len(line) > MAX_DOCUMENT:
            raise UserError(f"{name}:{number}: a line of more than {MAX_DOCUMENT >> 20} MiB; break it up")
        text = _decode(line, name, offset)
        yield text.removeprefix("\ufeff") if not offset else text
        offset += len(line)


def _decode(text: bytes, name: str, offset: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: byte {offset + error.start} is not UTF-8 (0x{text[error.start]:02x}); convert the file first, as with "
            "`iconv -f latin1 -t utf-8`"
        ) from error


def _text(value: object, where: str, column: str) -> bytes:
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text; name another with --column")
    try:
        return _checked(value.encode(), where)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half of a surrogate pair at character {error.start} is not text; mend or remove it") from error


def _checked(text: bytes, where: str) -> bytes:
    if len(text) > MAX_DOCUMENT:
        raise UserError(f"{where}: a document of {len(text) / 2**20:.1f} MiB; the most is {MAX_DOCUMENT >> 20} MiB: split or remove it")
    return text


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    there = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"
    return UserError(f"{where}: no column {column!r}; there are: {there}; name one with --column")
