"""The YAML files that describe labelled data sets, one each: which there are, and strict reading. ``datasets/README.md`` explains the keys.

The files are data: templates are texts with ``{column}`` in them, everything else is a name, a list or a mapping. Nothing in them runs.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from momentum_lm.data.dataset_spec import DatasetSpec, Field, Hub, canonical, parse_template
from momentum_lm.errors import UserError

FOLDER = Path(__file__).parent / "datasets"
SPLITS = ("train", "evaluation")
STANDARD = ("paper", "code")  # templates that can be asked of any set
KEYS = """name description task licence hub files splits label labels choices num_choices lowercase_choices blank fields templates
    domain_premise""".split()


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
    near = difflib.get_close_matches(name_or_yaml.lower(), available(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(available())}"
    raise UserError(f"there is no data set {name_or_yaml!r}; {hint} (one of your own is given as a path that ends in .yaml)")


class _Reader:
    """Reads one file, strictly: every key must be known and have the type that it is documented with."""

    def __init__(self, path: Path) -> None:
        import yaml

        self.path = path
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; check the path of the YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())}); mend it") from error
        if not isinstance(content, dict):
            raise self.error("expected keys such as description, templates, label and labels")
        self.content: dict[str, Any] = content

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
            raise self.error(f"no template {template!r}; there are: {', '.join(templates)}")
        chosen = template if template in templates else next(iter(templates))
        labels, choices, blank = self.labels(), self.choices(), self.text("blank")
        if "column" not in label or (hub and "id" not in hub):
            raise self.error("`label` needs the key column, and `hub` the key id")
        if (labels is None) == (choices is None):
            raise self.error("give either `labels`, the same for every example, or `choices`, the columns that hold them")
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
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise self.error(f"the name {name!r} must be of letters, digits, _, . and -: it names folders")
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
            raise self.error(f"unknown key {key!r}{_near(key, KEYS)}")
        return spec

    def typed(self, key: str, kind: type, default: Any) -> Any:
        value = self.content.pop(key, default)
        wrong = not isinstance(value, kind) or (isinstance(value, int) and kind is int and (value is True or value < 1))
        if value is not default and wrong:
            what = {int: "a whole number above 0", bool: "true or false", str: "text, in quotes", dict: "keys with values"}[kind]
            raise self.error(f"`{key}` must be {what}, not {value!r}")
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self.typed(key, str, None)
        return value

    def mapping(self, key: str, known: set[str]) -> dict[str, Any]:
        value: dict[str, Any] = self.typed(key, dict, None) or {}
        for name, item in value.items():
            if name not in known:
                raise self.error(f"unknown key {name!r} in `{key}`{_near(name, known)}")
            if name in ("id", "subset", "revision", "column", "without_final") and not isinstance(item, str):
                raise self.error(f"`{key}.{name}` must be text, not {item!r}")
        return value

    def texts(self, key: str, known: tuple[str, ...] = ()) -> dict[str, str]:
        value: dict[str, str] = self.typed(key, dict, None) or {}
        if not value and not known:
            raise self.error(f'`{key}` is missing: a name and a text for each, such as `paper: "Review: {{text}}\\nSentiment:"`')
        for name, item in value.items():
            if known and name not in known:
                raise self.error(f"unknown key {name!r} in `{key}`; there are: {', '.join(known)}")
            if not isinstance(item, str) or not isinstance(name, str):
                raise self.error(f"`{key}.{name}` must be text, not {item!r}")
        return value

    def labels(self) -> tuple[str, ...] | None:
        labels = self.content.pop("labels", None)
        if labels is None:
            return None
        if not isinstance(labels, list) or len(labels) < 2 or not all(_is_word(item) for item in labels):
            raise self.error(f'`labels` must be a list of two or more words, in quotes where YAML reads them otherwise ("Yes"): {labels!r}')
        if len(set(labels)) < len(labels):
            raise self.error(f"`labels` holds the same word twice: {', '.join(labels)}")
        return tuple(labels)

    def choices(self) -> str | tuple[str, ...] | None:
        choices = self.content.pop("choices", None)
        if choices is None or isinstance(choices, str):
            return choices
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(item, str) for item in choices):
            raise self.error(f"`choices` must be the column that holds the list of them, or two or more columns: {choices!r}")
        return tuple(choices)

    def values(self, values: Any) -> tuple[tuple[str, ...], ...]:
        if not isinstance(values, list):
            raise self.error(f"`label.values` must be a list, in the order of the labels: {values!r}")
        result = [tuple(map(canonical, item if isinstance(item, list) else [item])) for item in values]
        flat = [value for names in result for value in names]
        if len(set(flat)) < len(flat) or not all(result):
            raise self.error(f"`label.values` must hold each value once, and one or more for each label: {values!r}")
        return tuple(result)

    def fields(self) -> dict[str, Field]:
        fields = {}
        for name, item in (self.typed("fields", dict, None) or {}).items():
            self.content[f"fields.{name}"] = item
            settings = self.mapping(f"fields.{name}", {"column", "without_final", "words"})
            if "column" not in settings:
                raise self.error(f"`fields.{name}` needs the key column")
            words = settings.get("words")
            if words is not None:
                if not isinstance(words, dict):
                    raise self.error(f"`fields.{name}.words` must say which text stands for which value: {words!r}")
                settings["words"] = {canonical(key): str(text) for key, text in words.items()}
            fields[name] = Field(**settings)
        return fields

    def check_template(self, text: str) -> None:
        try:
            pieces = parse_template(text)
        except ValueError as error:
            raise self.error(f"template {text!r}: {error}; write {{column}}, and {{{{ for a brace") from error
        if not any(name for _, name in pieces):
            raise self.error(f"template {text!r} has no {{column}} in it")
        if text != text.rstrip():
            raise self.error(f"template {text!r} ends in white space, and so would all prompts; the labels bring their own space")


def _near(key: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; see {FOLDER / 'README.md'}"


def _is_word(item: Any) -> bool:
    return isinstance(item, str) and bool(item) and item == item.strip()
