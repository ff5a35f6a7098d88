"""Every kind of source gives the same documents; what is wrong with one is said in a line that names file and place."""

import csv
import gzip
import io
import json
import os
import socket
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from momentum_lm.errors import UserError
from momentum_lm.text import sources
from momentum_lm.text.sources import MAX_DOCUMENT, find_sources

TEXTS = ["one", 'a "quoted" text,\nof two lines', "", "naïve café 日本語", "  spaces  ", "tab\tand\r\nreturn", "last"]


def read(*names, column="text", document=None, exclude=None, say=lambda line: None):
    found = find_sources([str(n) for n in names], column, document, exclude, say)
    return [text.decode() for source in found for text in source.documents()]


def as_csv(texts):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def as_jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def as_parquet(texts, kind=None):
    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind or pyarrow.string())})
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


def two_frames(data):
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


CONTENT = {
    "t.csv": as_csv(TEXTS),
    "t.jsonl": as_jsonl(TEXTS),
    "t.ndjson": as_jsonl(TEXTS).rstrip(b"\n"),
    "t.json": b"\xef\xbb\xbf" + as_jsonl(TEXTS).replace(b"\n", b"\r\n\r\n"),
    "t.parquet": as_parquet(TEXTS),
    "large.parquet": as_parquet(TEXTS, pyarrow.large_string()),
    "t.csv.gz": gzip.compress(b"\xef\xbb\xbf" + as_csv(TEXTS)),
    "t.jsonl.gz": gzip.compress(as_jsonl(TEXTS)[:20]) + gzip.compress(as_jsonl(TEXTS)[20:]),
    "t.jsonl.zst": two_frames(as_jsonl(TEXTS)),
}


@pytest.mark.parametrize("name", CONTENT)
def test_tables(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENT[name])
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_nulls_are_left_out(tmp_path, kind):
    texts = ["one", None, "two"]
    path = tmp_path / f"t{kind}"
    path.write_bytes(as_jsonl(texts) if kind == ".jsonl" else as_parquet(texts))
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    "suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress), (".zst", two_frames)]
)
def test_text_as_files_lines_and_blocks(tmp_path, suffix, pack):
    path = tmp_path / f"t.txt{suffix}"
    text = "\nfirst é\nsecond\n\n \t\r\n  third\r\nfourth  \n\n\n"
    path.write_bytes(pack(text.encode()))
    assert read(path) == [text]
    assert read(path, document="line") == ["", "first é", "second", "", " \t", "  third", "fourth  ", "", ""]
    assert read(path, document="blank-line") == ["first é\nsecond", "  third\r\nfourth  "]


def test_folders_are_read_in_order_of_path(tmp_path):
    for name in (
        "b.txt",
        "a/z.md",
        "a/y.txt.gz",
        "c/out/train.txt",
        ".git/x.txt",
        "a/.hidden.txt",
        "data.csv",
        "B.TXT",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())
    assert read(tmp_path, exclude=tmp_path / "c/out") == ["B.TXT", "a/y.txt.gz", "a/z.md", "b.txt"]
    assert read(tmp_path / "b.txt", tmp_path / "c") == ["b.txt", "c/out/train.txt"]


def test_data_sets_are_streamed_from_a_local_folder(tmp_path):
    """`datasets` itself, with the part of its loading that needs no network."""
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.parquet").write_bytes(as_parquet(TEXTS))
    (tmp_path / "reviews" / "test.parquet").write_bytes(as_parquet(["a test"]))
    name = f"hf:{tmp_path / 'reviews'}"
    assert read(name) == TEXTS
    assert read(f"{name}@test") == ["a test"]
    with pytest.raises(UserError, match="no column 'body'; there are: id, text; name one with column"):
        read(name, column="body")
    with pytest.raises(UserError, match="column 'id' holds int, not text"):
        read(name, column="id")
    with pytest.raises(
        UserError, match=r"could not be loaded \(Bad split: nope\. Available splits: .*check NAME\[:CONFIG\]\[@SPLIT\]"
    ):
        read(f"{name}@nope")


