"""One self-contained HTML page: no network, no script, readable on a phone, light or dark as the reader's system is."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import jinja2
from markupsafe import Markup, escape

from momentum_lm.files import atomic_write
from momentum_lm.results.ownership import PAGE, check_ours

from .tables import Table, csv_text


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a command or flag between backticks is code."""

    text: str
    kind: ClassVar = "paragraph"


@dataclass(frozen=True)
class Points:
    """Plain sentences, one under another, as in paragraphs."""

    texts: Sequence[str]
    kind: ClassVar = "points"


@dataclass(frozen=True)
class Verdict:
    """What came out, in sentences, the most important first."""

    texts: Sequence[str]
    kind: ClassVar = "verdict"


@dataclass(frozen=True)
class Definitions:
    """Terms, each with what it means."""

    terms: Mapping[str, str]
    kind: ClassVar = "definitions"


@dataclass(frozen=True)
class Code:
    """Preformatted text: commands, configuration."""

    text: str
    kind: ClassVar = "code"


@dataclass(frozen=True)
class Prompt:
    """A prompt with each continuation that was scored after it, marked; ``right`` numbers the gold one."""

    text: str
    choices: Sequence[str]
    right: int
    kind: ClassVar = "prompt"


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element, such as ``figures.to_svg`` gives, with a caption that says what is to be seen."""

    svg: str
    caption: str
    kind: ClassVar = "picture"

    def labelled(self) -> Markup:
        """The picture for a page, named for those who do not see it."""
        return Markup(self.svg.replace("<svg", f'<svg role="img" aria-label="{escape(self.caption)}"', 1))


@dataclass(frozen=True)
class Link:
    """A link to a file beside the page, as a paragraph."""

    text: str
    path: str
    kind: ClassVar = "link"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many in a row as can be read."""

    pictures: Sequence[Picture]
    kind: ClassVar = "gallery"


class Reference(NamedTuple):
    """A value that all rows of a forest plot are compared with."""

    name: str
    value: float


@dataclass(frozen=True)
class Dot:
    """A row of a forest plot: a value with its interval, what this is ``over`` ("10 draws"), and ``singles``, the
    values that it is the mean of. What is not finite is not drawn.

    ``role``: "main", what the plot is about; "control", what it is compared with; "other". ``absent`` stands in the
    place of a value that is None.
    """

    label: str
    value: float | None
    interval: Sequence[float] | None = None
    over: str = ""
    singles: Sequence[float] = ()
    role: str = "main"
    absent: str = "not measured"

    def __post_init__(self) -> None:
        ends = [self.value, *(self.interval or ())]
        if not all(math.isfinite(end) for end in ends if end is not None):
            object.__setattr__(self, "interval", None)
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)


_SHAPES = {  # SVG paths around 0, 0; unlike in form, so that they differ in greyscale
    "main": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "control": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "other": "M-5.5 0L0 -5.5L5.5 0L0 5.5z",
}


