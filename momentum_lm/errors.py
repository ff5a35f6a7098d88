"""Errors that are the user's to fix, and how command-line programs show them."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


class UserError(ValueError):
    """A problem with the input. The message is one line: what is wrong, in which file or flag, and the remedy."""

    user_error = True  # main_guard, and in fairseq's own commands fairseq_compat, look for this


class CheckpointError(UserError):
    """A checkpoint that cannot be read, trusted or written. The message names the file and the remedy."""


class TornCheckpoint(CheckpointError):
    """One that is missing, cut short or no checkpoint at all, as opposed to one that is refused."""


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a ``main(argv)``: UserError and the like, and OSError, become one line on stderr and exit status 2, Ctrl-C status 130,
    a closed pipe 141, as of a shell's own commands."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None, **kwargs: Any) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
        try:
            status = main(argv, **kwargs) or 0
            sys.stdout.flush()
            return status
        except ValueError as error:
            if not getattr(error, "user_error", False):  # as UserError has
                raise
            return _fail(str(error))
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
