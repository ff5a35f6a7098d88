"""Rows of local tables: what a cell is in each format, what is there twice, and what is no such table."""

import os

import pytest

from momentum_lm.errors import UserError
from momentum_lm.text.lines import MAX_LINE
from momentum_lm.text.tables import read_rows


@pytest.fixture
def rows(tmp_path):
    """rows(name, content): the rows of a file."""

    def read(name, content, needed=list):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [row for _, row in read_rows(tmp_path / name, needed)]

    return read


def test_quotation_marks_are_text_in_tsv_alone(rows):
    assert rows("a.tsv", 'text\tn\n"Hello\t1\r\nshe said"\t2\n"a""b"\t3\n') == [
        {"text": '"Hello', "n": "1"}, {"text": 'she said"', "n": "2"}, {"text": '"a""b"', "n": "3"}
    ]  # fmt: skip
    assert rows("a.csv", 'text,n\n"Hello, ""you""\nthere",1\n') == [{"text": 'Hello, "you"\nthere', "n": "1"}]
    assert rows("A.TSV", "text\tn\na\t1\n") == [{"text": "a", "n": "1"}]


def test_names_that_are_there_twice(rows):
    with pytest.raises(UserError, match=r"a\.csv:1: 2 columns are called 'text'; rename all but one"):
        rows("a.csv", "text,label,text,,\na,1,b,,\n")
    assert rows("a.csv", "text,label,text,,\na,1,b,,\n", lambda names: ["label"]) == [{"label": "1"}]
    (row,) = rows("a.jsonl", '{"text": "a", "text": "b", "label": 1}\n')
    assert row.repeated == {"text"}
    assert type(rows("a.csv", "text,label\na,1\n")[0]) is dict


def test_what_separates_columns(rows):
    with pytest.raises(UserError, match=r"a\.csv:1: semicolons seem to separate its columns \('text', 'label'\)"):
        rows("a.csv", "text;label\na,b;1\n", lambda names: ["text", "label"])
    assert rows("a.csv", "a;b\nc\n") == [{"a;b": "c"}]  # one column, of that name


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "a.parquet"
    columns = [
        pyarrow.array(["a", "b"]).dictionary_encode(),
        pyarrow.array([1, 2]),
        pyarrow.array([{"c": [1]}, None]),
        pyarrow.array([3, 4]),
    ]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "label", "doc", "label"]), path)
    only = list(read_rows(path, lambda names: ["text"]))
    assert only == [(f"{path}: row 1", {"text": "a"}), (f"{path}: row 2", {"text": "b"})]
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are called 'label'; rename all but one"):
        list(read_rows(path, lambda names: ["text", "label"]))
    assert [list(row) for _, row in read_rows(path, lambda names: ["absent"])] == [
        ["text", "doc"]
    ] * 2  # for the message that lists them


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            '{"a": 1}\n'.encode("utf-16"),
            r"a\.jsonl is UTF-16 .* ff fe\), not UTF-8; convert the file first, as with `iconv -f utf-16 -t utf-8`",
        ),
        ("a.csv", "a,b\n".encode("utf-16"), r"a\.csv is UTF-16"),
        ("a.csv", b"a,b\n\xe9,1\n", r"a\.csv: byte 4 is not UTF-8 .*`iconv -f latin1 -t utf-8`"),
        ("a.jsonl", b'{"a": "\xe9"}\n', r"a\.jsonl: byte 7 is not UTF-8 .*`iconv -f latin1 -t utf-8`"),
        (
            "a.jsonl",
            '[{"a": 1}]\n',
            r"a\.jsonl:1: expected a JSON object .* got list; make the array JSON Lines, as with `jq -c '\.\[\]'`",
        ),
        ("a.jsonl", "[\n{}]\n", r"a\.jsonl:1: not a JSON record .*; make the array JSON Lines"),
        (
            "a.jsonl",
            '{"a": ' + "9" * 5000 + "}\n",
            r"a\.jsonl:1: not a JSON record \(a whole number of thousands of digits\)",
        ),
        ("a.jsonl", '{"a":' * 50_000, r"a\.jsonl:1: not a JSON record \(nested too deeply\)"),
        ("a.jsonl", b'{"a": "' + b"x" * MAX_LINE + b'"}', r"a\.jsonl:1: a line of more than 8 MiB"),
        ("a.csv", b"a\n" + b"x" * (MAX_LINE + 1), r"a\.csv:2: a line of more than 8 MiB"),
        ("a.tsv", "a\tb\n1\n", r"a\.tsv:2: 1 columns, the header has 2"),
        ("a.txt", "a", r"a\.txt: rows are read from \.jsonl, \.csv, \.tsv, \.parquet files"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_table(rows, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        rows(name, content)
    assert len(str(caught.value)) < 500


def test_what_is_no_file(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("link", "is a link to .*gone"),
        ("pipe", "is a named pipe"),
        ("folder", "is a folder"),
        ("none", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_rows(tmp_path / f"{name}.csv", list))
    for name in ("a\0b.csv", "a" * 5000 + ".csv"):
        with pytest.raises(UserError, match="check the path"):
            list(read_rows(tmp_path / name, list))
