"""One self-contained HTML page: no network, no script, readable on a phone, light or dark as the reader's system is."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from momentum_lm.files import atomic_write
from momentum_lm.results.ownership import PAGE, check_ours

from .tables import Table

_CSS = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b6470; --page: #ffffff; --line: #d9dee4; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ec; --soft: #98a2ae; --page: #14171b; --line: #333a43; --panel: #1d2127; }
}
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
p, ul, pre { max-width: 54rem; }
a { color: inherit; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
@media (min-width: 68rem) { .scroll { margin-right: calc((66rem - 100vw) / 2 + 1.5rem); } }
table { border-collapse: collapse; margin: 0.5rem 0; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
@media (max-width: 40rem) { table { font-size: 0.8rem; } }
caption { text-align: left; color: var(--soft); padding-bottom: 0.3rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th { font-weight: 600; } .number { text-align: right; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; display: block; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0.2rem 1.6rem; }
figcaption, .note { color: var(--soft); font-size: 0.9rem; } details { margin: 0.4rem 0; } summary { cursor: pointer; }
pre { background: var(--panel); padding: 0.7rem; white-space: pre-wrap; border-radius: 4px; font-size: 0.85rem; }
@media screen and (max-width: 40rem) { STACK(table) }
@media screen and (max-width: 68rem) { STACK(table.wide) }
@media print {
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; margin: 0; } table { font-size: 0.7rem; }
}
"""
# Where a table has no room, its rows stand below one another, each cell behind its column's name
_STACK = """TABLE thead { display: none; }
TABLE tr { display: block; padding: 0.5rem 0; border-bottom: 1px solid var(--line); }
TABLE, TABLE tbody, TABLE caption { display: block; }
TABLE td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0.1rem 0; text-align: right;
  overflow-wrap: anywhere; }
TABLE td:empty { display: none; }
TABLE td::before { content: attr(data-column); color: var(--soft); text-align: left; flex: none; max-width: 50%; }"""
_CSS = re.sub(r"STACK\((.+?)\)", lambda match: _STACK.replace("TABLE", match[1]), _CSS)


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Points:
    """Plain sentences, one under another."""

    texts: Sequence[str]

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in self.texts) + "</ul>"


@dataclass(frozen=True)
class Code:
    """Preformatted text: commands, configuration."""

    text: str

    def html(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element, such as ``figures.to_svg`` gives, with a caption that says what is to be seen."""

    svg: str
    caption: str

    def html(self) -> str:
        label = html.escape(self.caption, quote=True)
        svg = self.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        return f"<figure>{svg}<figcaption>{html.escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Link:
    """A link to a file beside the page, as a paragraph."""

    text: str
    path: str

    def html(self) -> str:
        return f'<p><a href="{html.escape(self.path, quote=True)}">{html.escape(self.text)}</a></p>'


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many in a row as can be read."""

    pictures: Sequence[Picture]

    def html(self) -> str:
        return f'<div class="gallery">{"".join(picture.html() for picture in self.pictures)}</div>'


@dataclass(frozen=True)
class Folded:
    """Parts that the reader unfolds by a line that says what they are."""

    line: str
    parts: Sequence[Paragraph | Points | Code | Picture | Gallery | Table]

    def html(self) -> str:
        return f"<details><summary>{html.escape(self.line)}</summary>{''.join(map(_part, self.parts))}</details>"


Part = Paragraph | Points | Code | Link | Picture | Gallery | Table | Folded


def page(title: str, sections: Mapping[str, Sequence[Part]]) -> str:
    """The whole document: ``sections`` maps headings to parts; an empty heading gives none."""
    body = []
    for heading, parts in sections.items():
        body.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
        body += map(_part, parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{PAGE.decode()}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def write_page(
    path: str | os.PathLike[str], title: str, sections: Mapping[str, Sequence[Part]], replace: bool = True
) -> None:
    """Writes :func:`page` atomically; without ``replace`` in place of nothing but one of ours."""
    if not replace:
        check_ours(path, PAGE)
    with atomic_write(path) as file:
        file.write(page(title, sections))


def _part(part: Part) -> str:
    return f'<div class="scroll">{part.html()}</div>' if isinstance(part, Table) else part.html()
