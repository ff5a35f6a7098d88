"""Where documents come from: text files and folders, CSV, JSON Lines, parquet, compressed ones, and data sets of the
Hugging Face hub.

A source yields documents as UTF-8 bytes, one at a time and always in the same order. No reader holds more than one
document of at most MAX_DOCUMENT bytes and what :mod:`momentum_lm.text.tables` says. Problems are UserErrors that name
file and line or byte.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from momentum_lm.errors import UserError, arg
from momentum_lm.files import check_readable
from momentum_lm.text.compression import MAX_WINDOW, WindowError, ZstdError, open_decompressed
from momentum_lm.text.lines import MAX_LINE, decode, lines_of, refuse_nuls
from momentum_lm.text.tables import Rows, parquet_rows, text_rows
from momentum_lm.untrusted import Record, legible

MAX_DOCUMENT = MAX_LINE  # bytes; a document is held and tokenised whole
TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = (".gz", ".zst")
REMARKS = ("nulls", "quoted")


class Interrupted(UserError):
    """A problem from outside that leaves the work so far usable: the same command goes on."""


class Source:
    """One file or data set. ``size`` is its bytes on disk (None where unknown), ``position()`` how many of them are
    read.

    ``remarks`` counts what ``documents()`` met: ``nulls`` are rows without text, which it leaves out, ``quoted`` texts
    of a .tsv file that look as if they were quoted for CSV, which it takes as they are.
    """

    name: str
    column: str
    size: int | None = None
    tabs = False  # whether it is a .tsv file

    def __init__(self) -> None:
        self.remarks = dict.fromkeys(REMARKS, 0)

    def documents(self) -> Iterator[bytes]:
        """Documents as UTF-8, in order. Raises UserError where the input is not what it should be."""
        raise NotImplementedError

    def position(self) -> int:
        """Bytes of the input read so far, for the progress bar; 0 where that is not known."""
        return 0

    def _texts(self, rows: Rows) -> Iterator[bytes]:
        """What the rows have in the column; rows without are counted."""
        for where, row in rows:
            value = _look_up(row, self.column, where)
            if value is None:
                self.remarks["nulls"] += 1
            else:
                text = _text(value, where, self.column)
                self.remarks["quoted"] += (
                    self.tabs and b'""' in text and len(text) > 3 and text[:1] == text[-1:] == b'"'
                )
                yield text

    def as_of(self) -> str:
        """Size and times of the file: while they are the same, so is the content, but not the other way round."""
        raise NotImplementedError


def find_sources(
    names: list[str],
    column: str,
    document: str | None,
    exclude: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Source]:
    """The sources behind file, folder and data set names, in that order; a folder's text files sorted by path.

    ``document`` says what a document is: ``file``, ``line``, ``blank-line`` (runs of lines between blank ones) or
    ``record`` (a row of a table); None is ``file`` for text, ``record`` for tables. Files under ``exclude`` (the
    output) are left out. Linked folders inside of a folder are read as well, each once. ``say`` gets a line for what is
    reached twice, and for tables in a folder, which are not read. Raises UserError for names that are nothing, empty
    files and folders, for what is neither file nor folder, such as a named pipe, and for a ``document`` that does not
    go with a file.
    """
    sources: list[Source] = []
    folders = _Folders(exclude)
    for name in names:
        path = Path(name).expanduser()
        if name.startswith("hf:") or not path.exists():
            if _looks_like_file(name):
                raise UserError(f"{name}: no such file or folder; check the path")
            sources.append(HubSource(name, column, document))
        elif path.is_dir():
            found = folders.text_files(path)
            if not found:
                raise UserError(
                    f"{name}: no {' or '.join(TEXT_SUFFIXES)} files in this folder; name the files that you mean"
                )
            sources += [FileSource(file, column, document) for file in found]
        else:
            source = FileSource(path, column, document)
            if source.size == 0:
                raise UserError(f"{name} is empty; leave it out")
            sources.append(source)
    _say_some([*folders.remarks, *_reached_twice(sources)], say)
    return sources


class FileSource(Source):
    """A file, whose format its suffix tells: .csv .tsv .jsonl .ndjson .json .parquet, else plain text; .gz and .zst on
    top of these.
    """

    def __init__(self, path: Path, column: str, document: str | None) -> None:
        super().__init__()
        self.path, self.name, self.column = path, str(path), column
        self.status = _status_of_file(path)
        self.size: int = self.status.st_size
        self.suffix = (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()
        self.tabs = self.suffix == ".tsv"
        is_table = self.suffix in TABLE_SUFFIXES
        self.document = document or ("record" if is_table else "file")
        if is_table != (self.document == "record"):
            other = "record" if is_table else "file, line or blank-line"
            raise UserError(
                arg(document=self.document),
                f" does not go with {self.name}; use ",
                arg("document"),
                f" {other} or leave it out",
            )
        if self.suffix == ".parquet" and path.suffix in _COMPRESSED:
            raise UserError(f"{self.name}: parquet is compressed inside; decompress the file first")
        self._raw: BinaryIO | None = None
        self._done = 0

    def position(self) -> int:
        return self._raw.tell() if self._raw else self._done

    def as_of(self) -> str:
        return f"{self.name} {self.size} {self.status.st_mtime_ns} {self.status.st_ctime_ns}"

    def documents(self) -> Iterator[bytes]:
        self.remarks = dict.fromkeys(REMARKS, 0)
        if self.suffix == ".parquet":
            yield from self._texts(parquet_rows(self.path, self._needed, self._progress))
            self._done = self.size
            return
        with open(self.path, "rb") as raw:
            self._raw = raw
            try:
                file = open_decompressed(raw, self.path.suffix)
                if self.suffix in TABLE_SUFFIXES:
                    yield from self._texts(text_rows(file, self.name, self.suffix, self._needed))
                elif self.document == "file":
                    yield from _read_whole(file, self.name)
                else:
                    yield from _read_text(file, self.name, blank_lines=self.document == "blank-line")
            except EOFError as error:
                raise UserError(
                    f"{self.name} is cut short: its compressed data ends too early; fetch it again"
                ) from error
            except WindowError as error:
                raise UserError(
                    f"{self.name}: reading it takes a window of {error.size >> 20:,} MiB, more than the "
                    f"{MAX_WINDOW >> 20} MiB that are allowed; decompress it first, as with `zstd -d --long=31`"
                ) from error
            except (gzip.BadGzipFile, zlib.error, ZstdError) as error:
                raise UserError(
                    f"{self.name} is damaged or not a {self.path.suffix} file ({error}); fetch it again"
                ) from error
            finally:
                self._raw, self._done = None, self.size

    def _needed(self, names: Collection[str]) -> list[str]:
        """Which of a header's columns holds the texts. Raises UserError where it is not there."""
        column = self.column if self.column in names else self.column.split(".")[0]
        if column not in names:
            raise _no_column(self.name, self.column, list(names))
        return [column]

    def _progress(self, share: float) -> None:
        self._done = int(self.size * share)


