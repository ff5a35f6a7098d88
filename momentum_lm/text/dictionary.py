"""fairseq's ``dict.txt``: which symbol has which id."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence

from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write, reading

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 in every fairseq dictionary; dict.txt does not list them
BOS, PAD, EOS, UNK = range(4)
DIGEST = "dictionary_sha256"  # the key in a checkpoint's task_state
_OVERWRITE = "#fairseq:overwrite"
_DIGITS = 18  # of a count: 64 bits hold it
_MOST_BYTES = 1 << 28  # of a dict.txt; one of a million words has about 15 MB
_MOST_SYMBOLS = 1 << 22


def symbols_digest(symbols: Sequence[str]) -> str:
    """SHA-256 of the symbols in the order of their ids, specials included: what a model's weights belong to. Counts do
    not matter.
    """
    return hashlib.sha256("\n".join(symbols).encode("utf-8", "surrogatepass")).hexdigest()


def check_symbols(symbols: Sequence[str], recorded: object, whose: str, checkpoint: str = "the checkpoint") -> None:
    """Raises UserError if a checkpoint has ``recorded`` (in its ``task_state``, as ``DIGEST``) that it was trained with
    other symbols.

    ``whose``: where the symbols come from, for the message. None is recorded by checkpoints of earlier versions and of
    other tasks.
    """
    if recorded is not None and recorded != symbols_digest(symbols):
        raise UserError(
            f"{whose} is not the one that {checkpoint} was trained with: its symbols, or their order, are others; "
            "use data made with the model's own dictionary"
        )


class Dictionary:
    """Symbols in the order of their ids, and how often each was counted. A symbol listed twice has two ids; ``index``
    gives the later.

    >>> Dictionary(["the", "a"]).index("the")
    4
    """

    def __init__(self, symbols: Iterable[str] = (), counts: Iterable[int] | None = None) -> None:
        self.symbols = [*SPECIALS, *symbols]
        self.counts = [1] * len(SPECIALS) + (
            [1] * (len(self.symbols) - len(SPECIALS)) if counts is None else list(counts)
        )
        if len(self.counts) != len(self.symbols):
            raise ValueError(f"{len(self.symbols)} symbols, {len(self.counts)} counts")
        self._index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: str) -> bool:
        return symbol in self._index

    def index(self, symbol: str) -> int:
        """The id of ``symbol``, or that of ``<unk>``."""
        return self._index.get(symbol, UNK)

    def padded(self, multiple: int = 8) -> Dictionary:
        """Filled with ``madeupword0000`` and so on up to a multiple of 8 entries, as fairseq-preprocess does: such
        matrices are faster.
        """
        extra = -len(self) % multiple
        filler = [f"madeupword{i:04d}" for i in range(extra)]
        return Dictionary(self.symbols[len(SPECIALS) :] + filler, self.counts[len(SPECIALS) :] + [0] * extra)

    def with_counts(self, counts: Sequence[int]) -> Dictionary:
        """The same symbols; ``counts[i]`` is how often id ``i`` occurred, specials included."""
        return Dictionary(self.symbols[len(SPECIALS) :], [int(n) for n in counts[len(SPECIALS) : len(self)]])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``dict.txt``. Raises ValueError for a symbol that the format cannot hold (empty, or with a line
        break).
        """
        first = len(SPECIALS)
        seen: set[str] = set(SPECIALS)
        with atomic_write(path) as file:
            for symbol, count in zip(self.symbols[first:], self.counts[first:], strict=True):
                if not symbol or "\n" in symbol or "\r" in symbol:
                    raise ValueError(f"{symbol!r} cannot stand in {path}: it is empty or holds a line break")
                file.write(f"{symbol} {count}{' ' + _OVERWRITE if symbol in seen else ''}\n")
                seen.add(symbol)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dictionary:
        """Reads ``dict.txt``. Raises UserError naming file and line where it is missing, malformed or lists a symbol
        twice unmarked.
        """
        symbols: list[str] = []
        counts: list[int] = []
        seen = set(SPECIALS)
        for number, line in enumerate(_lines(path), start=1):
            symbol, _, field = line.rstrip().rpartition(" ")
            overwrite = field == _OVERWRITE
            if overwrite:
                symbol, _, field = symbol.rpartition(" ")
            if not symbol or not field.isdecimal() or len(field) > _DIGITS:
                raise UserError(
                    f"{path}:{number}: expected '<symbol> <count>', got {line.rstrip()[:80]!r}; is this a fairseq "
                    "dict.txt?"
                )
            if symbol in seen and not overwrite:
                raise UserError(
                    f"{path}:{number}: {symbol[:80]!r} is listed before; "
                    f"add '{_OVERWRITE}' to the line if that is meant"
                )
            seen.add(symbol)
            symbols.append(symbol)
            counts.append(int(field))
        return cls(symbols, counts)


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of a ``dict.txt``. Raises UserError where they cannot be read, or are more than any dictionary's."""
    try:
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise UserError(f"{path} has {size:,} bytes, far more than a dictionary; is this a fairseq dict.txt?")
            for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8")):
                if number == _MOST_SYMBOLS:
                    raise UserError(
                        f"{path} has more than {_MOST_SYMBOLS:,} lines, far more than a dictionary; "
                        "is this a fairseq dict.txt?"
                    )
                yield line
    except OSError as error:
        raise UserError(f"cannot read the dictionary {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a dictionary: byte {_first_odd_byte(path)} is not UTF-8") from error


def _first_odd_byte(path: str | os.PathLike[str]) -> int:
    """Where a file stops being UTF-8. (Reading by lines tells only where in a piece of it.)"""
    with open(path, "rb") as file:
        data = file.read()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return len(data)
