"""What a labelled data set is made of, and how its rows become examples."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready to be scored: p(continuation | input) for each choice, of which ``gold`` is the right one.

    ``index`` is the row of the split that it came from, from 0. ``inputs`` has one text that all choices share, or one for each
    (partial evaluation, where the ``continuations`` are equal); a label's continuation starts with a space.
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
    :func:`momentum_lm.data.dataset_yaml.load_spec`; the YAML keys are explained in ``datasets/README.md``."""

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
        """What is scored for each label, where all examples have the same: one object for all of them, of which there may be many."""
        return tuple(f" {label}" for label in self.labels or ())

    @property
    def columns(self) -> list[str]:
        """The columns that a row must have; "a.b" is b inside of a."""
        fields = [self.fields[name].column if name in self.fields else name for _, name in self._pieces() if name]
        choices = [self.choices] if isinstance(self.choices, str) else list(self.choices or ())
        return list(dict.fromkeys([*fields, *choices, self.label_column]))

    def render(self, row: Mapping[str, Any], index: int, where: str, shorten: Callable[[str], str] | None = None) -> Example | None:
        """The example of a row, or None if it has not ``num_choices``. ``shorten`` is applied to the text of each field.

        Raises UserError that begins with ``where``: for a column that is not there, a value of another type, an unknown label.
        """
        choices = self._row_choices(row, where)
        if self.num_choices and len(choices) != self.num_choices:
            return None
        gold = self._gold(row, len(choices), where)
        pieces = []
        for text, field in self._pieces():
            value = self._field(row, field, where) if field else ""
            # What holds the blank must stay whole, and words of a table are no text of the data.
            plain = field and not self.blank and not (field in self.fields and self.fields[field].words)
            pieces += [text, shorten(value) if shorten and plain else value]
        prompt = "".join(pieces)
        if self.blank is None:
            continuations = self.label_continuations if self.labels else tuple(f" {choice}" for choice in choices)
            return Example(index, (prompt,), continuations, gold)
        before, mark, after = prompt.partition(self.blank)
        if not mark or not after:
            raise UserError(f"{where}: no {self.blank!r} with text after it, where the choices would go; mend or remove the row")
        return Example(index, tuple(before + choice for choice in choices), (after,) * len(choices), gold)

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
        text = _text(_value(row, field.column, where), field.column, where)
        if field.words is None:
            return text.removesuffix(field.without_final)
        if text not in field.words:
            raise UserError(f"{where}: {text!r} in column {field.column!r} is none of {', '.join(field.words)}; mend the row")
        return field.words[text]

    def _row_choices(self, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
        if self.labels is not None:
            return self.labels
        if isinstance(self.choices, str):
            values = _value(row, self.choices, where)
            if not isinstance(values, list | tuple) or not values:
                raise UserError(f"{where}: column {self.choices!r} is no list of choices; mend the row, or name one column a choice")
            texts = [_text(value, self.choices, where) for value in values]
        else:
            texts = [_text(_value(row, column, where), column, where) for column in self.choices or ()]
        return tuple(text[:1].lower() + text[1:] for text in texts) if self.lowercase_choices else tuple(texts)

    def _gold(self, row: Mapping[str, Any], count: int, where: str) -> int:
        value = canonical(_value(row, self.label_column, where))
        values = self.label_values or tuple((str(i),) for i in range(count))
        for gold, names in enumerate(values[:count]):
            if value in names:
                return gold
        known = ", ".join(names[0] for names in values[:count])
        raise UserError(f"{where}: label {value!r} in column {self.label_column!r} is none of {known}; mend the row or the YAML file")


@functools.cache
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, field after it) pairs, the last one with None: "A {b} c" -> (("A ", "b"), (" c", None)). Raises ValueError."""
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
    """What a row has in a column; "a.b" is b inside of a, or of each of a's items."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and key in item for item in value):
            value = [item[key] for item in value]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            there = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where}: no column {column!r}; there are: {there}; rename it, or use a YAML file of your own")
    return value


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(f"{where}: column {column!r} holds {kind}, not text; mend or remove the row")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's "\\ud800", which no tokenizer takes
        raise UserError(f"{where}: column {column!r} holds half of a surrogate pair at character {error.start}; mend the row") from error
    return text


def canonical(value: Any) -> str:
    """A label as text, the same for 1, 1.0, True and "1": formats differ in what they make of a number."""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value).strip()
