"""Figures that can be read in greyscale, on paper and on dark screens: every series has its own line style and
marker."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from momentum_lm.files import atomic_write

# Okabe and Ito's colours that have contrast on white and on near-black alike
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#010203"  # stands for the page's text colour, put in when a figure goes into a page
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "momentum_lm",  # the same figure gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


Panel = Callable[[Any], None]  # draws into a matplotlib Axes


def draw(*panels: Panel) -> Figure:
    """One figure with the panels side by side."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4 * len(panels), 4.0), layout="constrained")
        for place, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            place.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
            place.margins(y=0.08)
            panel(place)
            place.legend(frameon=False)
        return figure


def perplexity_panel(series: Mapping[str, Sequence[tuple[int, float]]], split: str = "valid") -> Panel:
    """Perplexity over context length, in tokens: ``series`` maps a model's name to its (context length, perplexity) points."""

    def panel(axes: Any) -> None:
        axes.set(xlabel="context length (tokens)", ylabel=f"perplexity per token ({split}), lower is better")
        for index, (name, points) in enumerate(series.items()):
            lengths, values = zip(*sorted(points), strict=True)
            axes.plot(lengths, values, label=name, marker=_MARKERS[index % len(_MARKERS)], markersize=5, **_line(index))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({length for points in series.values() for length, _ in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.ticklabel_format(axis="y", useOffset=False)

    return panel


def loss_panel(curves: Mapping[str, Sequence[tuple[float, float]]], levels: Mapping[str, float] | None = None) -> Panel:
    """Training loss in nats per token over tokens seen: one curve a name.

    A name's text up to the first `` seed`` picks its look: repetitions of one model look the same and share one legend entry.
    ``levels`` are horizontal lines to compare with, such as the unigram model's loss.
    """

    def panel(axes: Any) -> None:
        axes.set(xlabel="tokens seen", ylabel="training loss (nats per token)")
        looks: dict[str, int] = {}
        for name, points in curves.items():
            model = name.split(" seed")[0]
            label = None if model in looks else model
            tokens, losses = zip(*points, strict=True) if points else ((), ())
            axes.plot(tokens, losses, label=label, alpha=0.9, **_line(looks.setdefault(model, len(looks))))
        for name, level in (levels or {}).items():
            axes.axhline(level, color="#888888", linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="right")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))

    return panel


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture on a white ground, atomically."""
    with atomic_write(path, "wb") as file:
        FigureCanvasAgg(figure)
        figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """An ``<svg>`` element for an HTML page: transparent, its text in the page's colour, as wide as the page lets it
    be."""
    with matplotlib.rc_context(_STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)


def _line(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "linestyle": _LINES[index % len(_LINES)], "linewidth": 1.6}


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
