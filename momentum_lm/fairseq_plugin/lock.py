"""One training at a time writes into a folder."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket

from momentum_lm.errors import UserError
from momentum_lm.files import LockTaken, sign_lock, take_lock

_log = logging.getLogger(__name__)
NAME = ".training.lock"
PATIENCE = 2.0  # seconds in which a killed process may still be ending
# and in which that of another machine may: 30 until torchrun kills it, 90 until a file server gives up the locks of a
# machine that is dead
PATIENCE_AGAIN = 100.0
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_MARK = b"momentum_lm: training by process "
_signed: dict[str, tuple[int, int]] = {}  # our lock files by their paths
_held: dict[tuple[int, int], int] = {}  # device and inode -> the file descriptor that has the lock


def hold(folder: str | os.PathLike[str]) -> None:
    """Locks ``folder`` for this process until it ends, however it ends; again, it changes nothing.

    Raises UserError, naming the other process, where another one has the lock. Where there can be none (a folder that
    cannot be written, a lock file that is a link, a pipe or another's), a warning is given and training goes on.
    """
    path = os.path.join(os.fspath(folder), NAME)
    try:
        if os.path.exists(path) and _identity(os.stat(path)) in _held:
            return
        file = take_lock(path, _patience())
    except LockTaken as taken:
        text = taken.content
        who = text.removeprefix(_MARK).decode(errors="replace").strip() if text.startswith(_MARK) else "unknown"
        raise UserError(
            f"--save-dir {os.fspath(folder)} is in use by another training (process {who}): "
            "wait until it ends, end it, or choose another folder"
        ) from None
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or error
        _log.warning("%s cannot be locked (%s): see to it that no other training writes there", path, why)
        return
    _held[_identity(os.fstat(file))] = file
    if os.pread(file, len(_MARK), 0) in (b"", _MARK):  # nobody else's file
        _signed[os.path.abspath(path)] = _identity(os.fstat(file))
        sign_lock(file, f"{_MARK.decode()}{os.getpid()} on {socket.gethostname()}\n")


def _patience() -> float:
    again = any(os.environ.get(name, "") not in ("", "0") for name in _RESTARTS)
    return PATIENCE_AGAIN if again else PATIENCE


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _let_go() -> None:
    """A child, such as a worker that loads data, may live longer than the training, and must not keep its lock."""
    _signed.clear()
    for file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


def _remove() -> None:
    """What a training leaves where it ends by itself: nothing. (Killed, it leaves a file that nobody has locked.)"""
    for path, identity in _signed.items():
        with contextlib.suppress(OSError):
            if identity in _held and _identity(os.lstat(path)) == identity:
                os.unlink(path)
    _let_go()


atexit.register(_remove)
os.register_at_fork(after_in_child=_let_go)
