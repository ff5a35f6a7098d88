"""Marks of the files that this package writes into a results folder, so that no other file is overwritten."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from momentum_lm.errors import UserError, arg
from momentum_lm.files import check_ordinary, file_stem, reading

PAGE = b'<meta name="generator" content="momentum_lm">'
PICTURE = b"momentum_lm"  # in a PNG's text
ARRAYS = b"fingerprint.npy"  # the first array of a .npz
EVENTS = ".momentum_lm"  # how the names of TensorBoard's event files end
_HEAD = 4096  # bytes in which the mark is
_CUT = 64  # a file that is shorter may be what a full disk left of ours


def check_ours(path: str | os.PathLike[str], mark: bytes) -> None:
    """Raises UserError for a file that lacks the ``mark`` of ours, or is no ordinary one. It may be absent, or
    empty."""
    check_ordinary(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), reading(path) as file:
        head = file.read(_HEAD)
        cut = mark == ARRAYS and len(head) < _CUT and head.startswith(b"PK")
        if head and mark not in head and not cut:
            raise UserError(
                f"{os.fspath(path)} is there and was not written by fairseq-eval; move it away, choose another ",
                arg("folder"),
                ", or add ",
                arg(force=True),
                " to replace it",
            )


def check_pictures(folder: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raises UserError for a picture in ``folder`` that a report of the data sets or splits ``names`` would have to
    replace, and that is not ours: "accuracy-NAME.png", "layers-NAME-4shot.png" and the like.
    """
    stems = "|".join(re.escape(file_stem(name)) for name in names)
    for path in sorted(Path(folder).glob("*.png")):
        if re.fullmatch(rf"[a-z]+(-paper)?-({stems})(-\d+shot)?\.png", path.name):
            check_ours(path, PICTURE)
