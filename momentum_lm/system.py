"""What concerns the processes that this one starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


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
