"""One table, four forms: plain text for terminals, Markdown for READMEs, CSV for spreadsheets, and a part of a page."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Table:
    """Column headings and rows of finished text; format numbers before. Columns of numbers are aligned to the right.

    Raises ValueError for a row that does not have one cell a column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind: ClassVar = "table"
    right: list[bool] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(self.columns)} columns, but a row of {len(row)} cells: {row}")
        for i in range(len(self.columns)):
            cells = [row[i] for row in self.rows if row[i]]
            self.right.append(bool(cells) and all(c[0].isdigit() or c[0] in "-+−±" for c in cells))

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]]) -> Table:
        """A table of rows, each {heading: cell}; without rows it has no columns."""
        return cls(list(rows[0]) if rows else [], [list(row.values()) for row in rows])

    def text(self) -> str:
        """Aligned plain text; the caption, if any, above it."""
        lines = [list(map(printable, line)) for line in (self.columns, *self.rows)]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(self.columns))]
        out = ["  ".join(self._pad(cell, widths[i], i) for i, cell in enumerate(line)).rstrip() for line in lines]
        out.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.caption] * bool(self.caption) + out)

    def markdown(self) -> str:
        """A GitHub table; ``|`` in a cell is escaped."""
        lines = [[printable(cell).replace("|", "\\|") for cell in line] for line in (self.columns, *self.rows)]
        lines.insert(1, ["--:" if right else ":--" for right in self.right])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """Comma-separated lines, the headings first."""
        return csv_text(self.columns, self.rows)

    def _pad(self, cell: str, width: int, column: int) -> str:
        space = " " * (width - _width(cell))
        return space + cell if self.right[column] else cell + space


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated lines, ``columns`` first. A cell that a spreadsheet would run as a formula begins with an
    apostrophe."""
    text = io.StringIO()
    csv.writer(text).writerows([[_inert(cell) for cell in row] for row in (columns, *rows)])
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def _inert(cell: str) -> str:
    number = re.fullmatch(r"[-+][\d.,]+(e[-+]?\d+)?( .*|%.*)?", cell)
    return f"'{cell}" if cell.startswith(("=", "@", "\t", "\r", "+", "-")) and number is None else cell


def counted(number: int, noun: str) -> str:
    """``1 draw``, ``2 draws``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """``text`` for a terminal: names in other people's files may hold what moves its cursor."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _width(text: str) -> int:
    """Columns that a terminal gives to the text: two for wide East Asian characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
