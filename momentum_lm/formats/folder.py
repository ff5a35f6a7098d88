"""A folder that is either whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from momentum_lm.errors import UserError, arg
from momentum_lm.files import locked, naming

# all that a conversion writes
_OURS = re.compile(
    r"model\.pt|dict\.txt|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_|tokenizer_)?config\.json|tokenizer\.json"
    r"|sentencepiece\.model|encoder\.json|vocab\.bpe|(configuration|modeling)_momentum_lm\.py"
    r"|own_filters\.py"
)


@contextlib.contextmanager
def whole_folder(output: Path, force: bool) -> Iterator[Path]:
    """A folder beside ``output`` to write into; on success it takes the place of ``output``, on error it is removed.

    However the process ends, ``output`` is the old folder or the new one, or it is away for a moment between two
    renamings; then the next call puts the old one back. Raises UserError if ``output`` is there without ``force`` (with
    it, if it holds anything that a conversion does not write), or if another process is writing it.
    """
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} does not exist; make that folder first, or choose another OUTPUT")
    partial, old = (output.with_name(f".{output.name}.{word}") for word in ("partial", "old"))
    for path in (partial, old):  # what is left of a killed process is taken away, and nothing else
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or _foreign(path, {".lock"})):
            what = "where a conversion keeps what is not finished, and is not from one"
            raise UserError(f"{path} is {what}; move it away")
    with naming(output), locked(partial):
        try:
            if old.exists() and not output.exists():  # a process was killed between the two renamings below
                os.rename(old, output)
            _check(output, force)
            for path in (
                old,
                *(path for path in partial.iterdir() if path.name != ".lock"),
            ):  # of one that was killed elsewhere
                _remove(path)
            yield partial
            (partial / ".lock").unlink()
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            if output.exists():
                os.rename(output, old)
            os.rename(partial, output)
            _sync(output.parent)
            _remove(old)
        except BaseException:
            if old.exists() and not output.exists():
                os.rename(old, output)
            _remove(partial)
            raise


def _check(output: Path, force: bool) -> None:
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise UserError(
            f"{output} is {'a link' if output.is_symlink() else 'not a folder'}; OUTPUT is the folder to make"
        )
    foreign = _foreign(output)
    if foreign:
        raise UserError(f"{output} holds {foreign[0]}, which a conversion does not write; choose another OUTPUT")
    if any(output.iterdir()) and not force:
        raise UserError(f"{output} is there already; choose another OUTPUT, or add ", arg(force=True))


def _foreign(folder: Path, others: Set[str] = frozenset()) -> list[str]:
    """Names in a folder, sorted, that no conversion wrote: other ones than its own and ``others``, and what is no
    ordinary file."""
    ordinary = {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
    ours = {name for name in ordinary if _OURS.fullmatch(name) or name in others}
    return sorted(set(os.listdir(folder)) - ours)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
