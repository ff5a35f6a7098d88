"""The YAML files that describe labelled data sets, one each: which there are, and strict reading.
``datasets/README.md`` explains the keys.

The files are data: templates are texts with ``{column}`` in them, everything else is a name, a list or a mapping.
Nothing in them runs.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.spec import DatasetSpec, Field, Hub, canonical, parse_template
from momentum_lm.untrusted import Plain, brief, load_yaml, shown

FOLDER = Path(__file__).parent
SPLITS = ("train", "evaluation")
STANDARD = ("paper", "code")  # templates that can be chosen for any set
KEYS = """name description task licence hub files splits label labels choices num_choices lowercase_choices blank
fields templates domain_premise""".split()


def available() -> list[str]:
    """The names of the data sets that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_spec(name_or_yaml: str, template: str = "code") -> DatasetSpec:
    """The data set of that name, or of a YAML file of your own.

    Where a set lacks the template ``paper`` or ``code``, its first one stands in; any other name must be in the file.
    Raises UserError, which names file and key, for an unknown name or template and for anything wrong in the file.
    """
    if name_or_yaml in available():
        return _Reader(FOLDER / f"{name_or_yaml}.yaml").spec(template)
    path = Path(name_or_yaml).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _Reader(path).spec(template)
    near = difflib.get_close_matches(name_or_yaml[:100].lower(), available(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(available())}"
    raise UserError(
        f"there is no data set {shown(name_or_yaml)}; {hint} (one of your own is given as a path that ends in .yaml)"
    )


def check_names(specs: Sequence[DatasetSpec]) -> None:
    """Raises UserError where two have one name: results and files are told apart by it. Some file systems do not tell A
    from a."""
    first: dict[str, DatasetSpec] = {}
    for spec in specs:
        other = first.setdefault(spec.name.casefold(), spec)
        if other is not spec:
            names = spec.name if spec.name == other.name else f"{other.name} and {spec.name} but for their case"
            raise UserError(
                f"two data sets are called {names}: {other.path} and {spec.path}; give one of them another "
                "`name`, in its file"
            )


class _Reader:
    """Reads one file, strictly: every key must be known and have the type that it is documented with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = load_yaml(path)

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem}")

    def spec(self, template: str) -> DatasetSpec:
        hub = self.mapping("hub", {"id", "subset", "revision"})
        label = self.content.pop("label", None)
        self.content["label"] = {"column": label} if isinstance(label, str) else label
        label = self.mapping("label", {"column", "values"})
        templates = self.texts("templates")
        for text in templates.values():
            self.check_template(text)
        if template not in templates and template not in STANDARD:
            raise self.error(f"no template {shown(template)}; there are: {brief(', '.join(templates))}")
        chosen = template if template in templates else next(iter(templates))
        labels, choices, blank = self.labels(), self.choices(), self.text("blank")
        if "column" not in label or (hub and "id" not in hub):
            raise self.error("`label` needs the key column, and `hub` the key id")
        if (labels is None) == (choices is None):
            raise self.error(
                "give either `labels`, the same for every example, or `choices`, the columns that hold them"
            )
        if blank == "":
            raise self.error("`blank` is empty; it is the mark in the text where each choice goes, such as _")
        if choices is None and (blank or {"num_choices", "lowercase_choices"} & set(self.content)):
            raise self.error("`blank`, `num_choices` and `lowercase_choices` go with `choices`")
        values = self.values(label.get("values", []))
        expected = len(labels or (choices if isinstance(choices, tuple) else ()))
        if values and expected and len(values) != expected:
            raise self.error(f"`label.values` has {len(values)} entries for {expected} labels")
        after = "" if blank else parse_template(templates[chosen])[-1][0]
        premise = self.text("domain_premise")
        splits = {"train": "train", "evaluation": "validation"} | self.texts("splits", SPLITS)
        name = self.text("name") or self.path.stem
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise self.error(
                f"the name {shown(name)} must be of letters, digits, _, . and -, up to 100: it names folders"
            )
        spec = DatasetSpec(
            name=name,
            path=self.path,
            description=self.text("description") or "",
            task=self.text("task") or "",
            licence=self.text("licence") or "",
            hub=Hub(**hub) if hub else None,
            files=self.texts("files", SPLITS),
            splits=splits,
            labels=labels,
            label_column=label["column"],
            label_values=values,
            choices=choices,
            num_choices=self.typed("num_choices", int, None),
            lowercase_choices=self.typed("lowercase_choices", bool, False),
            blank=blank,
            fields=self.fields(),
            templates=templates,
            template=chosen,
            domain_premise=after.lstrip(string.whitespace + ".,;:?!").rstrip() if premise is None else premise,
        )
        if self.content:
            key = next(iter(self.content))
            raise self.error(f"unknown key {shown(key)}{_near(key, KEYS)}")
        return spec

    def typed(self, key: str, kind: type, default: Any) -> Any:
        found = self.content.pop(key, None)
        if found is None:
            return default
        value = found.value if isinstance(found, Plain) else found
        if not isinstance(value, kind) or (isinstance(value, int) and kind is int and (value is True or value < 1)):
            what = {
                int: "a whole number above 0",
                bool: "true or false",
                str: "text, in quotes",
                dict: "keys with values",
            }[kind]
            raise self.error(f"`{brief(key)}` must be {what}, not {shown(found)}")
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.typed(key, str, None)
        return value

    def mapping(self, key: str, known: set[str]) -> dict[str, Any]:
        value: dict[str, Any] = self.typed(key, dict, None) or {}
        for name, item in value.items():
            if name not in known:
                raise self.error(f"unknown key {shown(name)} in `{brief(key)}`{_near(name, known)}")
            if name in ("id", "subset", "revision", "column", "without_final") and not isinstance(item, str):
                raise self.error(f"`{brief(key)}.{name}` must be text, not {shown(item)}")
        return value

    def texts(self, key: str, known: tuple[str, ...] = ()) -> dict[str, str]:
        value: dict[str, str] = self.typed(key, dict, None) or {}
        if not value and not known:
            raise self.error(
                f'`{key}` is missing: a name and a text for each, such as `paper: "Review: {{text}}\\nSentiment:"`'
            )
        for name, item in value.items():
            if known and name not in known:
                raise self.error(f"unknown key {shown(name)} in `{key}`; there are: {', '.join(known)}")
            if not isinstance(item, str):
                raise self.error(f"`{key}.{brief(name)}` must be text, not {shown(item)}")
        return value

    def labels(self) -> tuple[str, ...] | None:
        labels = self.content.pop("labels", None)
        if labels is None:
            return None
        if not isinstance(labels, list) or len(labels) < 2 or not all(_is_word(item) for item in labels):
            form = 'a list of two or more words, in quotes where YAML reads them otherwise ("Yes")'
            raise self.error(f"`labels` must be {form}: {shown(labels)}")
        if len(set(labels)) < len(labels):
            raise self.error(f"`labels` holds the same word twice: {brief(', '.join(labels))}")
        return tuple(labels)

    def choices(self) -> str | tuple[str, ...] | None:
        choices = self.content.pop("choices", None)
        if choices is None or isinstance(choices, str):
            return choices
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(item, str) for item in choices):
            raise self.error(
                f"`choices` must be the column that holds the list of them, or two or more columns: {shown(choices)}"
            )
        if len(set(choices)) < len(choices):
            raise self.error(f"`choices` names the same column twice: {brief(', '.join(choices))}")
        return tuple(choices)

    def values(self, values: Any) -> tuple[tuple[str, ...], ...]:
        """What stands for each label, as written, and where YAML reads a number or truth value otherwise than it is
        written, that too."""
        if not isinstance(values, list):
            raise self.error(f"`label.values` must be a list, in the order of the labels: {shown(values)}")
        entries = [entry if isinstance(entry, list) else [entry] for entry in values]
        items = [item for entry in entries for item in entry]
        wrong = next((item for item in items if not isinstance(item, str | Plain)), None)
        if wrong is not None or None in items:
            raise self.error(f"`label.values` must hold texts, numbers or truth values, not {shown(wrong)}")
        texts = [item.text if isinstance(item, Plain) else item.strip() for item in items]
        numbers = [canonical(item.value) for item in items if isinstance(item, Plain) and item.value is not None]
        if len(set(texts)) < len(texts) or len(set(numbers)) < len(numbers) or not all(entries):
            raise self.error(
                f"`label.values` must hold each value once, and one or more for each label: {shown(values)}"
            )
        return tuple(tuple(form for item in entry for form in _forms(item, texts)) for entry in entries)

    def fields(self) -> dict[str, Field]:
        fields = {}
        for name, item in (self.typed("fields", dict, None) or {}).items():
            self.content[f"fields.{name}"] = item
            settings = self.mapping(f"fields.{name}", {"column", "without_final", "words"})
            if "column" not in settings:
                raise self.error(f"`fields.{name}` needs the key column")
            words = settings.get("words")
            if words is not None:
                if not isinstance(words, dict) or not all(isinstance(text, str | Plain) for text in words.values()):
                    raise self.error(
                        f"`fields.{name}.words` must say which text stands for which value: {shown(words)}"
                    )
                settings["words"] = {key: text.text if isinstance(text, Plain) else text for key, text in words.items()}
            fields[name] = Field(**settings)
        return fields

    def check_template(self, text: str) -> None:
        try:
            pieces = parse_template(text)
        except ValueError as error:
            raise self.error(
                f"template {shown(text)}: {brief(str(error))}; write {{column}}, and {{{{ for a brace"
            ) from error
        if not any(name for _, name in pieces):
            raise self.error(f"template {shown(text)} has no {{column}} in it")
        if text != text.rstrip():
            raise self.error(
                f"template {shown(text)} ends in white space, and so would all prompts; the labels bring their "
                "own space"
            )


def _forms(item: str | Plain, others: Sequence[str]) -> list[str]:
    """A value as it is written, and as what YAML reads where that is another number or truth value: no and 0, 0x10 and
    16."""
    if isinstance(item, str):
        return [item.strip()]
    form = item.text if item.value is None else canonical(item.value)
    return [item.text] if form == canonical(item.text) or form in others else [item.text, form]


def _near(key: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key)[:100], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; see {FOLDER / 'README.md'}"


def _is_word(item: Any) -> bool:
    return isinstance(item, str) and bool(item) and item == item.strip()
