"""Files that are either whole or not there, and that are what they should be: ordinary, ours, unchanged while they are
read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from momentum_lm.errors import Argument, CheckpointError, UserError

if TYPE_CHECKING:
    import numpy as np

# what numpy.load raises for a damaged .npz
NPZ_ERRORS = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, IndexError, OverflowError, MemoryError, RuntimeError),
    *(SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)  # fmt: skip
JSON_BYTES = 256 << 20  # more than any file of ours takes
_NPZ_BYTES = 4 << 30  # of a file's arrays, unpacked
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError the name ``path`` where it has none, as that of a full disk, or that of a temporary file beside
    it.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None or (isinstance(name, str) and os.path.basename(name).startswith(_temporary(Path(path).name))):
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path``; on success it is fsynced and renamed to ``path``, on error it is removed.

    Raises OSError, naming ``path``, as ``open`` does, and UserError where something else than an ordinary file is
    there. ``path`` keeps its old content until the new one is whole on disk. Text is UTF-8; a path's bytes that are
    none are written as ``\\udcXX``, which JSON reads as they were.
    """
    path = Path(path)
    with naming(path):
        check_ordinary(path)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=_temporary(path.name))
        try:
            os.fchmod(fd, 0o666 & ~_umask())  # mkstemp gives 0600, ordinary files follow the umask
            encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
            with os.fdopen(fd, mode, encoding=encoding, errors=errors) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_ordinary(path)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def replace_file(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a checkpoint, which may fill the disk: ``path`` is the old file until the new one is whole on disk.

    The temporary file is ``path.tmp``, of which a killed process leaves one and not many; it is never read, nor written
    into. Raises CheckpointError where it cannot be written.
    """
    temporary = path + ".tmp"
    if os.path.lexists(temporary):
        os.unlink(temporary)  # it may be another name of a checkpoint
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        # On a full disk torch's writer says "unexpected pos" while it handles the OSError that tells why.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            message = f"cannot write checkpoint {path}: {reason}; what was there before is untouched"
            raise CheckpointError(message) from error
        raise


def rename_durably(temporary: str, path: str) -> None:
    """In one step, and so that a power cut does not undo it."""
    os.replace(temporary, path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(directory)


@contextlib.contextmanager
def appending(path: str | os.PathLike[str], sync: bool = False) -> Iterator[IO[str]]:
    """Opens a file to add lines to; with ``sync`` they are on disk afterwards. Raises OSError naming ``path``, and
    UserError for what is no ordinary file."""
    path = Path(path)
    with (
        naming(path),
        os.fdopen(open_ordinary(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8") as file,
    ):
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


def check_ordinary(path: str | os.PathLike[str]) -> None:
    """Raises UserError where ``path`` is a link, a device, a pipe or a socket, IsADirectoryError where it is a folder.
    It may be absent."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", os.fspath(path))
        if not stat.S_ISREG(mode):
            raise UserError(
                f"{os.fspath(path)} is {kind(mode)}, and only an ordinary file is replaced; name another file, or "
                f"remove it"
            )


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises UserError where ``path`` is there and no real folder: a link, say, through which somebody else's files
    would be written."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISDIR(mode):
            raise UserError(
                f"{os.fspath(path)} is {kind(mode)}, where a folder is to be; move it, or choose another folder"
            )


def kind(mode: int) -> str:
    """``a device``, ``a symbolic link`` and so on, of the mode that ``stat`` gives."""
    return next((name for test, name in _KINDS if test(mode)), "an ordinary file")


def check_readable(path: str | os.PathLike[str]) -> os.stat_result:
    """What ``stat`` gives. Raises UserError for a link to nothing, a folder, and a device or a pipe, reading which
    might take for ever; OSError where there is nothing.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{os.fspath(path)} is a link to {os.readlink(path)}, where there is nothing; fix the link")
    status = os.stat(path)
    _refuse(path, status.st_mode)
    return status


def refuse_pipes(*paths: str | os.PathLike[str]) -> None:
    """Raises UserError for what is there and neither file nor folder."""
    for path in paths:
        if os.path.exists(path) and not os.path.isdir(path):
            check_readable(path)


def open_ordinary(path: str | os.PathLike[str], flags: int, follow: bool = False) -> int:
    """A descriptor of an ordinary file, or with ``follow`` of what a link leads to. Raises OSError as ``open`` does,
    and UserError for a device or a pipe, at once and without a change to it.
    """
    if not follow:
        check_ordinary(path)
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a directory", os.fspath(path))
        _refuse(path, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UserError(f"{os.fspath(path)} is {kind(mode)}, not a file; name an ordinary file")


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens an ordinary file, or a link to one, for reading. Raises OSError as ``open`` does, and UserError for a pipe
    or a device, at which ``open`` would wait or never end."""
    with os.fdopen(open_ordinary(path, os.O_RDONLY, follow=True), "rb") as file:
        yield file