@dataclass(frozen=True)
class Forest:
    """Values with their intervals as dots and bars on one axis, each beside its number.

    The axis holds all values, the ``reference`` and, unless they reach several times as far, the intervals of the
    "main" rows. Another interval goes beyond that as far as the axis is long, and has an arrow where it goes on: over
    two or three draws it may be very wide. ``percent``: values are fractions, shown times 100 with so many decimals and
    this text after them; else with three decimals. ``signed``: with their sign. ``single``: what a single value is of.
    """

    title: str
    dots: Sequence[Dot]
    definition: str = ""
    reference: Reference | None = None
    percent: tuple[int, str] | None = None
    signed: bool = False
    unit: str = ""
    single: str = "draw"
    kind: ClassVar = "forest"

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value of the axis."""
        values = [dot.value for dot in self.dots if dot.value is not None]
        values += [value for dot in self.dots for value in dot.singles]
        values += [self.reference.value] if self.reference else []
        if not values:
            return 0.0, 1.0
        low, high = min(values), max(values)
        main = [end for dot in self.dots if dot.interval and dot.role == "main" for end in dot.interval]
        far = 5 * (high - low) + 1e-6
        if main and (high == low or (min(main) > low - far and max(main) < high + far)):
            low, high = min(low, *main), max(high, *main)
        bars = [end for dot in self.dots if dot.interval for end in dot.interval]
        room = max(high - low, 1e-6)
        return min([low, *(max(end, low - room) for end in bars)]), max(
            [high, *(min(end, high + room) for end in bars)]
        )

    @cached_property
    def ticks(self) -> list[float]:
        """At most six round values."""
        from matplotlib.ticker import MaxNLocator

        low, high = self.ends
        return [value for value in MaxNLocator(5).tick_values(low, high) if low <= value <= high]

    def x(self, value: float) -> str:
        """The place of a value on the axis, as SVG takes it."""
        low, high = self.ends
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{2 + 96 * min(max(share, 0.0), 1.0):.2f}%"

    def arrows(self, dot: Dot) -> list[tuple[str, str]]:
        """Place and SVG path of the arrows at the ends of the axis that an interval goes beyond."""
        low, high = self.ends
        first, last = dot.interval or (low, high)
        left, right = (self.x(low), "M4 -4L-2 0L4 4z"), (self.x(high), "M-4 -4L2 0L-4 4z")
        return [left] * (first < low) + [right] * (last > high)

    def shape(self, dot: Dot) -> str:
        """The mark of a row, as an SVG path."""
        return _SHAPES[dot.role]

    def tick(self, value: float) -> str:
        """A value on the axis, as text."""
        return f"{100 * value + 0.0:g}" if self.percent else f"{round(value, 10) + 0.0:g}"

    def text(self, dot: Dot) -> str:
        """Value and interval of a row, and what the interval is over where that is not the same in all rows."""
        if dot.value is None:
            return dot.absent
        text = self._number(dot.value) + (self.percent[1] if self.percent else "")
        if dot.interval is None:
            return text
        over = f"; {dot.over}" if dot.over and self._common is None else ""
        return f"{text} ({self._number(dot.interval[0])} to {self._number(dot.interval[1])}{over})"

    def note(self) -> str:
        """How the plot is read."""
        bars = any(dot.interval for dot in self.dots)
        roles = {dot.role for dot in self.dots}
        named = all(dot.over for dot in self.dots if dot.interval)
        over = f" over {self._common}" if self._common else ", over what the numbers name" if named else ""
        parts = [f"Bars: 95% intervals{over}."] * bars
        parts += ["Arrow: the interval goes on."] * any(self.arrows(dot) for dot in self.dots)
        parts += ["Hollow: controls."] * ("control" in roles)
        parts += ["Diamonds: not controls, for comparison."] * ("other" in roles)
        parts += [f"Grey points: single {self.single}s."] * any(dot.singles for dot in self.dots)
        if self.reference:
            parts.append(f"Dashed: {self.reference.name}.")
        return " ".join(parts)

    @property
    def caption(self) -> str:
        """What the plot shows, without its definition."""
        return self.title

    def csv(self) -> str:
        """A line for each row, in full precision; what is shown in percent is a fraction here."""
        numbers = [[dot.value, *(dot.interval or (None, None))] for dot in self.dots]
        texts = [["" if number is None else repr(number) for number in row] for row in numbers]
        unit = "fraction" if self.percent else self.unit
        rows = [
            [dot.label, *row, unit, dot.over, " ".join(map(repr, dot.singles))]
            for dot, row in zip(self.dots, texts, strict=True)
        ]
        return csv_text(["row", "value", "low", "high", "unit", "interval over", "single values"], rows)

    @property
    def _common(self) -> str | None:
        """What all intervals are over."""
        kinds = {dot.over for dot in self.dots if dot.interval}
        return kinds.pop() if len(kinds) == 1 else None

    def _number(self, value: float) -> str:
        sign = "+" if self.signed else ""
        scale, decimals = (100, self.percent[0]) if self.percent else (1, 0 if abs(value) >= 100 else 3)
        return f"{round(scale * value, decimals) + 0.0:{sign},.{decimals}f}"


@dataclass(frozen=True)
class Folded:
    """Parts that the reader unfolds by a line that says what they are."""

    line: str
    parts: Sequence[Part]
    kind: ClassVar = "folded"


Part = Paragraph | Points | Verdict | Definitions | Code | Prompt | Link | Picture | Gallery | Forest | Table | Folded


def page(title: str, sections: Mapping[str, Sequence[Part]]) -> str:
    """The whole document: ``sections`` maps headings to parts; an empty heading gives none."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["prose"] = _prose
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    filled = {heading: parts for heading, parts in sections.items() if parts}
    return template.render(title=title, sections=filled, mark=Markup(PAGE.decode()), file_name=_file_name)


def _prose(text: str) -> Markup:
    """A text for a page, with commands and flags between backticks as code; other backticks, of names, stay."""
    parts = re.split(r"`((?:momentum-lm |--)[^`]*)`", text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _file_name(heading: str, part: Table | Forest) -> str:
    """What a reader who keeps a table or plot of a section as CSV may call it."""
    plain = re.sub(r"[^\w.+-]+", "-", f"{heading} {part.caption}").strip("-.")
    return f"{plain[:100] or 'table'}.csv"


def write_page(
    path: str | os.PathLike[str], title: str, sections: Mapping[str, Sequence[Part]], replace: bool = True
) -> None:
    """Writes :func:`page` atomically; without ``replace`` in place of nothing but one of ours."""
    if not replace:
        check_ours(path, PAGE)
    with atomic_write(path) as file:
        file.write(page(title, sections))