def test_no_network_says_how_to_go_without(tmp_path, run_cli):
    code = (
        "from momentum_lm.text.sources import *; list(find_sources(['stanfordnlp/imdb'], 'text', None)[0].documents())"
    )
    done = run_cli(["python", "-c", code], env={"HF_HUB_OFFLINE": "1", "HF_HOME": tmp_path})
    assert "Interrupted: stanfordnlp/imdb is no file here, and as a data set it could not be loaded" in done.stderr
    assert "fetch its parquet or JSON Lines files elsewhere and give their path" in done.stderr


def test_position_reaches_the_size(tmp_path):
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
        (source,) = find_sources([str(tmp_path / name)], "text", None)
        assert source.position() == 0
        seen = [source.position() for _ in source.documents()]
        assert seen == sorted(seen)
        assert source.position() == source.size == len(content)


def test_as_of_changes_with_every_write(tmp_path):
    """Of the same size, at any place, with the time of the last change set back."""
    path = tmp_path / "t.txt"
    path.write_bytes(b"a" * 300_000)

    def as_of():
        return find_sources([str(path)], "text", None)[0].as_of()

    before, times = as_of(), path.stat()
    assert as_of() == before
    time.sleep(0.02)  # file systems count time in steps
    with open(path, "r+b") as file:
        file.seek(150_000)
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns and path.stat().st_size == times.st_size
    assert as_of() != before


