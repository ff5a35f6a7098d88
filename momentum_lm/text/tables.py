"""Rows of tables: CSV, TSV, JSON Lines and parquet. A problem is a UserError that names the file and the line or row.

No reader holds more than a row (CSV: of at most twice ``MAX_LINE``) and a read buffer, or of a parquet file a page of
each column and 8 rows.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from momentum_lm.errors import UserError
from momentum_lm.files import check_readable
from momentum_lm.text.lines import MAX_LINE, lines_of
from momentum_lm.untrusted import brief, parse_json, shown

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # that files called .csv have instead of commas
_ROWS = 20_000_000  # of a table that is held whole: a few bytes of parquet may stand for any number of equal ones
_AT_ONCE = 8  # rows of a parquet file, of up to MAX_LINE bytes each
_CHUNK, _RATIO = 64 << 20, 200  # more of a column in a parquet file's row group is refused if it is packed that well

Rows = Iterator[tuple[str, dict[str, Any]]]
Needed = Callable[[Collection[str]], Collection[str]]


def read_rows(path: Path, needed: Needed) -> Rows:
    """Each row as (where it is: "FILE:LINE" or "FILE: row N", its columns), in the file's order.

    ``needed`` gets the names in a header (JSON Lines have none) and says which are to be read; where one of these is
    not there, all are. A name that a JSON object has more than once is in the row's ``repeated`` (:class:`Record`).
    Raises UserError for a file that is not there, of another format or encoding, damaged, or that has a malformed line
    or a needed column twice.
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
    with open(path, "rb") as file:
        rows = parquet_rows(path, needed) if suffix == ".parquet" else text_rows(file, str(path), suffix, needed)
        for number, row in enumerate(rows):
            if number == _ROWS:
                raise UserError(f"{path}: more than {_ROWS:,} rows; make it smaller")
            yield row


def text_rows(file: BinaryIO, name: str, suffix: str, needed: Needed) -> Rows:
    """Rows as of :func:`read_rows`, of an open file that is CSV or TSV if its ``suffix`` says so, else JSON Lines.

    Of a TSV file a cell is what stands between the tabs: quotation marks are text, and join no lines.
    """
    if suffix == ".csv":
        return _csv(file, name, needed)
    return _tsv(file, name, needed) if suffix == ".tsv" else _json_lines(file, name)


def _json_lines(file: BinaryIO, name: str) -> Rows:
    for number, line in enumerate(lines_of(file, name), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        is_array = number == 1 and line.startswith("[")
        remedy = "make the array JSON Lines, as with `jq -c '.[]'`" if is_array else "fix or remove the line"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: not a JSON record ({error}); {remedy}") from error
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: expected a JSON object with a key for each column, got {type(row).__name__}; {remedy}"
            )
        yield where, row


def _csv(file: BinaryIO, name: str, needed: Needed) -> Rows:
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for line in lines_of(file, name):
            size += len(line)
            if size > 2 * MAX_LINE:
                raise UserError(
                    f"{name}:{rows.line_num}: a row of more than {2 * MAX_LINE >> 20} MiB; look for an unclosed quote"
                )
            yield line

    previous = csv.field_size_limit(MAX_LINE)
    rows = csv.reader(lines(), strict=True)
    try:
        header = next(rows, [])
        if len(header) == 1:
            _check_separator(header[0], needed, name)
        columns = _columns(header, needed, f"{name}:1")
        for row in rows:
            size = 0
            if len(row) == len(header):
                yield f"{name}:{rows.line_num}", {column: row[index] for column, index in columns}
            elif row:
                advice = "fix or remove the line (a text with commas stands in quotation marks)"
                raise UserError(f"{name}:{rows.line_num}: {len(row)} columns, the header has {len(header)}; {advice}")
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{name}:{rows.line_num}: a carriage return inside of a line; fix it, or quote the text"
            ) from error
        raise UserError(f"{name}:{rows.line_num}: not proper CSV ({error}); look for an unclosed quote") from error
    finally:
        csv.field_size_limit(previous)


