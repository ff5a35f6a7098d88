"""Figures that can be read in greyscale, on paper and on dark screens: every series has its own line style and
marker."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from momentum_lm.analysis.statistics import Interval
from momentum_lm.files import atomic_write
from momentum_lm.results.ownership import PICTURE, check_ours
from momentum_lm.results.schema import PositionLoss
from momentum_lm.untrusted import legible

# Okabe and Ito's colours that have contrast on white and on near-black alike
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#010203"  # stands for the page's text colour, put in when a figure goes into a page
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names are text, whatever dollars are in them
    "text.usetex": False,
    "svg.hashsalt": "momentum_lm",  # the same figure gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


_LONGEST = 60  # characters of a name in a figure

SIZE = (4.3, 3.5)  # inches: on a narrow telephone the text of a figure of this width is still 11 pixels high

Panel = Callable[[Any], None]  # draws into a matplotlib Axes


def shown(name: str, most: int = _LONGEST) -> str:
    """A name as a figure can hold it: one line, not too long, and not hidden from a legend by a ``_`` at its
    beginning."""
    cut = legible(name, most, "\ufffd")
    return f"\u2009{cut}" if cut.startswith("_") else cut


def draw(*panels: Panel, size: tuple[float, float] = SIZE, columns: int | None = None) -> Figure:
    """One figure with the panels side by side, in rows of ``columns`` if given, each of ``size`` (inches)."""
    with matplotlib.rc_context(_STYLE):
        columns = min(columns or len(panels), len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for unused in places[len(panels) :]:
            unused.set_axis_off()
        for place, panel in zip(places, panels, strict=False):
            place.grid(True, color="#888888", alpha=0.25, linewidth=0.6)
            place.margins(y=0.08)
            panel(place)
            if place.get_legend_handles_labels()[0] and place.get_legend() is None:
                place.legend(frameon=False)
        return figure


def set_title(axes: Any, title: str) -> None:
    """Above a panel, at its left."""
    axes.set_title(shown(title), fontsize=11, loc="left")


def perplexity_panel(series: Mapping[str, Sequence[tuple[int, float]]], split: str = "valid") -> Panel:
    """Perplexity over context length, in tokens: ``series`` maps a model's name to its (context length, perplexity)
    points."""

    def panel(axes: Any) -> None:
        axes.set(xlabel="context length (tokens)", ylabel=f"perplexity per token ({shown(split, 18)})")
        for index, (name, points) in enumerate(series.items()):
            lengths, values = zip(*sorted(points), strict=True)
            axes.plot(
                lengths,
                values,
                label=shown(name),
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                **line_style(index),
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(
            FixedLocator(sorted({length for points in series.values() for length, _ in points}))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.ticklabel_format(axis="y", useOffset=False)
        _legend_below(axes)

    return panel


def position_panel(curves: Mapping[str, Sequence[PositionLoss]], title: str = "") -> Panel:
    """Mean loss over the place in a block: a curve a name, of the parts of a results file, if it has any."""

    def panel(axes: Any) -> None:
        axes.set(xlabel="place in the block (tokens)", ylabel="loss (nats per token)")
        set_title(axes, title)
        for index, (name, parts) in enumerate(curves.items()):
            if not parts:  # its look stays its own
                continue
            ends = [part["end"] for part in parts]
            places = [math.sqrt((start + 1) * end) for start, end in itertools.pairwise([0, *ends])]
            style = line_style(index) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            axes.plot(places, [part["loss"] for part in parts], label=shown(name), **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(
            FixedLocator(sorted({part["end"] for parts in curves.values() for part in parts})[::-2])
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        _legend_below(axes)

    return panel


def gap_panel(curves: Mapping[str, Sequence[tuple[float, float]]], title: str = "") -> Panel:
    """Training loss with something minus that without, in nats per token, over tokens seen: one curve a name.

    A name's text up to the first `` seed`` picks its look: repetitions of one model look the same and share one legend
    entry. The first twentieth of the tokens, where losses fall too fast to be compared, may lie outside.
    """

    def panel(axes: Any) -> None:
        axes.set(xlabel="tokens seen", ylabel="difference (nats per token)")
        set_title(axes, title)
        axes.axhline(0, color="#888888", linewidth=1.2, linestyle=(0, (4, 3)))
        looks: dict[str, int] = {}
        most, seen = max((points[-1][0] for points in curves.values() if points), default=0.0), [0.0]
        for name, points in curves.items():
            model = name.split(" seed")[0]
            label = None if model in looks else shown(model)
            tokens, gaps = zip(*points, strict=True) if points else ((), ())
            axes.plot(tokens, gaps, label=label, alpha=0.9, **line_style(looks.setdefault(model, len(looks))))
            seen += [gap for place, gap in points if place > most / 20 and math.isfinite(gap)]
        room = 0.1 * (max(seen) - min(seen)) or 1.0
        axes.set_ylim(min(seen) - room, max(seen) + room)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        _legend_below(axes)

    return panel


def interval_panel(
    series: Mapping[str, Sequence[tuple[float, Interval]]], labels: tuple[str, str], title: str = ""
) -> Panel:
    """Estimates with their intervals over a positive number, on a logarithmic axis: a line a name, beside each other
    where they would hide each other. ``labels``: of both axes."""

    def panel(axes: Any) -> None:
        axes.set(xlabel=shown(labels[0]), ylabel=shown(labels[1]))
        set_title(axes, title)
        axes.axhline(0, color="#888888", linewidth=1.2, linestyle=(0, (4, 3)))
        for index, (name, points) in enumerate(series.items()):
            places = [place * (1 + 0.02 * (index - (len(series) - 1) / 2)) for place, _ in points]
            style = line_style(index) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 5}
            axes.vlines(
                places, [g.low for _, g in points], [g.high for _, g in points], color=style["color"], alpha=0.6, lw=1.2
            )
            axes.plot(places, [g.estimate for _, g in points], label=shown(name), **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        _legend_below(axes)

    return panel


def pairs_panel(
    pairs: Mapping[str, Sequence[tuple[float, float]]], ends: tuple[str, str], unit: str, title: str = ""
) -> Panel:
    """What a change does to positive values: for each name a line from their geometric mean without it to that with it,
    at two ``ends``, and a faint one for each single pair."""

    def panel(axes: Any) -> None:
        axes.set(ylabel=shown(unit), xlim=(-0.25, 1.25))
        set_title(axes, title)
        for index, (name, values) in enumerate(pairs.items()):
            style = line_style(index) | {"marker": MARKERS[index % len(MARKERS)]}
            for single in values if len(values) > 1 else ():
                axes.plot((0, 1), single, alpha=0.35, **(style | {"linewidth": 1.0, "markersize": 3}))
            axes.plot((0, 1), np.exp(np.log(values).mean(0)), label=shown(name), **(style | {"linewidth": 2.2}))
        axes.set_xticks((0, 1), [shown(end, 24) for end in ends])
        _legend_below(axes)

    return panel


@dataclass(frozen=True)
class AccuracyPoint:
    """Accuracy at one number of shots: mean, 95% interval, and the value of each seed, all as fractions."""

    shots: int
    mean: float
    low: float
    high: float
    seeds: Sequence[float] = ()


def accuracy_panel(
    lines: Mapping[str, Sequence[AccuracyPoint]],
    title: str = "",
    level: tuple[str, float] | None = None,
    what: str | None = None,
) -> Panel:
    """Accuracy in percent over shots: for each name a line, bars for its interval and faint dots for the seeds.

    ``level``: name and height of what needs no model, dashed. ``what`` the names are, above them. Shots are spaced by
    log(1 + shots), which has a place for 0.
    """

    def panel(axes: Any) -> None:
        axes.set(xlabel="demonstrations in the prompt (shots)", ylabel="accuracy (%)")
        set_title(axes, title)
        every = sorted({point.shots for points in lines.values() for point in points})
        for index, (name, points) in enumerate(lines.items()):
            if not points:
                continue
            ordered = sorted(points, key=lambda point: point.shots)
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            shift = 0.07 * (index - (len(lines) - 1) / 2)  # side by side where they would hide each other
            places = [math.log2(1 + point.shots) + shift for point in ordered]
            mean, low, high = (100 * np.array([getattr(p, name) for p in ordered]) for name in ("mean", "low", "high"))
            axes.vlines(places, low, high, color=colour, linewidth=1.2, alpha=0.75)
            dots = [(place, 100 * value) for place, point in zip(places, ordered, strict=True) for value in point.seeds]
            if dots:
                axes.scatter(*zip(*dots, strict=True), s=16, color=colour, alpha=0.4, linewidth=0)
            axes.plot(places, mean, label=shown(name), marker=marker, markersize=5, **line_style(index))
        if level is not None:
            name, height = level
            axes.axhline(
                100 * height,
                color="#888888",
                linewidth=1.2,
                linestyle=(0, (4, 3)),
                label=f"{shown(name)} {100 * height:.1f}",
            )
        axes.xaxis.set_major_locator(FixedLocator([math.log2(1 + shots) for shots in every]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value - 1:.0f}"))
        axes.margins(x=0.06)
        _legend_below(axes, what)

    return panel


def confusion_panel(counts: Sequence[Sequence[int]], labels: Sequence[str], title: str = "") -> Panel:
    """A confusion matrix, gold class by row: in each cell the percentage of its row, unless 0, which is also its shade.

    counts (C, C) with as many labels. The shade is never so dark that the page's text colour, dark or light, is hard to
    read on it.
    """

    def panel(axes: Any) -> None:
        table = np.asarray(counts, dtype=np.float64)
        totals = table.sum(axis=1)
        shares = table / np.maximum(totals, 1)[:, None]
        size = 10.5
        for row, column in np.ndindex(*table.shape):
            share = shares[row, column]
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=COLOURS[0], alpha=0.7 * share, linewidth=0)
            )
            if share >= 0.005:
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=size)
        names = [shown(label, 18) for label in labels]
        turned = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) * len(names) > 30 else {}
        )
        axes.set_xticks(range(len(names)), names, fontsize=size, **turned)
        rows = [f"{name} ({total:,.0f})" for name, total in zip(names, totals, strict=True)]
        axes.set_yticks(range(len(names)), rows, fontsize=size)
        axes.set(xlabel="predicted", ylabel="gold (examples)", aspect="equal")
        set_title(axes, title)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color("#888888")

    return panel


def save_png(figure: Figure, path: str | os.PathLike[str], replace: bool = True) -> None:
    """Writes a picture on a white ground, atomically; without ``replace`` in place of nothing but one of ours."""
    if not replace:
        check_ours(path, PICTURE)
    with atomic_write(path, "wb") as file, matplotlib.rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": PICTURE.decode()})


def read_png(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """What :func:`save_png` wrote: (height, width, 3), red, green, blue."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def to_svg(figure: Figure) -> str:
    """An ``<svg>`` element for an HTML page: transparent, its text in the page's colour, as wide as the figure is or
    the page lets it be."""
    with matplotlib.rc_context(_STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="([^"]*)"', r'\1 style="max-width: \2"', svg, count=1)


def _legend_below(axes: Any, title: str | None = None) -> None:
    """Nowhere within a panel is free for certain."""
    columns = legend_columns(axes.get_legend_handles_labels()[1])
    axes.legend(frameon=False, ncols=columns, title=title, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def legend_columns(names: Sequence[str]) -> int:
    """In how many columns, at most three, a legend of these names is not wider than its figure."""
    return max(1, min(3, len(names), 44 // (6 + max(map(len, names), default=1))))


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and width of the line with this number, as ``plot`` takes them."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _LINES[index % len(_LINES)], "linewidth": 1.6}


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
