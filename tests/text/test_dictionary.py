"""dict.txt as fairseq reads and writes it."""

import os

import pytest

from momentum_lm.errors import UserError
from momentum_lm.text.dictionary import Dictionary


def same(ours, theirs):
    assert ours.symbols == theirs.symbols
    assert ours.counts[4:] == theirs.count[4:]
    assert all(ours.index(symbol) == theirs.index(symbol) for symbol in [*ours.symbols, "not there"])


def test_reads_what_fairseq_writes(tmp_path, fairseq_data):
    theirs = fairseq_data.Dictionary()
    for symbol, count in (("▁the", 7), ("#", 3), ("a b", 2), ("\u2028", 1)):
        theirs.add_symbol(symbol, count)
    theirs.pad_to_multiple_(8)
    theirs.save(str(tmp_path / "dict.txt"))
    same(Dictionary.load(tmp_path / "dict.txt"), theirs)


def test_fairseq_reads_what_it_writes(tmp_path, fairseq_data):
    ours = Dictionary(["▁the", "#", "a b", "\u2028", "\x0b", "▁the", "<unk>"], [7, 3, 2, 1, 0, 5, 6])
    ours.save(tmp_path / "dict.txt")
    theirs = fairseq_data.Dictionary.load(str(tmp_path / "dict.txt"))
    same(ours, theirs)
    assert (tmp_path / "dict.txt").read_text().count("#fairseq:overwrite") == 2
    same(Dictionary.load(tmp_path / "dict.txt"), theirs)


def test_padding_is_fairseqs(fairseq_data):
    theirs = fairseq_data.Dictionary()
    theirs.add_symbol("a", 5)
    theirs.pad_to_multiple_(8)
    same(Dictionary(["a"], [5]).padded(8), theirs)
    assert len(Dictionary("abcd").padded(8)) == 8


def test_counts():
    assert Dictionary("ab").with_counts([9, 9, 9, 9, 3, 4]).counts[4:] == [3, 4]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a 1\nb\n", r"dict\.txt:2: expected '<symbol> <count>'"),
        ("a 1\nb two\n", r"dict\.txt:2: expected"),
        ("a 1\n\nb 1\n", r"dict\.txt:2: expected"),
        ("a " + "9" * 5000 + "\n", r"dict\.txt:1: expected"),
        ("a 1\nb 1\na 2\n", r"dict\.txt:3: 'a' is listed before; add '#fairseq:overwrite'"),
        ("<unk> 1\n", r"dict\.txt:1: '<unk>' is listed before"),
        (b"\xff\xfe 1\n", r"dict\.txt is not a dictionary: byte 0 is not UTF-8"),
        (
            b"a 1\n" + b"".join(b"b%d 1\n" % i for i in range(20_000)) + b"\xff 1\n",
            r"dict\.txt is not a dictionary: byte 168894 is not UTF-8",
        ),
        ("a -1\n", r"dict\.txt:1: expected"),
        (f"a {'9' * 5000}\n", r"dict\.txt:1: expected '<symbol> <count>', got 'a 9{78}'; is"),
        ("a" * 9000 + " 1\n" + "a" * 9000 + " 1\n", r"dict\.txt:2: 'a{80}' is listed before"),
        (None, r"cannot read the dictionary .*dict\.txt: No such file"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "dict.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Dictionary.load(path)


@pytest.mark.parametrize("symbol", ["", "a\nb", "\r"])
def test_symbols_that_no_line_can_hold_are_refused(tmp_path, symbol):
    with pytest.raises(ValueError, match="cannot stand in"):
        Dictionary([symbol]).save(tmp_path / "dict.txt")
    assert not (tmp_path / "dict.txt").exists()


def test_what_is_no_dictionary_is_not_read_through(tmp_path, monkeypatch):
    from momentum_lm.text import dictionary

    path = tmp_path / "dict.txt"
    path.write_text("".join(f"word{i} 1\n" for i in range(100)))
    monkeypatch.setattr(dictionary, "_MOST_SYMBOLS", 50)
    with pytest.raises(UserError, match=r"dict\.txt has more than 50 lines, far more than a dictionary"):
        Dictionary.load(path)
    monkeypatch.setattr(dictionary, "_MOST_BYTES", 50)
    with pytest.raises(UserError, match=r"dict\.txt has \d+ bytes, far more"):
        Dictionary.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"dict\.txt is a named pipe, not a file"):
        Dictionary.load(path)
