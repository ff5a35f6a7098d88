"""The processes that this one starts, and its progress bars."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .errors import UserError, arg


def import_user_dir(folder: str | os.PathLike[str]) -> None:
    """Imports a folder of Python code as a package of its name, as fairseq's ``--user-dir`` does: what it registers,
    such as a filter of one's own, is known then.

    Raises UserError for what is no such folder, and what its import raises.
    """
    parent, name = os.path.split(os.path.abspath(folder))
    if not os.path.isfile(os.path.join(parent, name, "__init__.py")):
        raise UserError(arg(user_dir=folder), ": must be a folder with an __init__.py")
    before = sys.modules.get(name)
    where = getattr(before, "__file__", None) or ""
    if before is not None and os.path.dirname(os.path.abspath(where)) != os.path.join(parent, name):
        raise UserError(arg(user_dir=folder), f": there is another module called {name}; give the folder another name")
    sys.path.insert(0, parent)
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(parent)


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
