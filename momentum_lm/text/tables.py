"""Rows of a local table: JSON Lines, CSV, TSV or parquet. A problem is a UserError that names the file and the line or
row."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from momentum_lm.errors import UserError
from momentum_lm.files import check_readable
from momentum_lm.untrusted import Record, brief, check_marks, parse_json, shown

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
LINE = 1 << 24  # characters of a line, or of a CSV cell, whose own limit in csv is 131,072
PARQUET_ROWS = 20_000_000  # a few bytes may stand for any number of equal ones
_AT_ONCE = 64  # rows of a parquet file: a damaged one may ask for much memory for each

Rows = Iterator[tuple[str, dict[str, Any]]]
Needed = Callable[[Collection[str]], Collection[str]]


def read_rows(path: Path, needed: Needed | None = None) -> Rows:
    """Each row as (where it is: "FILE:LINE" or "FILE: row N", its columns), in the file's order. A name that the header
    or an object has more than once is in the row's ``repeated`` (:class:`Record`).

    ``needed`` says which of a parquet file's columns are to be read; where it names one that is not there, all are.
    A cell of a TSV file is what stands between the tabs: quotation marks are text. Raises UserError for a file that is
    not there, of another format or encoding, damaged, or that has a malformed line.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it to one of these")
    try:
        check_readable(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        if isinstance(error, UserError):
            raise
        raise UserError(f"{brief(str(path))}: {getattr(error, 'strerror', None) or error}; check the path") from error
    if suffix == ".parquet":
        yield from _parquet(path, needed)
    elif suffix == ".jsonl":
        yield from _json_lines(path)
    else:
        yield from _csv(path, "\t" if suffix == ".tsv" else ",")


def _json_lines(path: Path) -> Rows:
    def remedy(line: bytes) -> str:
        return "make an array JSON Lines, as with `jq -c '.[]'`" if line.startswith(b"[") else "fix or remove the line"

    with open(path, "rb") as file:
        check_marks(file.read(4), path)
        file.seek(0)
        for number, line in enumerate(_lines(file, path), start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not a JSON record ({error}); make the file UTF-8, as with `iconv -f latin1 -t utf-8`"
                ) from error
            except ValueError as error:
                raise UserError(f"{where}: not a JSON record ({error}); {remedy(line)}") from error
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(
                    f"{where}: expected a JSON object with a key for each column, got {kind}; {remedy(line)}"
                )
            yield where, row


def _csv(path: Path, delimiter: str) -> Rows:
    with open(path, "rb") as start:
        check_marks(start.read(4), path)
    previous = csv.field_size_limit(LINE)
    with open(path, encoding="utf-8-sig", newline="") as file:
        if delimiter == ",":
            rows = csv.reader(_lines(file, path), strict=True)
        else:
            rows = csv.reader(_lines(file, path), strict=True, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        try:
            header = next(rows, [])
            repeated = frozenset(name for name, count in Counter(header).items() if count > 1)
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if len(row) == len(header):
                    yield where, _record(dict(zip(header, row, strict=True)), repeated)
                elif row:
                    raise UserError(
                        f"{where}: {len(row)} columns, the header has {len(header)}; fix or remove the line"
                    )
        except UnicodeDecodeError as error:
            advice = "convert the file first, as with `iconv -f latin1 -t utf-8`"
            raise UserError(f"{path}: not UTF-8 after line {rows.line_num} ({error.reason}); {advice}") from error
        except csv.Error as error:
            advice = "look for an unclosed quote" if delimiter == "," else "look for a line break within a line"
            raise UserError(
                f"{path}:{rows.line_num}: not proper {path.suffix[1:].upper()} ({error}); {advice}"
            ) from error
        finally:
            csv.field_size_limit(previous)


def _lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The file's lines, none of which fills the memory."""
    number = 0
    while line := file.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise UserError(f"{path}:{number}: a line of more than {LINE >> 20} MiB; is it another kind of file?")
        yield line


def _record(row: dict[str, Any], repeated: frozenset[str]) -> dict[str, Any]:
    if not repeated:
        return row
    record = Record(row)
    record.repeated = repeated
    return record


def _parquet(path: Path, needed: Needed | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            repeated = frozenset(name for name, count in Counter(names).items() if count > 1)
            columns = None if needed is None else list(needed(names))
            if columns is None or not set(columns) <= set(names):
                columns = [name for name in names if name not in repeated]
            for name in sorted(repeated & set(columns)):
                raise UserError(
                    f"{path}: the column {shown(name)} is there more than once; rename or remove the others"
                )
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    if number == PARQUET_ROWS:
                        raise UserError(f"{path}: more than {PARQUET_ROWS:,} rows; make it smaller")
                    yield f"{path}: row {number}", row
                    number += 1
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: its row {number} asks for more memory than there is; is the file damaged?") from error
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        after = f"after row {number - 1}: " if number else ""
        raise UserError(
            f"{path} is cut short or not a parquet file ({after}{brief(str(error))}); fetch it again"
        ) from error
