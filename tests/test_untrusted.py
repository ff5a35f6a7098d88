"""YAML and JSON of strangers: what they may hold, and that nothing in them runs, grows or fills a screen."""

import os
import time

import pytest

from momentum_lm.errors import UserError
from momentum_lm.files import check_readable
from momentum_lm.untrusted import (
    YAML_BYTES,
    Plain,
    Record,
    check_marks,
    load_yaml,
    parse_json,
    printable,
    shown,
)

LAUGHS = "labels:\n - &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f" - &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a: &a0 {x: 1, y: 2}\n" + "".join(
    f"b{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


@pytest.fixture
def yaml(tmp_path):
    """yaml(text or bytes): what load_yaml reads of it."""

    def read(content):
        path = tmp_path / "set.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_yaml(path)

    return read


def test_texts_lists_and_mappings_and_what_else_a_scalar_is(yaml):
    found = yaml(
        '\ufefftext: a\nquoted: "1"\nlist: [x, {y: z}]\nnothing:\nno: Yes\nnumber: 0x10\n'
        "float: 1.50\nday: 2024-99-99\nlong: " + "9" * 5000
    )
    assert found == {
        "text": "a", "quoted": "1", "list": ["x", {"y": "z"}], "nothing": None,
        "no": Plain("Yes", True), "number": Plain("0x10", 16),
        "float": Plain("1.50", 1.5), "day": Plain("2024-99-99", None), "long": Plain("9" * 5000, None),
    }  # fmt: skip


def test_aliases_are_written_out(yaml):
    assert yaml("a: &a [x]\nb: [*a, *a]\n") == {"a": ["x"], "b": [["x"], ["x"]]}
    assert yaml("f: &f {p: 1, q: 2}\ng: {<<: *f, q: 3}\n")["g"] == {"q": Plain("3", 3), "p": Plain("1", 1)}


@pytest.mark.parametrize(
    "content, message",
    [
        (LAUGHS, r"set\.yaml: `labels` holds more than 20,000 values, its aliases \(\*\) written out"),
        (MERGES, r"set\.yaml: `b\d+` holds more than 20,000 values"),
        ("a: &a [*a]\n", r"set\.yaml: `a` holds more than 20,000 values"),
        ("[" * 3000, r"set\.yaml: not a YAML file \(nested more than 20 deep in line 1\)"),
        ("- " * 3000, r"not a YAML file \(nested more than 20 deep"),
        ("? " * 3000, r"not a YAML file \(nested more than 20 deep"),
        ("{a: " * 3000, r"not a YAML file \(nested more than 20 deep"),
        ("a: 1\nb: 2\na: 3\n", r"set\.yaml: the key 'a' is there twice"),
        ("a: {b: 1, b: 2}\n", r"set\.yaml: `a`: the key 'b' is there twice"),
        ("a: {[x]: 1}\n", r"set\.yaml: `a`: a key must be text, not \['x'\]"),
        ("a: {<<: b}\n", r"set\.yaml: `a`: << must name a mapping"),
        ("a: !!python/object/apply:os.system [ls]\n", r"set\.yaml: `a`: the tag .*apply:os.system is not read"),
        ("a: !!binary aGk=\n", r"`a`: the tag tag:yaml.org,2002:binary is not read"),
        ("- a\n", r"set\.yaml: expected keys such as"),
        ("", r"set\.yaml: expected keys such as"),
        ("a: 1\n---\nb: 2\n", r"set\.yaml: not a YAML file \(expected a single document"),
        ("a: *b\n", r"set\.yaml: not a YAML file \(found undefined alias"),
        ("a: \x07\n", r"set\.yaml: not a YAML file \(unacceptable character"),
        (b"a: \xe9\n", r"set\.yaml: not a YAML file \('utf-8' codec"),
        ("a: é\n".encode("utf-16"), r"set\.yaml is UTF-16 .* as with `iconv -f utf-16 -t utf-8`"),
        ("a: é\n".encode("utf-32"), r"set\.yaml is UTF-32 .*`iconv -f utf-32 -t utf-8`"),
        ("#" * (YAML_BYTES + 1), r"set\.yaml: a YAML file of more than 256 KiB"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_not_read(yaml, content, message):
    began = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        yaml(content)
    assert len(str(caught.value)) < 800 and time.process_time() - began < 3


def test_a_pipe_a_folder_and_a_link_to_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe\.yaml is a named pipe"):
        load_yaml(tmp_path / "pipe.yaml")  # opened, it would wait for ever
    (tmp_path / "link.yaml").symlink_to(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match=r"link\.yaml is a link to .*gone\.yaml, where there is nothing"):
        load_yaml(tmp_path / "link.yaml")
    with pytest.raises(UserError, match="is a folder, not a file"):
        check_readable(tmp_path)
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_json_objects_keep_the_names_that_are_there_twice():
    plain = parse_json(b'{"a": {"b": 1}}')
    assert plain == {"a": {"b": 1}} and type(plain) is dict
    found = parse_json('{"a": 1, "b": {"c": 1, "c": 2}, "a": 3, "a": 4}')
    assert isinstance(found, Record) and found == {"a": 4, "b": {"c": 2}}
    assert found.repeated == {"a"} and found["b"].repeated == {"c"}


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "nested too deeply"), ("9" * 5000, "a whole number of thousands of digits"), ('{"a"', "Expecting"),
    (b'"\xff"', "'utf-8' codec"),
], ids=lambda value: repr(value)[:30])  # fmt: skip
def test_what_is_no_json(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 300


def test_values_in_messages_are_short():
    nested = ["x"]
    for _ in range(40):
        nested = [nested] * 10
    began = time.process_time()
    values = [
        "a" * 10**6,
        nested,
        {str(i): "b" * 1000 for i in range(10**5)},
        1 << 10**6,
        Plain("9" * 5000, None),
        list(range(10**6)),
    ]
    assert all(len(shown(value)) < 1500 for value in values) and time.process_time() - began < 1
    assert shown(Record({"a": nested})) == shown({"a": nested})
    assert shown("a" * 100) == repr("a" * 60) + "... (100 characters)"
    assert [shown(value) for value in ("a", ["a", 1], None, 1.5, Plain("0x10", 16), Plain("No", False))] == [
        "'a'", "['a', 1]", "None", "1.5", "0x10", "False"
    ]  # fmt: skip


def test_encodings_and_paths():
    check_marks(b"text", "a.csv")
    check_marks(b"\xef\xbb\xbftext", "a.csv")
    with pytest.raises(UserError, match="UTF-16"):
        check_marks("x".encode("utf-16-be").join([b"\xfe\xff", b""]), "a.csv")
    assert printable("café") == "café" and printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"


def test_depth_is_the_same_on_every_python():
    """Python 3.14 reads 50,000 levels, which then end in a recursion of ours."""

    def nested(depth):
        return '{"a":' * depth + "1" + "}" * depth

    assert (
        parse_json(nested(200)) and parse_json('{"a": "' + "[{" * 5000 + '"}') and parse_json("[{}" + ",{}" * 999 + "]")
    )
    for text in (nested(201), nested(50_000), '["\\"",' * 300 + "1" + "]" * 300):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
