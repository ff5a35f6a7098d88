"""What a labelled data set is made of, and how its rows become examples."""

from __future__ import annotations

import functools
import math
import re
import string
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError
from momentum_lm.untrusted import brief, shown

_NAMES = 20  # columns or labels that a message lists
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,30})(\.\d{0,30})?")
Choices = list[tuple[int, str]]  # (number among the row's options, text) of those that are not empty


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready to be scored: p(continuation | input) for each choice, of which ``gold`` is the right one.

    ``index`` is the row of the split that it came from, from 0. ``inputs`` has one text that all choices share, or one
    for each (partial evaluation, where the ``continuations`` are equal); a label's continuation starts with a space.
    """

    index: int
    inputs: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    def pair(self, choice: int) -> tuple[str, str]:
        """(input, continuation) of ``choice``; the two of ``gold``, joined, make a demonstration."""
        return self.inputs[choice if len(self.inputs) > 1 else 0], self.continuations[choice]


@dataclass(frozen=True)
class Hub:
    """Where a data set is on the Hugging Face hub."""

    id: str
    subset: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Field:
    """A template's field that is not a column as it is: without a final text, or by a table of words."""

    column: str
    without_final: str = ""
    words: Mapping[str, str] | None = None


@dataclass(frozen=True)
class DatasetSpec:
    """A data set's YAML file, read and checked; ``template`` is the variant in use. Made by
    :func:`momentum_lm.icl.datasets.definitions.load_spec`; the YAML keys are explained in ``datasets/README.md``."""

    name: str
    path: Path
    description: str
    task: str
    licence: str
    hub: Hub | None
    files: Mapping[str, str]
    splits: Mapping[str, str]
    labels: tuple[str, ...] | None
    label_column: str
    label_values: tuple[tuple[str, ...], ...]
    choices: str | tuple[str, ...] | None
    num_choices: int | None
    lowercase_choices: bool
    blank: str | None
    fields: Mapping[str, Field]
    templates: Mapping[str, str]
    template: str
    domain_premise: str

    @functools.cached_property
    def label_continuations(self) -> tuple[str, ...]:
        """What is scored for each label, where all examples have the same: one object for all of them, of which there
        may be many.
        """
        return tuple(f" {label}" for label in self.labels or ())

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have; "a.b" is b inside of a, and "a.0" the first item of a list."""
        fields = [self.fields[name].column if name in self.fields else name for _, name in self._pieces() if name]
        choices = [self.choices] if isinstance(self.choices, str) else list(self.choices or ())
        return list(dict.fromkeys([*fields, *choices, self.label_column]))

    def needed(self, names: Container[str]) -> list[str]:
        """Those of a table's columns ``names`` that :attr:`columns` mean or are in."""
        return list(dict.fromkeys(column if column in names else _parts(column)[0] for column in self.columns))

    def render(
        self, row: Mapping[str, Any], index: int, where: str, shorten: Callable[[str], str] | None = None
    ) -> Example | None:
        """The example of a row, or None if it has not ``num_choices``. ``shorten`` is applied to the text of each
        field.

        An option that is empty is no choice. Raises UserError that begins with ``where``: for a column that is not
        there or there twice, a value of another type, an unknown label, a right answer that is empty, and fewer than
        two choices.
        """
        total, choices = self._row_choices(row, where)
        if self.num_choices and len(choices) != self.num_choices:
            return None
        if len(choices) < 2:
            raise UserError(
                f"{where}: fewer than two choices with text in {self._choice_columns()}; fix or remove the row"
            )
        gold = self._gold(row, total, choices, where)
        pieces = []
        for text, field in self._pieces():
            value = self._field(row, field, where) if field else ""
            # What holds the blank must stay whole, and words of a table are no text of the data.
            plain = field and not self.blank and not (field in self.fields and self.fields[field].words)
            pieces += [text, shorten(value) if shorten and plain else value]
        prompt = "".join(pieces)
        if self.blank is None:
            continuations = self.label_continuations if self.labels else tuple(f" {choice}" for _, choice in choices)
            return Example(index, (prompt,), continuations, gold)
        before, mark, after = prompt.partition(self.blank)
        if not mark or not after:
            raise UserError(
                f"{where}: no {self.blank!r} with text after it, where the choices would go; fix or remove the row"
            )
        return Example(index, tuple(before + choice for _, choice in choices), (after,) * len(choices), gold)

    @functools.cached_property
    def empty_input(self) -> str:
        """The input of a row without any text."""
        return "".join(literal for literal, _ in self._pieces())

    def content_free(self, text: str) -> str:
        """The input with ``text`` ("N/A") in place of every field, for contextual calibration (arXiv 2102.09690).

        Raises ValueError where examples have their own choices.
        """
        if self.labels is None:
            raise ValueError(f"{self.name} has no fixed labels")
        return "".join(literal + (text if field else "") for literal, field in self._pieces())

    def _pieces(self) -> tuple[tuple[str, str | None], ...]:
        return parse_template(self.templates[self.template])

    def _field(self, row: Mapping[str, Any], name: str, where: str) -> str:
        field = self.fields.get(name, Field(name))
        value = _value(row, field.column, where)
        if field.words is None:
            return _text(value, field.column, where).removesuffix(field.without_final)
        if (number := self._words[name].find(value)) is None:
            known = _listed(list(field.words))
            raise UserError(f"{where}: {shown(value)} in column {shown(field.column)} is none of {known}; fix the row")
        return list(field.words.values())[number]

    @functools.cached_property
    def _words(self) -> dict[str, Meanings]:
        return {
            name: Meanings([[value] for value in field.words])
            for name, field in self.fields.items()
            if field.words is not None
        }

    @functools.cached_property
    def _meanings(self) -> Meanings:
        return Meanings(self.label_values)

    def _choice_columns(self) -> str:
        names = [self.choices] if isinstance(self.choices, str) else list(self.choices or ())
        return f"column{'s' if len(names) > 1 else ''} {_listed([repr(name) for name in names])}"

    def _row_choices(self, row: Mapping[str, Any], where: str) -> tuple[int, Choices]:
        """How many options the row has room for, and those with text."""
        if self.labels is not None:
            return len(self.labels), list(enumerate(self.labels))
        if isinstance(self.choices, str):
            values = _value(row, self.choices, where)
            if not isinstance(values, list | tuple) or not values:
                raise UserError(
                    f"{where}: column {self.choices!r} is no list of choices; fix the row, or name one column a choice"
                )
            options = [(self.choices, value) for value in values]
        else:
            options = [(column, _value(row, column, where)) for column in self.choices or ()]
        # A table with as many columns as the longest row's options has empty cells, or null, in the others.
        texts = [(i, _text(value, name, where)) for i, (name, value) in enumerate(options) if value is not None]
        lower = self.lowercase_choices
        return len(options), [(i, text[:1].lower() + text[1:] if lower else text) for i, text in texts if text.strip()]

    def _gold(self, row: Mapping[str, Any], total: int, choices: Choices, where: str) -> int:
        value = _value(row, self.label_column, where)
        found = (self._meanings if self.label_values else _numbers(total)).find(value)
        if found is None or found >= total:
            names = [names[0] for names in self.label_values[:total]] or [str(i) for i in range(total)]
            words = f" ({_listed(list(self.labels))})" if self.labels and list(self.labels) != names else ""
            label = shown(str(value).strip() if isinstance(value, str | float) else value)
            if value is None:
                label = "null"  # no text, and none that reads None
            elif label[:1] not in "'\"" and not isinstance(value, list | dict):
                label = f"'{label}'"
            raise UserError(
                f"{where}: label {label} in column {shown(self.label_column)} is none of {_listed(names)}{words}; "
                "fix the row or the YAML file"
            )
        if self.labels is not None:
            return found
        gold = next((gold for gold, (number, _) in enumerate(choices) if number == found), None)
        if gold is None:
            what = f"item {found} of column {self.choices!r}"
            if not isinstance(self.choices, str):
                what = f"column {(self.choices or ())[found]!r}"
            raise UserError(f"{where}: the right answer is in {what}, which is empty; fix or remove the row")
        return gold


