"""Files of torch.save, good ones and ones that somebody made up. tests/mutations.py makes many more."""

import argparse
import os
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from momentum_lm.errors import CheckpointError, TornCheckpoint
from momentum_lm.formats import checkpoint
from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.formats.pickles import Malformed, Reader, shown

EVERYTHING = {
    "float": torch.arange(5.0), "half": torch.ones(3).half(), "bf16": torch.ones(3).bfloat16(), "long": torch.arange(4),
    "float8": torch.ones(3).to(torch.float8_e4m3fn), "uint16": torch.ones(3, dtype=torch.uint16),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": torch.arange(12).view(3, 4).t(),
    "part": torch.arange(9)[2:5],
    "parameter": torch.nn.Parameter(torch.ones(2)), "numbers": [np.float64(1.5), np.float32(0.5), np.int64(-3),
        np.bool_(True), np.uint8(7)],
    "plain": [None, True, False, -5, 2**70, 1.5, "é\udc80", b"abc\xff", (1, (2,)), [[]],
        {"a": {0: 2, None: 3, 0.5: 4, True: 5}}, {1, 2}],
    "namespace": argparse.Namespace(a=1, _name="x"), "size": torch.Size([1, 2]), "dtype": torch.float32,
    "device": torch.device("cuda", 1),
    "ordered": OrderedDict(b=1, a=2),
}  # fmt: skip


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
def test_what_torch_saves_is_read_as_it_was(tmp_path, new, protocol, mmap):
    module = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with an attribute
    shared = torch.arange(6.0)
    state = {**EVERYTHING, "module": module, "shared": shared, "view": shared[2:4]}
    torch.save(state, tmp_path / "c.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    loaded = load_checkpoint(tmp_path / "c.pt", mmap=mmap)
    assert list(loaded) == list(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert type(loaded[name]) is type(value) and loaded[name].requires_grad == value.requires_grad
            assert loaded[name].stride() == value.stride() and loaded[name].dtype == value.dtype, name
            assert loaded[name].detach().float().tolist() == value.detach().float().tolist(), name
        elif name == "module":
            assert loaded[name]._metadata == value._metadata and all(
                torch.equal(loaded[name][key], value[key]) for key in value
            )
        else:
            assert loaded[name] == value and repr(loaded[name]) == repr(value), name
    loaded["shared"].add_(1)
    assert loaded["view"].tolist() == [3, 4]  # one storage, as it was
    assert load_checkpoint(tmp_path / "c.pt")["view"].tolist() == [2, 3]  # and the file is as it was


def test_checksums(tmp_path, monkeypatch):
    """torch can be told to write none; a damaged number that is read (not mapped) shows."""
    torch.save({"model": torch.full((500,), 7.0)}, tmp_path / "c.pt")
    data = (tmp_path / "c.pt").read_bytes()
    at = data.index(np.float32(7).tobytes() * 100) + 200
    (tmp_path / "c.pt").write_bytes(data[:at] + b"\1" + data[at + 1 :])
    with pytest.raises(
        TornCheckpoint, match=r"c\.pt \(\d,\d+ bytes\) is torn or not a checkpoint: numbers of its tensors are damaged"
    ):
        load_checkpoint(tmp_path / "c.pt")
    at = data.index(b"model")
    (tmp_path / "c.pt").write_bytes(data[:at] + b"M" + data[at + 1 :])
    with pytest.raises(TornCheckpoint, match=r"data\.pkl is damaged"):
        load_checkpoint(tmp_path / "c.pt", mmap=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": torch.ones(3)}, tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "c.pt")["model"].tolist() == [1, 1, 1]


# Pickles by hand


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def data(value):
    return name("_codecs", "encode") + text(value.decode("latin1")) + text("latin1") + b"\x86R"


def scalar(code, state, value):
    kind = name("numpy", "dtype") + text(code) + b"\x85R" + state + b"b"
    return name("numpy._core.multiarray", "scalar") + kind + data(value) + b"\x86R"


def dtype_state(size, order="|", fields=b"NNN"):
    return b"(K\x03" + text(order) + fields + number(size) + b"J\xff\xff\xff\xffK\x00t"


STORAGE = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x0atQ"


def tensor(offset=b"K\x00", size=b"K\x0a\x85", stride=b"K\x01\x85", storage=STORAGE):
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + size + stride + b"\x89" + b"}" + b"tR"


def entry(value):
    """A checkpoint whose entry ``x`` is ``value``."""
    return b"\x80\x02}(" + text("x") + value + b"u."


def write(path, content, method=zipfile.ZIP_STORED, numbers=bytes(40)):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", numbers)
    return path


def test_pickles_by_hand_are_right(tmp_path):
    assert load_checkpoint(write(tmp_path / "c.pt", entry(tensor())))["x"].tolist() == [0.0] * 10
    assert (
        load_checkpoint(write(tmp_path / "c.pt", entry(scalar("f8", dtype_state(-1, "<"), struct.pack("<d", 2.5)))))[
            "x"
        ]
        == 2.5
    )
    assert (
        load_checkpoint(write(tmp_path / "c.pt", entry(scalar("i4", dtype_state(-1, ">"), struct.pack(">i", 7)))))["x"]
        == 7
    )


HOSTILE = {
    "code": (name("os", "system") + text("true") + b"\x85R",
    "holds os.system, which is not on the list of types known to be safe"),
    "code by Python 2's name": (name("__builtin__", "eval") + text("1") + b"\x85R",
        "holds __builtin__.eval, which is not on the list"),
    "a name with control characters": (name("a\x1b[31m", "b"), r"holds a\?\[31m\.b, which"),
    "an attribute": (name("builtins", "getattr") + b")R", "holds builtins.getattr"),
    "a string of negative size": (scalar("S4", dtype_state(-8), b"A" * 8),
    "holds numpy.dtype of 'S4', which is not on the list of types"),
    "a character that is none": (scalar("U1", dtype_state(4, "<"), b"\xff\xff\xff\x7f"),
    "holds numpy.dtype of 'U1', which is not on the list"),
    "objects of NumPy": (scalar("O8", dtype_state(-1), bytes(8)), "holds numpy.dtype of 'O8'"),
    "a number of another size": (scalar("f8", dtype_state(-8, "<"), bytes(8)), "a number of an odd type"),
    "a number with fields": (scalar("f8", dtype_state(-1, "<", b"N)}"), bytes(8)), "a number of an odd type"),
    "a number of too few bytes": (scalar("f8", dtype_state(-1, "<"), bytes(7)), "a number of an odd type"),
    "an array": (name("numpy._core.multiarray", "_reconstruct") + b")R", "holds numpy._core.multiarray._reconstruct"),
    "memory by one number": (name("builtins", "bytearray") + number(2**31 - 1) + b"\x85R", "holds builtins.bytearray"),
    "a tensor behind its numbers": (tensor(offset=b"K\x01"), r"a tensor of shape \(10,\), and 10 numbers"),
    "a tensor before its numbers": (tensor(offset=number(-1)), "a tensor of an odd form"),
    "a negative length": (tensor(size=number(-1) + b"\x85"), "a shape that cannot be"),
    "a tensor that is many times its numbers": (tensor(size=number(10**6) * 2 + b"\x86", stride=b"K\x00K\x00\x86"),
    "and 10 numbers"),
    "a length of 2**200": (tensor(size=b"\x8a\x1a" + bytes(25) + b"\x01\x85"), "a shape that cannot be"),
    "numbers that are not there": (tensor(storage=STORAGE.replace(text("0"), text("1"))),
    "lacks numbers of its tensors"),
    "more numbers than there are": (tensor(storage=STORAGE.replace(b"K\x0a", b"K\xff")),
    "lacks numbers of its tensors"),
    "numbers of two kinds": (tensor() + tensor(storage=STORAGE.replace(b"Float", b"Int")) + b"\x86",
    "two different tensors"),
    "no numbers at all": (STORAGE, "ends in the middle of a tensor"),
    "a type alone": (name("torch", "FloatStorage"), "ends in the middle of a tensor"),
    "a tensor as a function": (tensor() + b")R", "pickle is damaged"),
    "an attribute of a list": (b"]}b", "pickle is damaged"),
    "an attribute of a function": (name("torch", "Size") + b"}b", "pickle is damaged"),
    "options that hide a method": (name("argparse", "Namespace") + b")\x81}" + text("__class__") + b"Nsb",
    "have the name __class__"),
    "an attribute of a dict": (name("collections", "OrderedDict") + b")R}" + text("keys") + b"Nsb", "odd attributes"),
    "a tuple for a name": (b"}K\x01\x85Ns", "a tuple for a name"),
    "a number of many digits for a name": (b"}\x8a\xff" + b"\x7f" * 255 + b"Ns", "a int for a name"),
    "an unknown instruction": (b"\x8b\x04\x00\x00\x00aaaa", "an instruction 0x8b"),
    "a text that does not end": (b"X\xff\xff\xff\x7fx", "cut short"),
    "a memo that is not there": (b"h\x07", "cut short or damaged"),
    "itself": (b"]q\x01h\x01a", "more than 100 deep"),
    "depth": (b"N" + b"\x85" * 100_000, "more than 100 deep"),
    "marks": (b"(" * 100_000, "pickle is cut short or damaged"),
    "references to references": (b"(]q\x01" + b"".join(b"(" + b"h%c" % i * 10 + b"tq%c" % (i + 1) for i in range(1,
    30)) + b"t", "more often than"),
    "a large text again and again": (text("x" * 1_000_000) + b"q\x01" + (name("_codecs",
    "encode") + b"h\x01" + text("latin1") + b"\x86R") * 90,
                                     "more small parts than a checkpoint has"),
}  # fmt: skip


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_made_up_is_refused_in_one_line(case, mmap, tmp_path):
    value, message = HOSTILE[case]
    path = write(tmp_path / "c.pt", entry(value))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, mmap=mmap)
    assert "c.pt" in str(caught.value) and len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize("code", [b"]", b"}", b"\x8f", b"N", b"(", b"K\x01\x85", b"G" + bytes(8), b"N\x94"])
def test_parts_are_counted(code):
    """A few megabytes of the smallest instructions end early, whichever."""
    with pytest.raises(Malformed, match="more small parts"):
        Reader(code * 20_000, None, budget=5000).load()


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: torch.zeros(3, 3).to_sparse(), "a sparse tensor"),
        (lambda: torch.zeros(3, device="meta"), r"a tensor without values \(of the device meta\)"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), "a quantised tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_no_use_are_named(make, what, tmp_path):
    torch.save({"model": make()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=f"holds {what}, which nothing here can use"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("value", [{("a", 1): 2}, {("a", 1)}])
def test_a_tuple_for_a_name_takes_trust_and_is_no_damage(value, tmp_path):
    torch.save({"task_state": value}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"holds a tuple for a name, .* add trust=True") as caught:
        load_checkpoint(tmp_path / "c.pt")
    assert not isinstance(caught.value, TornCheckpoint)
    assert load_checkpoint(tmp_path / "c.pt", trust=True)["task_state"] == value


def test_an_expanded_tensor_has_more_numbers_than_the_file(tmp_path):
    torch.save({"model": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "c.pt")
    with pytest.raises(TornCheckpoint, match=r"a tensor of shape \(1000000, 1000000\), and 1 numbers"):
        load_checkpoint(tmp_path / "c.pt", mmap=True)


def test_truth_values_are_0_and_1(tmp_path):
    value = tensor(storage=STORAGE.replace(b"Float", b"Bool"))
    with pytest.raises(TornCheckpoint, match="truth values other than 0 and 1"):
        load_checkpoint(write(tmp_path / "c.pt", entry(value), numbers=b"\1\0\2" + bytes(7)))


# The archive


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = write(tmp_path / "c.pt", b"N0" * 5_000_000, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    for mmap in (False, True):
        with pytest.raises(TornCheckpoint, match=r"compressed or encrypted, and torch\.save writes it plain"):
            load_checkpoint(path, mmap=mmap)


def test_archives_that_lie(tmp_path):
    good = write(tmp_path / "c.pt", entry(tensor())).read_bytes()
    end = good.rindex(b"PK\5\6")
    last = good.rindex(b"PK\1\2")

    def changed(at, form, value):
        result = bytearray(good)
        struct.pack_into(form, result, at, value)
        return bytes(result)

    lies = {
        "size of an entry": changed(last + 24, "<I", 1 << 30),
        "place of an entry": changed(last + 42, "<I", 1 << 31),
        "place of a large entry": changed(last + 42, "<I", 0xFFFFFFFF),
        "size of the table": changed(end + 12, "<I", 1 << 31),
        "place of the table": changed(end + 16, "<I", 1 << 31),
        "a table of a large archive": changed(end + 16, "<I", 0xFFFFFFFF),
        "an entry's own header": changed(0, "<I", 0x05034B50),
        "length of an entry's own name": changed(26, "<H", 0xFFFF),
        "no end": good[:end],
        "half": good[: len(good) // 2],
    }
    for content in lies.values():
        (tmp_path / "c.pt").write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(TornCheckpoint, match=r"c\.pt"):
                load_checkpoint(tmp_path / "c.pt", mmap=mmap)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(tmp_path):
    path = write(tmp_path / "c.pt", entry(tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(40))
    with pytest.raises(TornCheckpoint, match="cut short or damaged"):
        load_checkpoint(path)


def test_numbers_that_are_not_aligned_are_copied(tmp_path):
    for padding in range(1, 9):
        with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
            archive.writestr("archive/data.pkl", entry(tensor()))
            archive.writestr("archive/" + "x" * padding, "")
            archive.writestr("archive/data/0", np.arange(10, dtype=np.float32).tobytes())
        found = load_checkpoint(tmp_path / "c.pt", mmap=True)["x"]
        assert found.tolist() == list(range(10)) and found.data_ptr() % 4 == 0


def test_another_byte_order(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"x": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes().replace(b"little", b"biggie"))
    with pytest.raises(TornCheckpoint, match="another byte order"):
        load_checkpoint(path)


# Before torch 1.6


def legacy(tmp_path, **changes):
    parts = {
        "magic": checkpoint._LEGACY_MAGIC,
        "version": 1001,
        "system": {"little_endian": True},
        "names": ["0"],
        "count": 10,
    } | changes
    head = b"".join(pickle.dumps(parts[part], 2) for part in ("magic", "version", "system"))
    storage = STORAGE.replace(b"tQ", b"NtQ")  # with a view
    body = entry(tensor(storage=storage)) + pickle.dumps(parts["names"], 2) + struct.pack("<q", parts["count"])
    (tmp_path / "c.pt").write_bytes(head + body + np.arange(10, dtype=np.float32).tobytes())
    return tmp_path / "c.pt"


def test_the_old_format_by_hand(tmp_path):
    path = legacy(tmp_path)
    assert load_checkpoint(path)["x"].tolist() == list(range(10))
    for change in ({"magic": 5}, {"magic": "x"}, {"version": 1000}, {"system": []},
        {"system": {"little_endian": False}}, {"names": []},
                   {"names": ["1"]}, {"names": 5}, {"names": ["0", "0"]}, {"count": 11}, {"count": -1}):  # fmt: skip
        with pytest.raises(TornCheckpoint, match=r"c\.pt"):
            load_checkpoint(legacy(tmp_path, **change))
    for end in (-1, -40, -60):
        path = legacy(tmp_path)
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(TornCheckpoint, match=r"c\.pt"):
            load_checkpoint(path)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(os.system, 2))
    with pytest.raises(CheckpointError, match=r"holds posix\.system"):
        load_checkpoint(tmp_path / "c.pt")


# The file


def test_what_is_no_ordinary_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", "/dev/zero", tmp_path):
        with pytest.raises(
            TornCheckpoint, match=r"cannot read checkpoint .*(is a named pipe|is a device|Is a directory)"
        ):
            load_checkpoint(path)
    with pytest.raises(TornCheckpoint, match="cannot read checkpoint"):
        load_checkpoint("a\0b")


def test_a_file_that_is_replaced_meanwhile_stays_the_one_that_was_opened(tmp_path, monkeypatch):
    torch.save({"model": torch.ones(3)}, tmp_path / "c.pt")
    torch.save({"model": torch.zeros(2)}, tmp_path / "new.pt")
    stock = checkpoint._Zip._directory

    def replaced(self):
        if (tmp_path / "new.pt").exists():
            os.replace(tmp_path / "new.pt", tmp_path / "c.pt")
        return stock(self)

    monkeypatch.setattr(checkpoint._Zip, "_directory", replaced)
    for expected in ([1, 1, 1], [0, 0]):
        assert load_checkpoint(tmp_path / "c.pt", mmap=True)["model"].tolist() == expected


def test_a_file_that_changes_while_it_is_read_is_torn(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    torch.save({"model": torch.ones(3)}, path)
    stock = checkpoint._Zip.load

    def longer(self):
        with open(path, "ab") as file:
            file.write(b"x")
        return stock(self)

    monkeypatch.setattr(checkpoint._Zip, "load", longer)
    with pytest.raises(TornCheckpoint, match="was written to while it was read"):
        load_checkpoint(path)


def test_trust_reads_what_torch_reads(tmp_path):
    torch.save({"lock": threading.RLock, "model": torch.zeros(3, 3).to_sparse()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="trust=True"):
        load_checkpoint(tmp_path / "c.pt")
    assert load_checkpoint(tmp_path / "c.pt", trust=True)["model"].is_sparse


def test_shown():
    assert shown("a\nb\x1b[0m\u202ec") == "a?b?[0m?c"
    assert shown("x" * 100) == "x" * 79 + "…" and shown([1]) == "<list>" and shown(5) == "5"
