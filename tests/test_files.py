"""Files that are whole or not there, and how what goes wrong with them is told."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import pytest

from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import (
    NPZ_ERRORS,
    Unchanged,
    appending,
    atomic_write,
    check_writable,
    file_stem,
    locked,
    naming,
    read_arrays,
    take_lock,
    write_json,
)
from momentum_lm.untrusted import read_json


def told(work, capsys):
    """What a command that does ``work`` prints."""

    @main_guard
    def main(argv=None):
        work()

    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err.rstrip("\n")


def test_an_oserror_is_one_line_with_the_file(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    again = "fix that and run the same command again"
    for name, reason in (
        ("nowhere/x", "No such file or directory"),
        ("folder", "Is a directory"),
        ("file/x", "Not a directory"),
    ):
        path = tmp_path / name
        assert told(lambda path=path: write_json(path, {}), capsys) == f"error: {path}: {reason}; {again}"
        assert told(lambda path=path: path.write_text(""), capsys) == f"error: {path}: {reason}; {again}"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def full():
        with naming("some/file"):
            raise OSError(28, "No space left on device")  # as write() raises it: without a name

    assert told(full, capsys) == f"error: some/file: No space left on device; {again}"


def test_an_oserror_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_write(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert error.value.filename == str(tmp_path / "b")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["there", "there/not/yet"])
def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path, place):
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / place, "folder")
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/x"])
def test_a_folder_that_cannot_be_written_is_named_with_its_flag(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^folder=.* cannot be written: .*; choose another folder$") as error:
        check_writable(tmp_path / place, "folder")
    assert place in str(error.value) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_damaged_arrays_raise_what_is_caught(tmp_path, keep):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(2000) ** 2)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:keep])
    with pytest.raises(NPZ_ERRORS), np.load(tmp_path / "a.npz") as arrays:
        arrays["a"]


def test_one_flipped_byte_in_arrays_raises_what_is_caught(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.arange(2000) ** 2)
    good = (tmp_path / "a.npz").read_bytes()
    for place in range(60, len(good) - 120, 97):
        (tmp_path / "a.npz").write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        with pytest.raises(NPZ_ERRORS), np.load(tmp_path / "a.npz") as arrays:
            arrays["a"]


def test_json_is_whole_or_as_before(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_path_that_is_not_utf8_can_be_written_and_printed(tmp_path, capsys):
    path = os.fsdecode(b"na\xefve/\xc3\xa9")
    write_json(tmp_path / "a.json", {"path": path})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": path}

    @main_guard
    def main(argv=None):
        print(path)

    assert main([]) == 0
    assert capsys.readouterr().out == "na\\udcefve/é\n"
    assert told(lambda: (tmp_path / path).read_bytes(), capsys).startswith(f"error: {tmp_path}/na")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    other = "import sys, time; from momentum_lm.files import locked\n"
    other += "with locked(sys.argv[1]): print('has it', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", other, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    refused = pytest.raises(
        UserError, match=rf"out is being written by process {process.pid}; wait until it ends, or end it"
    )
    with refused, locked(tmp_path / "out"):
        pass
    process.kill()  # as kill -9
    process.wait()
    with locked(tmp_path / "out"):
        pass


# ---- what is not an ordinary file, or not ours


def make_link(path):
    (path.parent / "precious").write_text("precious")
    path.symlink_to(path.parent / "precious")


@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (make_link, "a symbolic link")])
def test_only_an_ordinary_file_is_replaced(tmp_path, make, kind):
    path = tmp_path / "out"
    make(path)
    for write in (lambda: write_json(path, {}), lambda: appending(path).__enter__()):
        with pytest.raises(
            UserError, match=rf"out is {kind}, and only an ordinary file is replaced; name another file, or remove it"
        ):
            write()
    assert not (tmp_path / "precious").exists() or (tmp_path / "precious").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} - {"precious"} == {"out"}


def test_a_device_is_not_replaced():
    with pytest.raises(UserError, match="/dev/null is a device, and only an ordinary file is replaced"):
        write_json("/dev/null", {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_pipe_is_not_waited_for_and_a_link_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a named pipe"):
        read_json(tmp_path / "pipe")
    make_link(tmp_path / "link")
    (tmp_path / "precious").write_text("[1]")
    assert read_json(tmp_path / "link") == [1]
    with pytest.raises(UserError, match="larger than the 0 MB"):
        read_json(tmp_path / "link", most=2)


@pytest.mark.parametrize("how", ["link", "hard link", "words"])
def test_a_lock_that_is_not_ours_is_left_as_it_is(tmp_path, how):
    (tmp_path / "precious").write_text("precious")
    lock = tmp_path / "out" / ".lock"
    lock.parent.mkdir()
    if how == "link":
        lock.symlink_to(tmp_path / "precious")
    elif how == "hard link":
        lock.hardlink_to(tmp_path / "precious")
    else:
        lock.write_text("precious")
    with pytest.raises(UserError, match=r"\.lock is (a symbolic link|not a lock of ours)"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").read_text() == "precious" and lock.read_text() == "precious"


def test_a_lock_leaves_nothing_behind_but_what_was_put_there(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text() == str(os.getpid())
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"), locked(tmp_path / "a" / "b"):
            pass
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "x").write_text("")
    assert os.listdir(tmp_path / "a") == ["x"]


def test_files_that_change_while_they_are_read_are_named(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"one")
    seen = Unchanged([path])
    seen.check()
    os.utime(path, ns=(0, 0))
    with pytest.raises(
        UserError, match=r"model\.pt was changed while it was read, so its weights may be of two models"
    ):
        seen.check()
    seen = Unchanged([path])
    (tmp_path / "new").write_bytes(b"one")
    os.replace(tmp_path / "new", path)
    with pytest.raises(UserError, match=r"model\.pt was replaced while"):
        seen.check()
    path.unlink()
    with pytest.raises(UserError, match=r"model\.pt is gone while"):
        seen.check()


def test_arrays_that_promise_more_than_there_is_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3), b=np.array("text"))
    assert {name: values.tolist() for name, values in read_arrays(path).items()} == {"a": [0, 1, 2], "b": "text"}
    path.write_bytes(path.read_bytes().replace(b"(3,)", b"(9,)"))
    with pytest.raises(NPZ_ERRORS):
        read_arrays(path)
    np.savez(path, a=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not what its header says"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(ValueError, match="not what its header says"):
        read_arrays(path)


@pytest.mark.parametrize("name", ["mr", "a$x^$", "日本", "..", "../../x", "a/b", "x" * 300, "\n", ""])
def test_every_name_makes_a_files_name(tmp_path, name):
    stem = file_stem(name)
    (tmp_path / f"attention-{stem}-16shot.png").write_text("")
    assert len(list(tmp_path.iterdir())) == 1
    assert (stem == name) == (name in ("mr", "a$x^$", "日本"))
    assert stem != file_stem(name + "?")


def test_paths_that_are_no_utf8(tmp_path, capsys):
    """Names on Linux are bytes. Such a path in a record is read back as it was, and a folder that TensorBoard cannot
    write to is refused."""
    odd = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"path": odd})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": odd}
    with pytest.raises(UserError, match=r"folder=.*the name is not UTF-8"):
        check_writable(tmp_path / odd, "folder")


def test_a_lock_that_nobody_may_make_is_no_folder_that_has_gone():
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    user = os.geteuid()
    try:
        if not user:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(PermissionError):  # FileNotFoundError would be taken for such a folder, and tried for ever
            take_lock(os.path.join(folder, "lock"))
    finally:
        os.seteuid(user)
        os.rmdir(folder)
