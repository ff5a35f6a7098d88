"""Errors that are the user's to mend, and how command-line programs show them."""

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


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a ``main(argv)``: UserError and the like, and OSError, become one line on stderr and exit status 2, Ctrl-C status 130,
    a closed pipe 141, as of a shell's own commands."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None, **kwargs: Any) -> int:
        try:
            if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
                sys.stdout.reconfigure(errors="surrogateescape")  # paths are printed as they are, UTF-8 or not
            status = main(argv, **kwargs) or 0
            sys.stdout.flush()
            return status
        except ValueError as error:
            if not getattr(error, "user_error", False):  # as UserError and fairseq_compat.CheckpointError have
                raise
            return _fail(str(error))
        except BrokenPipeError:  # whoever read the output has seen enough, such as head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
            return 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            return _fail(f"{where}{error.strerror or error}; mend that and run the same command again")
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            return 130

    return guarded


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