def _check_separator(header: str, needed: Needed, name: str) -> None:
    """Raises UserError for the one name of a header, if it is not needed as it is and holds what separates columns
    elsewhere.
    """
    try:
        is_needed = header in needed([header])
    except UserError:
        is_needed = False
    for separator, word in _SEPARATORS.items():
        if separator in header and not is_needed:
            columns = ", ".join(map(shown, header.split(separator)[:5]))
            advice = "write it with commas, as with pandas' read_csv(..., sep=...).to_csv(...)"
            raise UserError(
                f"{name}:1: {word} seem to separate its columns ({columns}), and .csv files are read with commas; "
                f"{advice}"
            )


def _tsv(file: BinaryIO, name: str, needed: Needed) -> Rows:
    lines = (line.rstrip("\r\n") for line in lines_of(file, name))
    header = next(lines, "").split("\t")
    columns = _columns(header, needed, f"{name}:1")
    for number, line in enumerate(lines, start=2):
        row = line.split("\t")
        if len(row) == len(header) and line:
            yield f"{name}:{number}", {column: row[index] for column, index in columns}
        elif line:
            advice = "fix or remove the line (in .tsv files quotation marks are ordinary and join no lines)"
            raise UserError(f"{name}:{number}: {len(row)} columns, the header has {len(header)}; {advice}")


def _columns(names: list[str], needed: Needed, where: str) -> list[tuple[str, int]]:
    """The columns that are to be read and their indices. Raises UserError for one that is there twice."""
    wanted = set(needed([name for name in names if name]))
    for name in sorted(wanted):
        if names.count(name) > 1:
            raise UserError(f"{where}: {names.count(name)} columns are called {shown(name)}; rename all but one")
    if not wanted <= set(names):
        wanted = {name for name in names if names.count(name) == 1}
    return [(name, index) for index, name in enumerate(names) if name in wanted]


def parquet_rows(path: Path, needed: Needed, progress: Callable[[float], None] = lambda share: None) -> Rows:
    """Rows as of :func:`read_rows`, which raises the same; ``progress`` gets the share of them that has been read."""
    import pyarrow
    import pyarrow.parquet

    damaged = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)  # what pyarrow raises
    try:
        raw = pyarrow.OSFile(os.fsencode(path))  # bytes: a path need not be UTF-8
        file = pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
        names, total = file.schema_arrow.names, max(1, file.metadata.num_rows)
    except damaged as error:
        raise UserError(f"{path} is cut short or not a parquet file; fetch it again") from error
    number = 0
    with file:
        columns = [name for name, _ in _columns(names, needed, str(path))]
        try:
            _refuse_bomb(file.metadata, columns, path)  # where names need not be UTF-8
            for batch in file.iter_batches(batch_size=_AT_ONCE, columns=columns):
                batch.validate(full=True)  # that the text is UTF-8
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{path}: row {number}", {name: batch.column(name)[index].as_py() for name in columns}
                progress(number / total)
        except UserError:
            raise
        except damaged as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is damaged after row {number} ({brief(reason)}); fetch it again") from error


def _refuse_bomb(metadata: Any, columns: list[str], path: Path) -> None:
    """Pages are decompressed whole, and next to nothing may hold a gigabyte. Raises UserError for what is packed that
    well.
    """
    for group in range(metadata.num_row_groups):
        chunks = (metadata.row_group(group).column(i) for i in range(metadata.row_group(group).num_columns))
        for chunk in (c for c in chunks if c.path_in_schema.split(".")[0] in columns or c.path_in_schema in columns):
            packed, whole = max(1, chunk.total_compressed_size), chunk.total_uncompressed_size
            if whole > _CHUNK and whole > _RATIO * packed:
                raise UserError(
                    f"{path}: {packed:,} bytes of row group {group + 1} hold {whole >> 20:,} MiB of "
                    f"{chunk.path_in_schema!r}, "
                    "which would be in memory at once; write the file again with less in a row group, or as .jsonl.zst"
                )