long = "x" * (MAX_DOCUMENT + 1)
WIDE = "a text in letters\nof two bytes or of four"
REPEATED = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), REPEATED)
REPEATED = REPEATED.getvalue()
BAD = {
    "missing file": ("gone.txt", None, {}, r"gone\.txt: no such file or folder; check the path"),
    "missing path": ("no such/place", None, {}, r"no such/place: no such file or folder"),
    "empty file": ("t.txt", b"", {}, r"t\.txt is empty; leave it out"),
    "record of text": ("t.txt", b"a", {"document": "record"}, r"document='record' does not go with .*t\.txt; use "
    "document file"),
    "lines of a table": ("t.csv", b"text\na\n", {"document": "line"}, r"document='line' does not go with .*t\.csv"),
    "lines of a data set": ("hf:a/b", None, {"document": "line"}, r"document='line' does not go with the data set "
    "hf:a/b"),
    "latin-1": ("t.txt", "naïve".encode("latin1"), {}, r"t\.txt: byte 2 is not UTF-8 \(0xef\); convert the file "
    "first, as with `iconv"),
    "latin-1 later": ("t.txt", b"ab\ncd\nn\xefve\n", {"document": "line"}, r"t\.txt: byte 7 is not UTF-8"),
    "latin-1 in JSON": ("t.jsonl", b'{"text": "a"}\n{"text": "\xef"}\n', {}, r"t\.jsonl: byte 24 is not UTF-8"),
    "utf-16": (
        "t.csv", "text\nä\n".encode("utf-16"), {},
        r"t\.csv is UTF-16 \(it begins with the byte order mark ff fe\).* -f utf-16 -t",
    ),
    "utf-16 be": ("t.txt", b"\xfe\xff\0a", {}, r"t\.txt is UTF-16 \(it begins with the byte order mark fe ff\)"),
    "utf-32": ("t.jsonl", "ä".encode("utf-32"), {}, r"t\.jsonl is UTF-32 .*ff fe 00 00\).*`iconv -f utf-32 -t utf-8`"),
    "utf-32 be": ("t.txt", b"\0\0\xfe\xff\0\0\0a", {}, r"t\.txt is UTF-32 .*00 00 fe ff\)"),
    "utf-16 unmarked": (
        "t.txt", WIDE.encode("utf-16le"), {}, r"t\.txt: byte 0: 41 of 82 bytes are NUL.*`iconv -f utf-16le -t utf-8`",
    ),
    "utf-16 in lines": (
        "t.txt", WIDE.encode("utf-16be"), {"document": "line"}, r"byte 0: 18 of 36 bytes are NUL.*iconv -f utf-16be",
    ),
    "utf-32 unmarked": (
        "t.csv", WIDE.encode("utf-32le"), {}, r"t\.csv: byte 0: .* bytes are NUL.*`iconv -f utf-32le -t utf-8`",
    ),
    "nuls in JSON": (
        "t.jsonl", json.dumps({"text": "a\0" * 20}), {}, r"t\.jsonl:1: 20 of 40 bytes are NUL: this is no text",
    ),
    "nuls in parquet": ("t.parquet", as_parquet(["a", "\0" * 20]), {}, r"t\.parquet: row 2: 20 of 20 bytes are NUL"),
    "parquet name": (
        "t.parquet", b"t\xe5xt".join(as_parquet(["a"]).rsplit(b"text", 1)), {}, r"t\.parquet is damaged after row 0",
    ),
    "old Mac lines": (
        "t.txt", b"a\rb\rc\r", {"document": "line"},
        r"t\.txt: its lines end in carriage returns alone, .*`tr '\\r' '\\n'`",
    ),
    "old Mac long": (
        "t.txt", b"abcdefg\r" * (1 << 20) + b"x", {"document": "blank-line"},
        r"t\.txt: its lines end in carriage returns",
    ),
    "old Mac csv": ("t.csv", b"text\ra\rb\r", {}, r"t\.csv: its lines end in carriage returns alone"),
    "old Mac tsv": ("t.tsv", b"id\ttext\r1\ta\r", {}, r"t\.tsv: its lines end in carriage returns alone"),
    "old Mac json": (
        "t.jsonl", b'{"text": "a"}\r{"text": "b"}\r', {}, r"t\.jsonl: its lines end in carriage returns alone",
    ),
    "csv return": (
        "t.csv", b"text\na\nb\rc\n", {}, r"t\.csv:3: a carriage return inside of a line; fix it, or quote the text",
    ),
    "csv long row": (
        "t.csv", b"id,text\n1,Hello, world\n", {}, r"t\.csv:2: 3 columns, the header has 2; .*in quotation marks",
    ),
    "csv column twice": (
        "t.csv", b"text,id,text\na,1,b\n", {}, r"t\.csv:1: 2 columns are called 'text'; rename all but one",
    ),
    "csv endless row": ("t.csv",
    b"a,text\n" + b'"' + (b"x" * 99 + b"\n") * 60_000 + b'","' + (b"x" * 99 + b"\n") * 60_000 + b'","'
                        + (b"x" * 99 + b"\n") * 60_000, {},
                        r"t\.csv:\d+: a row of more than 16 MiB; look for an unclosed quote"),
    "tsv short row": (
        "t.tsv", b'id\ttext\n1\t"a\nb"\n', {}, r"t\.tsv:3: 1 columns, the header has 2; .*quotation marks are ordinary",
    ),
    "tsv column": ("t.tsv", b"id\tbody\n", {}, r"t\.tsv: no column 'text'; there are: id, body"),
    "tsv column twice": ("t.tsv", b"text\ttext\na\tb\n", {}, r"t\.tsv:1: 2 columns are called 'text'"),
    "json key twice": (
        "t.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}\n', {}, r"t\.jsonl:2: 'text' is there more than once",
    ),
    "json digits": (
        "t.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", {},
        r"t\.jsonl:1: not a JSON record \(a whole number of th",
    ),
    "json nan": ("t.jsonl", b'{"text": NaN}', {}, r"t\.jsonl:1: column 'text' holds float, not text"),
    "json not that deep": (
        "t.jsonl", b'{"doc": {"text": "a"}}', {"column": "doc.body"}, r"t\.jsonl:1: no column 'doc\.body'; there",
    ),
    "parquet twice": ("t.parquet", REPEATED, {}, r"t\.parquet: 2 columns are called 'text'; rename all but one"),
    "parquet not that deep": (
        "t.parquet", as_parquet(["a"]), {"column": "text.a"}, r"t\.parquet: row 1: no column 'text\.a'; there are",
    ),
    "csv semicolons": (
        "t.csv", b"id;text\n1;a\n", {}, r"t\.csv:1: semicolons seem to separate its columns \('id', 'text'\), and "
        ".csv files are read",
    ),
    "csv tabs": ("t.csv", b"id\tbody\n1\ta\n", {}, r"t\.csv:1: tabs seem to separate its columns"),
    "csv column": ("t.csv", b"id,body\n1,a\n", {}, r"t\.csv: no column 'text'; there are: id, body; name one with "
    "column"),
    "csv without a line": ("t.csv", b"\n", {}, r"t\.csv: no column 'text'; there are: none"),
    "csv short row": ("t.csv", b'id,text\n1,"a\nb"\n2\n', {}, r"t\.csv:4: 1 columns, the header has 2"),
    "csv quote": ("t.csv", b'id,text\n1,"a\n2,b\n', {}, r"t\.csv:3: not proper CSV .*look for an unclosed quote"),
    "json": (
        "t.jsonl", b'{"text": "a"}\n{"text": "b"\n', {}, r"t\.jsonl:2: not a JSON record .*fix or remove the line",
    ),
    "json array": ("t.json", b'[{"text": "a"}]', {}, r"t\.json:1: expected a JSON object .* got list; make the array "
    "JSON Lines"),
    "json array of lines": (
        "t.json", b'[\n{"text": "a"}\n]', {}, r"t\.json:1: not a JSON record .*make the array JSON Lines, as with `jq "
        "-c",
    ),
    "json value": ("t.jsonl", b"3\n", {}, r"t\.jsonl:1: expected a JSON object with a key for each column, got int"),
    "json deep": ("t.jsonl", b"[" * 200_000, {}, r"t\.jsonl:1: (JSON nested too deeply|not a JSON record)"),
    "json column": ("t.jsonl", b'{"text": "a"}\n{"body": "b", "id": 2}\n', {}, r"t\.jsonl:2: no column 'text'; there "
    "are: body, id"),
    "json number": ("t.jsonl", b'{"text": 5}\n', {}, r"t\.jsonl:1: column 'text' holds int, not text; name another "
    "with column"),
    "json surrogate": ("t.jsonl", b'{"text": "ab\\ud83d"}\n', {}, r"t\.jsonl:1: half of a surrogate pair at character "
    "2"),
    "parquet column": ("t.parquet", as_parquet(["a"]), {"column": "body"}, r"t\.parquet: no column 'body'; there are: "
    "id, text"),
    "parquet type": ("t.parquet", as_parquet(["a"]), {"column": "id"}, r"t\.parquet: row 1: column 'id' holds int, "
    "not text"),
    "parquet cut": ("t.parquet", as_parquet(TEXTS)[:-5], {}, r"t\.parquet is cut short or not a parquet file; fetch "
    "it again"),
    "parquet gz": ("t.parquet.gz", gzip.compress(as_parquet(["a"])), {}, r"parquet is compressed inside; decompress "
    "the file first"),
    "gz cut": ("t.txt.gz", gzip.compress(os.urandom(9999))[:5000], {}, r"t\.txt\.gz is cut short: its compressed data "
    "ends too early"),
    "gz of nothing": ("t.txt.gz", b"plain text", {}, r"t\.txt\.gz is damaged or not a \.gz file"),
    "gz damaged": ("t.txt.gz", gzip.compress(b"ab" * 9999)[:-8] + bytes(8), {}, r"t\.txt\.gz is damaged or not a \.gz "
    "file"),
    "zst cut": ("t.jsonl.zst", zstandard.compress(as_jsonl(TEXTS * 9))[:-4], {}, r"t\.jsonl\.zst is cut short"),
    "zst of nothing": ("t.jsonl.zst", b"plain text", {}, r"t\.jsonl\.zst is damaged or not a \.zst file"),
    "long file": ("t.txt", long.encode(), {}, r"t\.txt is a document of more than 8 MiB; say how .*: document='line' "
    "or"),
    "long line": ("t.txt", f"a\n{long}".encode(), {"document": "line"}, r"t\.txt:2: a line of more than 8 MiB"),
    "long block": ("t.txt", ("x" * 79 + "\n") * 110_000, {"document": "blank-line"}, r"t\.txt:\d+: more than 8 MiB "
    "without a blank"),
    "long csv field": ("t.csv", f"text\n{long}", {}, r"t\.csv:2: a line of more than 8 MiB"),
    "long quoted csv": ("t.csv", 'text\n"' + ("x" * 99 + "\n") * 90_000 + '"', {},
                        r"t\.csv:\d+: not proper CSV \(field larger than field limit"),
    "long record": ("t.parquet", as_parquet([long]), {}, r"t\.parquet: row 1: a document of 8\.0 MiB; the most is 8 "
    "MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_refused_by_name_and_place(tmp_path, monkeypatch, case):
    name, content, options, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read(name, **options)
    assert "\n" not in str(caught.value)


def test_in_tsv_quotation_marks_are_text(tmp_path):
    """Tabs and line ends alone have a meaning; texts that a CSV writer has quoted are counted."""
    path = tmp_path / "t.tsv"
    texts = ['"Come in', "he said", '"', 'to "us"."', "", '"Yes"', '"a ""quoted"" text"', "a\rb"]
    path.write_text("".join(f"{i}\t{text}\n" for i, text in [("id", "text"), *enumerate(texts)]), newline="")
    (source,) = find_sources([str(path)], "text", None)
    assert [text.decode() for text in source.documents()] == texts
    assert source.remarks == {"nulls": 0, "quoted": 1}
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path) == texts


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_rows_without_text_are_counted(tmp_path, kind):
    texts = [None, "one", None, "two", None]
    path = tmp_path / f"t{kind}"
    path.write_bytes(as_jsonl(texts) if kind == ".jsonl" else as_parquet(texts))
    (source,) = find_sources([str(path)], "text", None)
    for _ in range(2):
        assert list(source.documents()) == [b"one", b"two"] and source.remarks["nulls"] == 3


def test_columns_inside_of_others(tmp_path):
    rows = [
        {"doc": {"text": "a", "n": 1}, "turns": [{"said": "b"}, {"said": "c"}], "d.t": "e"},
        {"doc": None, "turns": [], "d.t": "f"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        assert read(tmp_path / name, column="doc.text") == ["a"]
        assert read(tmp_path / name, column="d.t")[0] == "e"
    assert read(tmp_path / "t.jsonl", column="turns.1.said") == ["c"]
    with pytest.raises(UserError, match=r"t\.parquet: row 2: no column 'turns\.1\.said'"):
        read(tmp_path / "t.parquet", column="turns.1.said")
    with pytest.raises(UserError, match=r"t\.parquet: row 1: column 'doc' holds dict, not text"):
        read(tmp_path / "t.parquet", column="doc")


@pytest.mark.parametrize("kind", ["category", "string_view"])
def test_other_columns_of_text_in_parquet(tmp_path, kind):
    texts = ["one", "two", None, "one", "naïve"]
    column = (
        pyarrow.array(texts).dictionary_encode() if kind == "category" else pyarrow.array(texts, pyarrow.string_view())
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == ["one", "two", "one", "naïve"]


def test_a_key_twice_in_a_column_that_is_not_read_is_no_matter(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "id": 1, "id": 2, "more": {"text": "b", "text": "c"}}\n')
    assert read(tmp_path / "t.jsonl") == ["a"]


def test_a_stray_nul_is_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"ab\0cd\n\0\n")
    assert read(tmp_path / "t.txt", document="line") == ["ab\0cd", "\0"]


def test_linked_folders_are_read_once(tmp_path):
    """Through links in a circle, links to links, and links to what is read anyway."""
    for name in ("corpus/a.txt", "corpus/z/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "beside.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    links = {"corpus/more": "../elsewhere", "corpus/again": "../elsewhere", "corpus/0z": "z",
        "elsewhere/deep/circle": "../../corpus",
             "corpus/up": "..", "corpus/link.txt": "a.txt", "elsewhere/.hidden": "deep"}  # fmt: skip
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    said = []
    assert read(tmp_path / "corpus", say=said.append) == [
        "corpus/a.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "corpus/a.txt", "corpus/z/b.txt",
    ]  # fmt: skip
    told = {line.removeprefix("note: ").replace(f"{tmp_path}/", "") for line in said}
    assert told == {
        "corpus/0z is the same folder as corpus/z: it is read once",
        "corpus/more is the same folder as corpus/again: it is read once",
        "corpus/again/deep/circle is the same folder as corpus: it is read once",
        f"corpus/up leads to {tmp_path}, which holds corpus itself: it is not entered",
        "corpus/link.txt is the same file as corpus/a.txt: what it holds counts as duplicates",
    }


def test_tables_in_a_folder_are_told_of(tmp_path):
    for name in ("README.md", "data.jsonl.zst"):
        (tmp_path / name).write_text("some text")
    said = []
    assert read(tmp_path, say=said.append) == ["some text"]
    table = tmp_path / "data.jsonl.zst"
    assert said == [
        f"note: {tmp_path} also holds the table {table}: of a folder, texts alone are read; name tables to have them "
        "read"
    ]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_what_is_no_file_is_refused_by_name(tmp_path, kind, inside):
    path = tmp_path / "t.txt"
    listener = socket.socket(socket.AF_UNIX)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        listener.bind(os.fspath(path))
    else:
        path.symlink_to("/dev/zero")
    with listener, pytest.raises(UserError, match=rf"t\.txt is {kind}, not a file"):
        read(tmp_path if inside else path)


def test_a_link_to_nothing_is_refused_by_name(tmp_path):
    (tmp_path / "t.txt").symlink_to("gone")
    with pytest.raises(UserError, match=r"t\.txt is a link to gone, where there is nothing"):
        read(tmp_path)


def test_paths_that_are_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    for name in ("t.txt", "t.parquet", "t.jsonl"):
        (folder / name).write_bytes(CONTENT.get(name, b"one"))
    assert read(folder, folder / "t.parquet", folder / "t.jsonl") == ["one", *TEXTS, *TEXTS]


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"no \.txt or \.md files in this folder; name the files that you mean"):
        read(tmp_path)


def test_a_little_parquet_that_holds_very_much_is_refused(tmp_path):
    """As one page, which would be in memory at once; as a dictionary it is read."""
    path = tmp_path / "t.parquet"
    texts = [" " * (MAX_DOCUMENT - i % 3) for i in range(20)]
    pyarrow.parquet.write_table(
        pyarrow.table({"id": texts, "text": texts}), path, compression="zstd", use_dictionary=False
    )
    assert path.stat().st_size < 100_000
    with pytest.raises(
        UserError, match=r"t\.parquet: [\d,]+ bytes of row group 1 hold 160 MiB of 'text', .*write the file again with"
    ):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
    assert len(read(path)) == 20


def test_parquet_that_is_not_utf8(tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"], pyarrow.binary()).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet is damaged after row 0 .*[Uu][Tt][Ff]"):
        read(tmp_path / "t.parquet")


def test_without_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="loading a data set by name needs: pip install datasets"):
        list(sources.HubSource("org/name", "text", None).documents())
