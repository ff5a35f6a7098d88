"""Files that are whole or not there, and how what goes wrong with them is told."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import NPZ_ERRORS, atomic_write, check_writable, locked, naming, write_json


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
    again = "mend that and run the same command again"
    for name, reason in (("nowhere/x", "No such file or directory"), ("folder", "Is a directory"), ("file/x", "Not a directory")):
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
    check_writable(tmp_path / place, "--results-dir")
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/x"])
def test_a_folder_that_cannot_be_written_is_named_with_its_flag(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^--results-dir .* cannot be written: .*; choose another folder$") as error:
        check_writable(tmp_path / place, "--results-dir")
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


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    other = "import sys, time; from momentum_lm.files import locked\nwith locked(sys.argv[1]): print('has it', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", other, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    refused = pytest.raises(UserError, match=rf"out is being written by process {process.pid}; wait until it ends, or end it")
    with refused, locked(tmp_path / "out"):
        pass
    process.kill()  # as kill -9
    process.wait()
    with locked(tmp_path / "out"):
        pass


def test_paths_that_are_no_utf8(tmp_path, capsys):
    """Names on Linux are bytes. Such a path in a record is read back as it was, and a folder that TensorBoard cannot
    write to is refused."""
    odd = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"path": odd})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": odd}
    with pytest.raises(UserError, match=r"--results-dir .*the name is not UTF-8"):
        check_writable(tmp_path / odd, "--results-dir")


def test_paths_that_are_no_utf8_are_printed_as_they_are(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="utf-8", errors="strict"))
    assert main_guard(lambda argv=None: print(os.fsdecode(b"caf\xe9")))([]) == 0
    assert file.getvalue() == b"caf\xe9\n"