class Meanings:
    """Which of several entries the value of a cell stands for: the one that lists its text, or else the same number or
    truth value, which formats write differently (1, 1.0 and "1"; true, "True" and 1)."""

    def __init__(self, entries: Sequence[Sequence[str]]) -> None:
        self._exact = {text: number for number, texts in enumerate(entries) for text in texts}
        self._alike: dict[str, int | None] = {}
        for text, number in self._exact.items():
            form = canonical(text)
            self._alike[form] = number if self._alike.get(form, number) == number else None  # two of them: neither

    def find(self, value: Any) -> int | None:
        """The number of the entry; None for none, and for what is no text, number or truth value."""
        if value is None or value != value or isinstance(value, list | tuple | dict | bytes):
            return None
        if isinstance(value, int) and value.bit_length() > 256:  # whose text Python may refuse to write
            return None
        text = str(value).strip()
        return self._exact[text] if text in self._exact else self._alike.get(canonical(value))


@functools.cache
def _numbers(count: int) -> Meanings:
    return Meanings([[str(i)] for i in range(count)])


@functools.cache
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, field after it) pairs, the last one with None: "A {b} c" -> (("A ", "b"), (" c", None)). Raises
    ValueError.
    """
    pieces: list[tuple[str, str | None]] = []
    rest = ""
    for text, name, form, conversion in string.Formatter().parse(template):
        if name is None:
            rest += text
            continue
        if not name.strip() or form or conversion:
            raise ValueError(f"{{{name}}} is not the name of a column alone")
        pieces.append((rest + text, name))
        rest = ""
    return *pieces, (rest, None)


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """What a row has in a column; "a.b" is b inside of a, or of each of a's items, and "a.0" (a[0]) the first of a's
    items."""
    value: Any = row
    for key in [column] if column in row else _parts(column):
        if isinstance(value, Mapping) and key in value:
            if key in getattr(value, "repeated", ()):
                raise UserError(
                    f"{where}: the column {shown(key)} is there more than once; rename or remove the others"
                )
            value = value[key]
        elif isinstance(value, list) and re.fullmatch(r"-?\d{1,9}", key):
            if not -len(value) <= int(key) < len(value):
                raise UserError(
                    f"{where}: no item {key} for column {shown(column)}, in a list of {len(value)}; fix or remove the "
                    "row"
                )
            value = value[int(key)]
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) and key in item for item in value):
            if any(key in getattr(item, "repeated", ()) for item in value):
                raise UserError(
                    f"{where}: {shown(key)} is there more than once in an item of {shown(column)}; rename or remove "
                    "the others"
                )
            value = [item[key] for item in value]
        else:
            there = _listed([brief(str(name)) for name in row]) or "none"
            raise UserError(
                f"{where}: no column {shown(column)}; there are: {there}; rename it, or use a YAML file of your own"
            )
    return value


def _parts(column: str) -> list[str]:
    return re.sub(r"\[([^\[\]]+)\]", r".\1", column).split(".")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(brief, names[:_NAMES])) + (", ..." if len(names) > _NAMES else "")


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "nothing" if value is None else type(value).__name__
        item = f" (an item of it is {{{column}.0}})" if isinstance(value, list) else ""
        item = " (make the column one of strings)" if isinstance(value, bytes) else item
        raise UserError(f"{where}: column {shown(column)} holds {kind}, not text{item}; fix or remove the row")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: column {shown(column)} holds {value}, not text; fix or remove the row")
    if isinstance(value, int) and value.bit_length() > 256:
        raise UserError(f"{where}: column {shown(column)} holds {shown(value)}, not text; fix or remove the row")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's "\\ud800", which no tokenizer takes
        raise UserError(
            f"{where}: column {shown(column)} holds half of a surrogate pair at character {error.start}; fix the row"
        ) from error
    return text


def canonical(value: Any) -> str:
    """A number or truth value as text, the same for 1, 1.0, "1.0", True and "true"; any other text is itself."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e22:
        return str(int(value))
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return str(int(text.lower() == "true"))
    if not _NUMBER.fullmatch(text):
        return text
    number = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if number == "-0" else number
