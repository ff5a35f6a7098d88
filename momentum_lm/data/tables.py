"""Rows of a local table: JSON Lines, CSV or parquet. A problem is a UserError that names the file and the line or row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".parquet")
_FIELD = 1 << 26  # characters of a CSV cell; csv's own limit is 131,072


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row as (where it is: "FILE:LINE" or "FILE: row N", its columns), in the file's order.

    Raises UserError for a file that is not there, of another format, damaged, or that has a malformed line.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it to one of these")
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    yield from {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[path.suffix](path)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError as well
                raise UserError(f"{where}: not a JSON record ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object with a key for each column, got {type(row).__name__}; mend the line")
            yield where, row


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    previous = csv.field_size_limit(_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if len(row) == len(header):
                    yield where, dict(zip(header, row, strict=True))
                elif row:
                    raise UserError(f"{where}: {len(row)} columns, the header has {len(header)}; mend or remove the line")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 after line {rows.line_num} ({error.reason}); convert the file first") from error
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not proper CSV ({error}); look for an unclosed quote") from error
        finally:
            csv.field_size_limit(previous)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is cut short or not a parquet file; fetch it again") from error
