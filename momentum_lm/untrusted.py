"""Text, JSON and YAML that others wrote: read within bounds, shown in messages within bounds. Problems are one-line
UserErrors."""

from __future__ import annotations

import ast
import codecs
import json
import operator
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momentum_lm.errors import CheckpointError, UserError, arg
from momentum_lm.files import JSON_BYTES, check_readable, read_bytes

YAML_BYTES = 1 << 18  # PyYAML reads about this much in a second
YAML_DEPTH = 20
YAML_VALUES = 20_000  # aliases written out
_SHOWN = 60  # characters of a value in a message
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Record(dict[str, Any]):
    """A row, or an object in it, some of whose names occur more than once: ``repeated``. Of these the last value is
    kept."""

    repeated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """The pairs as a dict, which is a Record where a name is repeated."""
        plain = dict(pairs)
        if len(plain) == len(pairs):
            return plain
        record = cls(plain)
        record.repeated = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return record


@dataclass(frozen=True)
class Plain:
    """A YAML scalar that is no text: as written, and the truth value or number that YAML makes of it; None for dates,
    and where it can make nothing of it, as of a whole number of thousands of digits."""

    text: str
    value: Any

    def __repr__(self) -> str:
        return self.text


class _Brief(reprlib.Repr):
    """``repr`` of the first parts alone: the whole of a value may be larger than memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 5, 5, 4, 4
        self.maxstring = self.maxlong = self.maxother = _SHOWN

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= _SHOWN else f"{x[:_SHOWN]!r}... ({len(x):,} characters)"

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()  # of too many of them repr refuses to write the digits
        return repr(x) if bits < 200 else f"a whole number of {bits:,} bits"

    def repr_Record(self, x: Record, level: int) -> str:
        return self.repr_dict(x, level)

    def repr_Plain(self, x: Plain, level: int) -> str:
        if isinstance(x.value, bool):  # what a reader may not expect of No
            return repr(x.value)
        return x.text if len(x.text) <= _SHOWN else f"{x.text[:_SHOWN]}... ({len(x.text):,} characters)"


_brief = _Brief()


def shown(value: Any) -> str:
    """A value for a message: its ``repr``, shortened."""
    return _brief.repr(value)


def brief(text: str) -> str:
    """Text for a message, in one line and shortened."""
    text = " ".join(text[: 20 * _SHOWN].split())
    return text if len(text) <= 4 * _SHOWN else text[: 4 * _SHOWN] + "..."


def legible(text: str, most: int, other: str = "?") -> str:
    """Text in one line of at most ``most`` characters, with ``other`` for what a terminal obeys and no font shows."""
    text = "".join(c if c.isprintable() else other for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be written anywhere: of bytes that are no UTF-8, their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_json(path: str | os.PathLike[str], most: int = JSON_BYTES) -> Any:
    """What a JSON file of ours holds. Raises OSError, UserError as :func:`read_bytes`, and ValueError as the strict
    :func:`parse_json`."""
    return parse_json(read_bytes(path, most), strict=True)


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """A JSON value, in which an object with a repeated name is a :class:`Record`. ``strict``, for what we wrote
    ourselves: NaN and half a surrogate pair are refused, and of a repeated name the last value is taken.

    Raises ValueError whose text fits a message, for what is no JSON, not UTF-8 (UnicodeError), nested too deeply, or
    holds a number of thousands of digits.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if _depth(text) > _DEEPEST:
            raise RecursionError
        if not strict:
            return json.loads(text, object_pairs_hook=Record.of)
        value = json.loads(text, parse_constant=_no_number)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeError as error:
        if not strict:
            raise
        raise ValueError(f"not UTF-8: {error}") from error
    except ValueError as error:  # of which one is Python's limit to the digits of a whole number
        reason = str(error)
        raise ValueError("a whole number of thousands of digits" if "digits" in reason else brief(reason)) from error


_DEEPEST = 200  # levels of JSON: what Python itself can read differs between its versions, by a factor of a hundred


def _depth(text: str) -> int:
    """At most how many objects and lists of a JSON text lie in one another; exact where there are many."""
    most = text.count("{") + text.count("[")
    if most <= _DEEPEST:
        return most
    deepest = depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[{\[]|[}\]]', text):
        sign = match[0]
        if sign in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif sign in "}]":
            depth -= 1
    return deepest


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def check_marks(start: bytes, name: str | os.PathLike[str]) -> None:
    """Raises UserError, with the command that converts it, for a file whose first bytes are the mark of UTF-16 or
    UTF-32."""
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            raise UserError(
                f"{os.fspath(name)} is {encoding.upper()} (it begins with the byte order mark {mark.hex(' ')}), not "
                f"UTF-8; convert the file first, as with `iconv -f {encoding} -t utf-8`"
            )


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file: of texts, lists and mappings with text as keys, and :class:`Plain` for whatever else
    a scalar may be.

    Nothing in the file runs or grows: aliases are written out, up to YAML_VALUES values in all. Keys that are no text
    are kept as their text. Raises UserError, which names the file and key, for anything else; also for a file of more
    than YAML_BYTES and repeated keys.
    """
    try:
        check_readable(path)
        with open(path, "rb") as file:
            content = file.read(YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path of the YAML file") from error
    if len(content) > YAML_BYTES:
        raise UserError(f"{path}: a YAML file of more than {YAML_BYTES >> 10} KiB; is it another kind of file?")
    check_marks(content, path)
    import yaml

    try:
        node = _compose(content.decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML file ({brief(str(error))}); fix it") from error
    if node is None or node.tag != "tag:yaml.org,2002:map":
        raise UserError(f"{path}: expected keys such as description, templates, label and labels")
    reader, result = _YamlReader(), {}
    for key, value in reader.pairs(node, str(path)):
        if key in result:
            raise UserError(f"{path}: the key {shown(key)} is there twice; remove one")
        result[key] = reader.value(value, f"{path}: `{brief(key)}`")
    return result


def _compose(text: str) -> Any:
    """The file's one node, without values: PyYAML's C parser would be faster and is not everywhere."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > YAML_DEPTH:
                raise ValueError(f"nested more than {YAML_DEPTH} deep in line {self.peek_event().start_mark.line + 1}")
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    loader = Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


