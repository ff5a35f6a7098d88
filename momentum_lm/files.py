"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from momentum_lm.errors import UserError

NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what numpy.load raises for a damaged .npz


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError the name ``path`` where it has none, as that of a full disk, or that of a temporary file beside it."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None or (isinstance(name, str) and os.path.basename(name).startswith(f".{Path(path).name}.")):
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path``; on success it is fsynced and renamed to ``path``, on error it is removed.

    Raises OSError, naming ``path``, as ``open`` does. ``path`` keeps its old content until the new one is whole on disk.
    Text is UTF-8; a path's bytes that are none are written as ``\\udcXX``, which JSON reads as they were.
    """
    path = Path(path)
    with naming(path):
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.fchmod(fd, 0o666 & ~_umask())  # mkstemp gives 0600, ordinary files follow the umask
            encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
            with os.fdopen(fd, mode, encoding=encoding, errors=errors) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def check_writable(folder: str | os.PathLike[str], flag: str) -> None:
    """Raises UserError, naming ``flag``, unless files can be made in ``folder``, or it in the nearest folder above. Leaves nothing."""
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError as error:
        problem = "the name is not UTF-8, which TensorBoard cannot write to; choose another"
        raise UserError(f"{flag} {os.fspath(folder)}: {problem}") from error
    try:
        there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag} {os.fspath(folder)} cannot be written: {error.strerror or error}; choose another folder") from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other programs that ask for the same out of ``folder`` meanwhile; the lock ends with this process, however it ends.

    Raises UserError if another one has it: perhaps a worker that outlived its killed launcher.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is being written by process {file.read().strip()}; wait until it ends, or end it") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN is refused (ValueError): JSON has none."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def file_sha256(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of the files' contents one after another, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
