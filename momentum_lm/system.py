"""The processes that this one starts, and its progress bars."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def isolated_children() -> Iterator[None]:
    """Python processes started meanwhile do not import from the current folder, which may hold somebody else's files.

    ``multiprocessing`` starts its workers, and the processes that look after them, as ``python -c ...``, where the
    current folder would be the first place to import from. What this process can import, they can: they get its
    ``sys.path``.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of tqdm on stderr: on a terminal at once and twice a second; in a log file, where each change is text that
    stays, every ten seconds.
    """
    from tqdm import tqdm

    pace = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, file=sys.stderr, **{"mininterval": pace, "maxinterval": pace} | options)