def read_bytes(path: str | os.PathLike[str], most: int = JSON_BYTES) -> bytes:
    """A file's content. Raises OSError, and UserError for one that is larger than ``most`` bytes or no ordinary
    file."""
    with reading(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(
            f"{os.fspath(path)} is larger than the {most >> 20} MB that such a file may have; is it the right one?"
        )
    return content


def read_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a ``.npz``, without pickled objects. Raises one of NPZ_ERRORS for a damaged one, and for one whose
    arrays are larger than its names promise or than any of ours."""
    import numpy as np

    with reading(path) as file:
        with zipfile.ZipFile(file) as archive:
            sizes = [info.file_size for info in archive.infolist()]
        if len(sizes) > 1000 or sum(sizes) > _NPZ_BYTES:
            raise ValueError(f"{len(sizes)} arrays of {sum(sizes):,} bytes")
        for name, size in zip(archive.namelist(), sizes, strict=True):
            _check_header(file, name, size)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def _check_header(file: IO[bytes], name: str, size: int) -> None:
    """Raises ValueError for an array whose header promises another size than it has: NumPy would take the memory
    first."""
    import numpy as np

    with zipfile.ZipFile(file) as archive, archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        count = 1
        for length in shape:
            count *= int(length)
        if dtype.hasobject or count * dtype.itemsize + member.tell() != size:
            raise ValueError(f"array {name} is not what its header says")


def check_writable(folder: str | os.PathLike[str], name: str) -> None:
    """Raises UserError, calling ``folder`` the argument ``name``, unless files can be made in it, or it in the nearest
    folder above. Leaves nothing.
    """
    given = Argument(name, Path(os.fspath(folder)))
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError as error:
        raise UserError(given, ": the name is not UTF-8, which TensorBoard cannot write to; choose another") from error
    try:
        there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(given, f" cannot be written: {error.strerror or error}; choose another folder") from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other programs that ask for the same out of ``folder`` meanwhile; the lock ends with this process, however
    it ends.

    Take it first and read the folder then: what was read before may be another program's past. Folders that it had to
    make are removed again if nothing was put into them. Raises UserError if another process has it, perhaps a worker
    that outlived its killed launcher, and where ``.lock`` is not a file that this function wrote.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _locked_file(folder):
            yield
    finally:
        for new in made:
            with contextlib.suppress(OSError):  # in use
                new.rmdir()


@contextlib.contextmanager
def _locked_file(folder: Path) -> Iterator[None]:
    path = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = take_lock(path)
            break
        except FileNotFoundError:  # another process has just removed the empty folder
            continue
        except LockTaken as taken:
            _check_lock(path, taken.content)
            who = taken.content.decode().strip()
            raise UserError(f"{folder} is being written by process {who}; wait until it ends, or end it") from None
    with os.fdopen(descriptor):
        _check_lock(path, os.pread(descriptor, 500, 0))
        sign_lock(descriptor, str(os.getpid()))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if _same_file(descriptor, path):  # it may have gone with its folder
                    path.unlink()


def _check_lock(path: Path, content: bytes) -> None:
    if not re.fullmatch(rb"\d*\s*", content):
        raise UserError(f"{path} is not a lock of ours; move it, or choose another folder")


class LockTaken(Exception):
    """Another process has the lock. ``content``: what it has written into its file."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content


def take_lock(path: str | os.PathLike[str], patience: float = 0) -> int:
    """A descriptor of the file ``path``, made if need be and left as it is, which nobody else has locked until this
    process closes it or ends. (On a file system without locks, others may have it too.)

    Raises LockTaken where another process keeps it for ``patience`` seconds more, UserError for what is no ordinary
    file, and OSError as ``open`` does.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            descriptor = open_ordinary(path, os.O_RDWR | os.O_CREAT)
        except PermissionError as error:
            try:
                descriptor = open_ordinary(path, os.O_RDONLY)  # another user's can be locked all the same
            except FileNotFoundError:  # nor made; whoever asks takes "not found" for a folder that has just gone
                raise error from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = os.pread(descriptor, 500, 0)
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise LockTaken(content) from None
            time.sleep(0.1)
            continue
        except OSError:  # a file system without locks
            pass
        if _same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # of a process that has removed it meanwhile


def sign_lock(descriptor: int, text: str) -> None:
    """Writes into a lock's file who has it, if this user may."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


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


class Unchanged:
    """Files as they are now: which file each name means, its size and time. Weights are read through the files' own
    memory pages, so a file that is replaced or rewritten meanwhile would give numbers of two models."""

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._seen = {Path(path): _state(path) for path in paths}

    def check(self) -> None:
        """Raises UserError, naming the file, where one is no longer what it was."""
        for path, before in self._seen.items():
            now = _state(path)
            if now != before:
                replaced = before is None or (now and now[:2] != before[:2])
                what = "is gone" if now is None else "was replaced" if replaced else "was changed"
                raise UserError(
                    f"{path} {what} while it was read, so its weights may be of two models; run the same command again"
                )


def file_stem(name: str) -> str:
    """``name`` as part of a file's name: itself where it is plain and short, else with ``_`` for what a file's name
    cannot hold and a digest that keeps it apart from others."""
    safe = re.sub(r"[\x00-\x1f\x7f/\\]|^\.+", "_", name)
    encoded = safe.encode("utf-8", "replace")
    if safe == name and name and len(encoded) <= 150:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{encoded[:120].decode('utf-8', 'ignore')}-{digest}"


def _state(path: str | os.PathLike[str]) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _same_file(descriptor: int, path: str | os.PathLike[str]) -> bool:
    mine, named = os.fstat(descriptor), _state(path)
    return named is not None and named[:2] == (mine.st_dev, mine.st_ino)


def _temporary(name: str) -> str:
    """How a temporary file beside one of this name begins."""
    return f".{name[:60]}."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
