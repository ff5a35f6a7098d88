"""Errors that are the user's to fix, naming what the user gave, and how command-line programs show them.

Code that reports a problem with an argument names it by its name in Python::

    raise UserError(arg(dim=190), " is not a multiple of ", arg(heads=3))

From Python ``str(error)`` is ``dim=190 is not a multiple of heads=3``. A front end says what its user typed instead::

    with named(flags(dim="--decoder-embed-dim", heads="--decoder-attention-heads")):
        config = DecoderConfig(...)  # --decoder-embed-dim 190 is not a multiple of --decoder-attention-heads 3

The innermost ``named`` wins. What no ``named`` has named when the error ends a command is a flag of the same name:
``arg(results_dir="out")`` is ``--results-dir out``, and ``arg(force=True)``, as in "or add --force", is ``--force``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

_NO_VALUE: Any = object()
_LONGEST = 80  # characters of a value


class Argument(NamedTuple):
    """An argument of a function, or a field of a configuration, in an error message: by name, or with its value."""

    name: str
    value: Any = _NO_VALUE

    @property
    def has_value(self) -> bool:
        return self.value is not _NO_VALUE


Names = Callable[[Argument], "Argument | str"]  # what a front end calls an argument


def arg(name: str | None = None, /, **given: Any) -> Argument:
    """``arg("dim")`` names an argument, ``arg(dim=190)`` names it with its value."""
    if (name is None) != (len(given) == 1):
        raise TypeError('give one argument: arg("dim") or arg(dim=190)')
    return Argument(name) if name is not None else Argument(*given.popitem())


def in_python(argument: Argument) -> str:
    """``dim=190``, or ``dim`` where there is no value."""
    if not argument.has_value:
        return argument.name
    value = os.fspath(argument.value) if isinstance(argument.value, os.PathLike) else argument.value
    return f"{argument.name}={_short(repr(value), value)}"


def flags(**own: str) -> Names:
    """Names of a command line: ``--dim 190``, or with ``dim="--decoder-embed-dim"`` what that says."""

    def name_of(argument: Argument) -> str:
        flag = own.get(argument.name) or f"--{argument.name.replace('_', '-')}"
        return flag if argument.value is True or not argument.has_value else f"{flag} {as_word(argument.value)}"

    return name_of


def as_word(value: Any) -> str:
    """A value as somebody types it on a command line: lists with commas between, and quotes where it has a space."""
    values = value if isinstance(value, (list, tuple)) else [value]
    text = ",".join(str(one).removesuffix(".0") if isinstance(one, float) else str(one) for one in values)
    return _short(text if text and not any(c.isspace() for c in text) else f'"{text}"', value)


def _short(text: str, value: Any) -> str:
    path = isinstance(value, os.PathLike) or (isinstance(value, str) and os.sep in value)
    longest = 4096 if path else _LONGEST
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


class UserError(ValueError):
    """A problem with the input, in one line: what is wrong, in which file or argument, and the remedy.

    It is made of texts, arguments (see :func:`arg`) and other errors, one after the other.
    """

    user_error = True  # main_guard, and in fairseq's own commands fairseq_compat, look for this

    def __init__(self, *parts: str | Argument | UserError) -> None:
        groups = (part.args if isinstance(part, UserError) else (part,) for part in parts)
        super().__init__(*itertools.chain.from_iterable(groups))

    def __str__(self) -> str:
        return "".join(part if isinstance(part, str) else in_python(part) for part in self.args)

    def rename(self, names: Names) -> None:
        """Names the arguments that no front end has named yet."""
        self.args = tuple(part if isinstance(part, str) else names(part) for part in self.args)

    def line(self) -> str:
        """The message of a command, which calls the arguments that nobody has named flags."""
        self.rename(flags(trust="--trust-checkpoint"))
        return one_line(str(self))


@contextlib.contextmanager
def named(names: Names) -> Iterator[None]:
    """Within it a UserError calls arguments what ``names`` says."""
    try:
        yield
    except UserError as error:
        error.rename(names)
        raise


class CheckpointError(UserError):
    """A checkpoint that cannot be read, trusted or written. The message names the file and the remedy."""


class TornCheckpoint(CheckpointError):
    """One that is missing, cut short or no checkpoint at all, as opposed to one that is refused."""


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a ``main(argv)``: UserError and the like, and OSError, become one line on stderr and exit status 2, Ctrl-C
    status 130, a closed pipe 141, as of a shell's own commands.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None, **kwargs: Any) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
        try:
            status = main(argv, **kwargs) or 0
            sys.stdout.flush()
            return status
        except UserError as error:
            return _fail(error.line())
        except BrokenPipeError:  # whoever read the output has seen enough, such as head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
            return 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            return _fail(f"{where}{error.strerror or error}; fix that and run the same command again")
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130

    return guarded


def _fail(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    """``message`` in one line, without the control characters that names in a stranger's file may have and a terminal
    obeys.
    """
    return "".join("?" if ord(c) < 32 or 127 <= ord(c) < 160 else c for c in " ".join(message.split()))