class _YamlReader:
    """Values of nodes, of which there may be YAML_VALUES. ``where`` is the file and key that messages begin with."""

    def __init__(self) -> None:
        self.left = YAML_VALUES

    def value(self, node: Any, where: str, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > YAML_DEPTH:  # an alias may stand for what it is part of
            raise UserError(
                f"{where} holds more than {YAML_VALUES:,} values, its aliases (*) written out; write down what "
                "it is to hold"
            )
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "seq":
            return [self.value(item, where, depth + 1) for item in node.value]
        if kind == "map":
            result: dict[str, Any] = {}
            for key, item in self.pairs(node, where, depth):
                if key in result:
                    raise UserError(f"{where}: the key {shown(key)} is there twice; remove one")
                result[key] = self.value(item, where, depth + 1)
            return result
        return self.scalar(node, kind, where)

    def pairs(self, node: Any, where: str, depth: int = 0) -> list[tuple[str, Any]]:
        """A mapping's keys, as text, and the nodes of their values. ``<<`` adds those of other mappings that are not
        there."""
        own: list[tuple[str, Any]] = []
        others: list[Any] = []
        for key, item in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                others += item.value if item.tag == "tag:yaml.org,2002:seq" else [item]
            else:
                name = self.value(key, where, depth + 1)
                if not isinstance(name, str | Plain):
                    raise UserError(f"{where}: a key must be text, not {shown(name)}")
                own.append((name.text if isinstance(name, Plain) else name, item))
        there = {name for name, _ in own}
        for other in others:
            if other.tag != "tag:yaml.org,2002:map" or depth >= YAML_DEPTH:
                raise UserError(f"{where}: << must name a mapping; write its keys out instead")
            self.left -= 1 + len(other.value)
            if self.left < 0:
                return own  # and the next value says so
            for name, item in self.pairs(other, where, depth + 1):
                if name not in there:
                    there.add(name)
                    own.append((name, item))
        return own

    def scalar(self, node: Any, kind: str, where: str) -> Any:
        if kind in ("str", "value"):  # a lone = is of the second kind
            return node.value
        if kind == "null":
            return None
        if kind not in ("bool", "int", "float", "timestamp"):
            raise UserError(f"{where}: the tag {brief(node.tag)} is not read; write plain text, lists and mappings")
        import yaml

        try:
            make = getattr(yaml.constructor.SafeConstructor(), f"construct_yaml_{kind}")
            value = None if kind == "timestamp" else make(node)
        except (ValueError, OverflowError, KeyError, IndexError):  # 2024-99-99, thousands of digits, !!bool maybe
            value = None
        if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write very long ones
            value = None
        return Plain(node.value, value)


def trusted() -> bool:
    """Whether the user has said, by FAIRSEQ_TRUST_CHECKPOINT or --trust-checkpoint, that checkpoints may run code."""
    return os.environ.get("FAIRSEQ_TRUST_CHECKPOINT", "") not in ("", "0")


def plain_value(text: str) -> Any:
    """``eval`` for options, which may be a checkpoint's: of literals and their sums and products ("[(512, 3)] * 4"),
    without running code.

    Raises CheckpointError for anything else, and for what is longer than any option, unless checkpoints are trusted.
    """
    if not isinstance(text, str):
        raise TypeError(f"eval() takes a string, not a {type(text).__name__}")  # which fairseq's eval_bool relies on
    if trusted():
        return eval(text)
    operators: dict[Any, Callable[[Any, Any], Any]] = {ast.Add: operator.add, ast.Mult: operator.mul}
    longest = 100_000

    def length(part: Any) -> int:
        return len(part) if hasattr(part, "__len__") else 0

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            left, right = value(node.left), value(node.right)
            sizes = length(left), length(right)
            times = (
                max((n for n in (left, right) if isinstance(n, int)), default=1) if isinstance(node.op, ast.Mult) else 1
            )
            if sum(sizes) * times > longest:
                raise ValueError("too long")
            return operators[type(node.op)](left, right)
        return ast.literal_eval(node)

    try:
        if len(text) > 10 * longest:  # fairseq reads lines of some data sets so, of thousands of units each
            raise ValueError("too long")
        return value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{text[:200]!r}, an option of the command or of the checkpoint, is not a plain value: evaluating it can "
            "run code. If you trust where it comes from, add ",
            arg(trust=True),
            " or set FAIRSEQ_TRUST_CHECKPOINT=1",
        ) from error
