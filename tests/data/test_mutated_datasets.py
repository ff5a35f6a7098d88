"""Damaged and hostile files of labelled data: one clear line, or examples that make sense; no other exception, no hang,
no memory."""

import io
import json
import random
import re
import resource
import time
from collections import Counter

import pytest

from momentum_lm.data.classification import load_dataset
from momentum_lm.errors import UserError

YAML = b"""\
description: "tickets"
files: {train: FILE, evaluation: FILE}
label: {column: label, values: [[no, nothing], 1, two]}
choices: &o [one, two, three]
lowercase_choices: true
templates:
  paper: "Ticket: {text}. {body.1.part}\\nDepartment: {kind}"
  code: '{text} {kind}'
fields: {kind: {column: kind, words: {1: a, 2: b}}, body: {column: text, without_final: "."}}
"""
FLAT = b"""\
files: {train: FILE, evaluation: FILE}
label: {column: label, values: [False, True]}
labels: [Bad, Good]
templates: {code: "Review: {text} Sentiment:"}
"""
ROWS = [
    {"text": f"ticket {i}.", "body": [{"part": "a"}, {"part": "b\u00e9"}], "kind": 1 + i % 2,
     "one": "x", "two": "Y", "three": None, "label": i % 2}
    for i in range(5)
]  # fmt: skip


def table(suffix):
    """A small file of each kind, and the YAML that reads it."""
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")

        file = io.BytesIO()
        rows = pyarrow.Table.from_pylist([{**row, "three": "z" if i else None} for i, row in enumerate(ROWS)])
        rows = rows.append_column("dictionary", rows["text"].dictionary_encode())
        parquet.write_table(rows, file)
        return YAML, file.getvalue()
    if suffix == "jsonl":
        return YAML, "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    comma = "," if suffix == "csv" else "\t"
    lines = [["text", "label", "more"], *([f'"a {i}' + '"', "True" if i % 2 else "False", "x"] for i in range(5))]
    return FLAT, "".join(comma.join(line) + "\r\n" for line in lines).encode()


def outcome(path):
    """What became of a data set: an error's line, or its number of examples. Anything else fails."""
    began = time.monotonic()
    try:
        data = load_dataset(str(path))
    except UserError as error:
        line = str(error)
        assert len(line) < 3000 and path.parent.name in line, line[:3000]
        return "error"
    finally:
        assert time.monotonic() - began < 10
    for example in (*data.train, *data.evaluation):
        assert 0 <= example.gold < len(example.continuations) >= 2
        assert all(
            isinstance(text, str) and text.encode() is not None for text in (*example.inputs, *example.continuations)
        )
        assert len(example.inputs) in (1, len(example.continuations)) and all(
            text.strip() for text in example.continuations
        )
    return "examples"


def sweep(folder, suffix, seeds):
    """Outcomes of mutations of a table, or of ``yaml``: of the file that describes one."""
    kind = "jsonl" if suffix == "yaml" else suffix
    yaml, rows = table(kind)
    yaml, path = yaml.replace(b"FILE", f"rows.{kind}".encode()), folder / "set.yaml"
    path.write_bytes(yaml)
    (folder / f"rows.{kind}").write_bytes(rows)
    load_dataset(str(path))
    changed = path if suffix == "yaml" else folder / f"rows.{kind}"
    original = changed.read_bytes()
    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter()
    for seed in seeds:
        changed.write_bytes(mutate(original, seed))
        try:
            found[outcome(path)] += 1
        except Exception as error:
            raise AssertionError(f"{suffix}, seed {seed}: {type(error).__name__}: {str(error)[:500]}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    return found


SUFFIXES = ["yaml", "jsonl", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mutations(suffix, tmp_path):
    assert sweep(tmp_path, suffix, range(30))["error"] > 3


@pytest.mark.nightly
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_thousand_mutations(suffix, tmp_path):
    found = sweep(tmp_path, suffix, range(1000))
    assert min(found["error"], found["examples"]) > 50, "the mutations are too weak, or too strong"


# Seeded mutations: what a damaged disk, a hurried hand and a hostile author make of a small file


NASTY = [
    b"", b"NaN", b"null", b"~", b"1e999", b"-0", b"0x" + b"f" * 5000, b"9" * 5000, b"2024-99-99", b"true",
    b"no", b"{}", b"[]", b"[" * 3000,
    b'{"a":' * 3000, b"x" * 20000, b'"', b"'", b"`", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9",
    b"\\ud800", b"\t", b"\r", b"\r\n", b"\n\n",
    b",", b": ", b"&a [*a, *a]", b"*a", b"&a", b"<<: *a", b"!!python/object/apply:os.system [ls]", b"!!int z", b"- ",
    b"---\n", b"{text.9}",
    b"{text[0]}", b"{{", b"}", b"%s", b"\xe2\x80\xa8", "text", "label", "İ",
]  # fmt: skip


def mutate(content, seed):
    """``content`` (bytes) after one to three changes: bits, bytes, parts and tokens turned over, removed, doubled,
    exchanged, added."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 2, 3))):
        content = draw.choice(CHANGES)(bytearray(content), draw)
    return bytes(content)


def _part(content, draw):
    first = draw.randrange(len(content) + 1)
    return first, min(len(content), first + draw.choice((1, 2, 8, 64)))


def _flip(content, draw):
    for _ in range(draw.choice((1, 1, 4))):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def _byte(content, draw):
    if content:
        content[draw.randrange(len(content))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
    return content


def _cut(content, draw):
    return content[: draw.randrange(len(content) + 1)]


def _remove(content, draw):
    first, end = _part(content, draw)
    return content[:first] + content[end:]


def _double(content, draw):
    first, end = _part(content, draw)
    return content[:end] + content[first:end] * draw.choice((1, 1, 50)) + content[end:]


def _token(content, draw):
    """A nasty value in place of a word, or beside it."""
    words = list(re.finditer(rb"[\w.]+|[^\s\w]", bytes(content)))
    if not words:
        return content
    word, value = draw.choice(words), draw.choice(NASTY)
    value = value.encode() if isinstance(value, str) else value
    return content[: word.start() if draw.random() < 0.6 else word.end()] + value + content[word.end() :]


def _lines(content, draw):
    lines = bytes(content).splitlines(keepends=True)
    draw.shuffle(lines)
    return bytearray(b"".join(lines[: draw.randrange(len(lines) + 1)] + lines[:1]))


CHANGES = (_flip, _byte, _cut, _remove, _double, _token, _token, _token, _lines)
