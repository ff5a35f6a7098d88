"""One training at a time writes into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import stat
import time

from momentum_lm.errors import UserError

_log = logging.getLogger(__name__)
NAME = ".training.lock"
PATIENCE = 2.0  # seconds in which a killed process may still be ending
_MARK = b"momentum_lm: training by process "
_held: dict[tuple[int, int], int] = {}  # device and inode -> the file descriptor that has the lock


def hold(folder: str | os.PathLike[str]) -> None:
    """Locks ``folder`` for this process until it ends, however it ends; again, it changes nothing.

    Raises UserError, naming the other process, where another one has the lock. Where there can be none (a file system without locks, a
    folder that cannot be written, a lock file that is a link or another's), a warning is given and training goes on.
    """
    path = os.path.join(os.fspath(folder), NAME)
    try:
        file = _open(path)
    except OSError as error:
        _log.warning("%s cannot be locked (%s): see to it that no other training writes there", path, error.strerror)
        return
    about = os.fstat(file)
    identity = (about.st_dev, about.st_ino)
    if not stat.S_ISREG(about.st_mode) or identity in _held or not _locked(file, folder):
        os.close(file)
        return
    _held[identity] = file
    with contextlib.suppress(OSError):  # opened for reading only
        if os.pread(file, len(_MARK), 0) in (b"", _MARK):  # nobody else's file
            os.ftruncate(file, 0)
            os.pwrite(file, _MARK + f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _open(path: str) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # no link is followed, no pipe waited for
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # another user's can be locked all the same


def _locked(file: int, folder: str | os.PathLike[str]) -> bool:
    """Whether ``file`` is locked now; False where that is not possible here."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        except OSError:
            return False
    text = os.pread(file, 500, 0)
    who = text.removeprefix(_MARK).decode(errors="replace").strip() if text.startswith(_MARK) else "unknown"
    os.close(file)
    raise UserError(
        f"--save-dir {os.fspath(folder)} is in use by another training (process {who}): "
        "wait until it ends, end it, or choose another folder"
    )


def _let_go() -> None:
    """A child, such as a worker that loads data, may live longer than the training, and must not keep its lock."""
    for file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