class HubSource(Source):
    """``hf:NAME[:CONFIG][@SPLIT]``: a data set that ``datasets`` loads from the hub or a local folder, streamed. SPLIT:
    train.
    """

    def __init__(self, name: str, column: str, document: str | None) -> None:
        if document not in (None, "record"):
            raise UserError(arg(document=document), f" does not go with the data set {name}: its documents are records")
        super().__init__()
        self.name, self.column = name, column
        path, _, split = name.removeprefix("hf:").partition("@")
        self.path, _, config = path.partition(":")
        self.config, self.split = config or None, split or "train"

    def as_of(self) -> str:
        return self.name

    def documents(self) -> Iterator[bytes]:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{self.name} is no file here, and loading a data set by name needs: pip install datasets"
            ) from error
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # without a network it tells of every retry
        self.remarks = dict.fromkeys(REMARKS, 0)
        number = 0

        def rows() -> Rows:
            nonlocal number
            for row in datasets.load_dataset(self.path, self.config, split=self.split, streaming=True):
                number += 1
                yield f"{self.name}: record {number}", row

        try:
            yield from self._texts(rows())
        except UserError:
            raise
        except Exception as error:  # whatever datasets, huggingface_hub and the network library under them raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            where = f"stopped after record {number}" if number else "could not be loaded"
            raise Interrupted(
                f"{self.name} is no file here, and as a data set it {where} ({reason}). With a network: check "
                "NAME[:CONFIG][@SPLIT]. "
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


def _status_of_file(path: Path) -> os.stat_result:
    """Raises UserError for what is no ordinary file: it would be read for ever, or only once."""
    try:
        return check_readable(path)
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
        raise UserError(f"{problem}; fix or remove it, or name the files that you mean") from error


class _Folders:
    """Finds text files in folders. Linked folders inside are entered after the others, each once, by its first name."""

    def __init__(self, exclude: Path | None) -> None:
        self._exclude = exclude
        self.remarks: list[str] = []

    def text_files(self, folder: Path) -> list[Path]:
        """Sorted by path. Raises OSError for a folder that cannot be read."""
        top = Path(os.path.realpath(folder))
        entered: dict[Path, Path] = {}  # real path: the name that it was entered by
        files, tables, waiting = [], [], [folder]
        links: deque[Path] = deque()
        while waiting or links:
            where = waiting.pop() if waiting else links.popleft()
            real = Path(os.path.realpath(where))
            if real in top.parents:
                self.remarks.append(f"{where} leads to {real}, which holds {folder} itself: it is not entered")
            elif real in entered:
                self.remarks.append(f"{where} is the same folder as {entered[real]}: it is read once")
            else:
                entered[real] = where
                for path in (Path(where, name) for name in sorted(os.listdir(where)) if not name.startswith(".")):
                    if path.is_dir():
                        if path.resolve() != self._exclude:
                            (links if path.is_symlink() else waiting).append(path)
                    elif _has_suffix(path, TEXT_SUFFIXES):
                        files.append(path)
                    elif _has_suffix(path, TABLE_SUFFIXES):
                        tables.append(path)
        if tables:
            some = f"{len(tables)} tables, such as {min(tables)}" if len(tables) > 1 else f"the table {tables[0]}"
            how = "of a folder, texts alone are read; name tables to have them read"
            self.remarks.append(f"{folder} also holds {some}: {how}")
        return sorted(files, key=os.fspath)


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(suffixes)


def _reached_twice(sources: list[Source]) -> Iterator[str]:
    first: dict[tuple[int, int], Source] = {}
    for source in sources:
        if isinstance(source, FileSource):
            before = first.setdefault((source.status.st_dev, source.status.st_ino), source)
            if before is not source:
                yield f"{source.name} is the same file as {before.name}: what it holds counts as duplicates"


def _say_some(remarks: list[str], say: Callable[[str], None], most: int = 5) -> None:
    for remark in remarks[:most]:
        say(f"note: {remark}")
    if len(remarks) > most:
        say(f"note: and {len(remarks) - most:,} more of this kind")


def _read_whole(file: BinaryIO, name: str) -> Iterator[bytes]:
    text = file.read(MAX_DOCUMENT + 1)
    if len(text) > MAX_DOCUMENT:
        raise UserError(
            f"{name} is a document of more than {MAX_DOCUMENT >> 20} MiB; say how its documents are separated: ",
            arg(document="line"),
            " or ",
            arg(document="blank-line"),
        )
    decode(text, name, 0)
    yield text.removeprefix(b"\xef\xbb\xbf")


def _read_text(file: BinaryIO, name: str, blank_lines: bool) -> Iterator[bytes]:
    lines = (line.encode() for line in lines_of(file, name))
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
                raise UserError(
                    f"{name}:{number}: more than {MAX_DOCUMENT >> 20} MiB without a blank line; use ",
                    arg(document="line"),
                )
        elif block:
            yield b"".join(block).rstrip(b"\r\n")
            block, size = [], 0


def _look_up(record: dict[str, Any], column: str, where: str) -> Any:
    """What a record has in a column; "a.b" is b inside of a, "a.0" the first of a list, if no column is called that.

    Raises UserError where there is no such column, or one twice.
    """
    value: Any = record
    for key in [column] if column in record else column.split("."):
        if isinstance(value, Record) and key in value.repeated:
            raise UserError(f"{where}: {key!r} is there more than once; fix or remove the line")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(value):
            value = value[int(key[:9])]
        elif value is None:  # a row without what the column is inside of
            return None
        else:
            raise _no_column(where, column, list(record))
    return value


def _text(value: object, where: str, column: str) -> bytes:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text; name another with ",
            arg("column"),
        )
    try:
        return _checked(value.encode(), where)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair at character {error.start} is not text; fix or remove it"
        ) from error


def _checked(text: bytes, where: str) -> bytes:
    if len(text) > MAX_DOCUMENT:
        raise UserError(
            f"{where}: a document of {len(text) / 2**20:.1f} MiB; the most is {MAX_DOCUMENT >> 20} MiB: split or "
            "remove it"
        )
    refuse_nuls(text, where)
    return text


def _no_column(where: str, column: str, columns: list[str]) -> UserError:
    there = ", ".join(legible(name, 60) for name in columns[:20]) + (", ..." if len(columns) > 20 else "") or "none"
    return UserError(f"{where}: no column {column!r}; there are: {there}; name one with ", arg("column"))
