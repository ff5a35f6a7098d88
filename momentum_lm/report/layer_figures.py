"""Figures of ICL against finetuning: similarities by layer and by head, and which errors both repair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from .figures import COLOURS, MARKERS, Panel, legend_columns, line_style, set_title, shown

_NEUTRAL = "#888888"  # as far from white as from black


@dataclass(frozen=True)
class Curve:
    """One value a layer with the ends of its interval, (L,) each; NaN where there is none. ``look`` numbers colour,
    line and marker."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    look: int = 0


def layer_panel(curves: Mapping[str, Curve], title: str = "", log: bool = False, unit: str = "") -> Panel:
    """A value over layers, numbered from 1: a line for each name, which stands at its end unless it is long, and a band
    for the first; zero is marked, or one on a ``log`` scale."""

    def panel(axes: Any) -> None:
        axes.set(xlabel="layer", ylabel=unit, yscale="log" if log else "linear")
        set_title(axes, title)
        axes.axhline(int(log), color=_NEUTRAL, linewidth=0.9)
        names = {name: shown(name, 30) for name in curves}
        below = max(map(len, names.values())) > _BESIDE
        for number, (name, curve) in enumerate(curves.items()):
            layers = np.arange(1, len(curve.mean) + 1)
            style, first = line_style(curve.look), number == 0
            style |= {"linewidth": 2.0 if first else 1.2, "zorder": 4 if first else 3}
            if first:
                axes.fill_between(layers, curve.low, curve.high, color=style["color"], alpha=0.22, linewidth=0)
            axes.plot(
                layers,
                curve.mean,
                label=names[name] if below and len(curves) > 1 else None,
                marker=MARKERS[curve.look % len(MARKERS)],
                markersize=3,
                **style,
            )
            axes.set_xlim(0.4, len(layers) + 0.6)
        if log:
            plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
        else:
            axes.set_ylim(*_limits(curves))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if below and len(curves) > 1:
            columns = legend_columns(list(names.values()))
            axes.legend(frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        elif len(curves) > 1:
            _name_lines(axes, {names[name]: curve for name, curve in curves.items()}, log)

    return panel


_ROOM = 0.085  # height of a name beside a panel, as a share of the panel's
_BESIDE = 18  # characters of a name that has room beside a panel


def _name_lines(axes: Any, curves: Mapping[str, Curve], log: bool) -> None:
    """Writes each name beside the end of its line, the names apart from one another."""
    ends = {}
    for name, curve in curves.items():
        known = np.flatnonzero(np.isfinite(curve.mean) & ((curve.mean > 0) | (not log)))
        if known.size:
            ends[name] = float(known[-1] + 1), float(curve.mean[known[-1]])
    low, high = map(math.log, axes.get_ylim()) if log else axes.get_ylim()
    heights = {name: ((math.log(value) if log else value) - low) / (high - low) for name, (_, value) in ends.items()}
    for (name, end), height in zip(
        sorted(ends.items(), key=lambda item: heights[item[0]]), _apart(sorted(heights.values()), _ROOM), strict=True
    ):
        line = {"arrowstyle": "-", "color": _NEUTRAL, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        colour = line_style(curves[name].look)["color"]
        axes.annotate(
            name, end, xytext=(1.04, height), textcoords="axes fraction", color=colour, va="center", arrowprops=line
        )


def _apart(heights: Sequence[float], room: float) -> list[float]:
    """Rising numbers, moved up as little as is needed to lie ``room`` apart, and down again where they end above 1."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + room) if moved else max(height, 0.0))
    limit = 1.0
    for number in reversed(range(len(moved))):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - room
    return moved


def _limits(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Ends of an axis that shows every line, and what there is room for of the first one's band: an interval over two
    or three draws may reach much further than the lines do, and further than a cosine can.
    """
    first = next(iter(curves.values()))
    means = np.concatenate([curve.mean for curve in curves.values()])
    means = means[np.isfinite(means)]
    if not len(means):
        return -1.05, 1.05
    low, high = float(means.min()), float(means.max())
    room = max(high - low, 0.05)
    for end in (*first.low, *first.high, 0.0):  # zero is marked
        if np.isfinite(end):
            low, high = min(low, max(end, means.min() - room)), max(high, min(end, means.max() + room))
    margin = 0.05 * (high - low)
    return max(low - margin, -1.05), min(high + margin, 1.05)


def overlap_panel(cells: ArrayLike, title: str = "") -> Panel:
    """Which of zero-shot's errors finetuning (columns) and in-context learning (rows) put right: areas are numbers of
    examples.

    cells (2, 2, 2) counts examples by whether zero-shot, in context and finetuned are right. The height of the strong
    part of the left column is Rec2FTP; were it as high as in the whole, dashed, finetuning's repairs would say nothing
    about ICL's.
    """
    wrong = np.asarray(cells, dtype=np.float64)[0]  # [icl, ft]
    columns = (("finetuning repairs", wrong[:, 1], COLOURS[0]), ("finetuning does not", wrong[:, 0], COLOURS[1]))

    def panel(axes: Any) -> None:
        set_title(axes, title)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="repaired in context (%)")
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        total, gap = wrong.sum(), 0.012
        if total == 0:
            axes.set_xticks([])
            axes.text(0.5, 0.5, "zero-shot is right about every example", ha="center", va="center")
            return
        left, ticks = 0.0, []
        for name, column, colour in columns:
            count = column.sum()
            width = count / total * (1 - gap * bool(wrong[:, 0].sum() and wrong[:, 1].sum()))
            bottom = 0.0
            for share, alpha in ((column[1], 0.62), (column[0], 0.16)):
                height = share / count if count else 0.0
                axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, alpha=alpha, linewidth=0))
                if height > 0.06 and width > 0.05:
                    axes.text(
                        left + width / 2, bottom + height / 2, f"{share:,.0f}", ha="center", va="center", fontsize=11
                    )
                bottom += height
            text = f"{name}\n{count:,.0f} of {total:,.0f}"
            if count:
                ticks.append((left + width / 2, text))
                left += width + gap
        places, texts = zip(*ticks, strict=True)
        axes.set_xticks(places, texts)
        for label, place in zip(axes.get_xticklabels(), places, strict=True):
            label.set_ha("left" if place < 0.14 else "right" if place > 0.86 else "center")
        axes.tick_params(axis="x", length=0)
        chance = wrong[1].sum() / total
        axes.axhline(
            chance,
            color=_NEUTRAL,
            linewidth=1.4,
            linestyle=(0, (4, 3)),
            label=f"of all errors: {100 * chance:.1f}% (chance)",
        )
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22))

    return panel


def heads_panel(values: ArrayLike, title: str = "", xlabel: str = "head") -> Panel:
    """values (L, H), a value for each layer and head: blue above zero, orange below, the stronger the farther; a cross
    for NaN."""
    table = np.asarray(values, dtype=np.float64)
    finite = np.abs(table[np.isfinite(table)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    layers, heads = table.shape

    def shades(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(m, n) -> (m, n, 4), red, green, blue and opacity."""
        known = np.isfinite(values) & (values != 0)
        opacity = np.where(known, np.minimum(1.0, 0.05 + 0.85 * np.abs(values) / limit), 0.0)
        colours = np.where((values > 0)[..., None], to_rgb(COLOURS[0]), to_rgb(COLOURS[1]))
        return np.concatenate([colours, opacity[..., None]], axis=-1)

    def panel(axes: Any) -> None:
        set_title(axes, title)
        axes.pcolormesh(np.arange(heads + 1) + 0.5, np.arange(layers + 1) + 0.5, shades(table))
        lost = np.argwhere(~np.isfinite(table)) + 1
        if lost.size:
            axes.scatter(lost[:, 1], lost[:, 0], marker="x", s=9, color=_NEUTRAL, linewidth=0.7)
        axes.set(xlim=(0.5, heads + 0.5), ylim=(0.5, layers + 0.5), xlabel=xlabel, ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        scale = axes.inset_axes((1.03, 0.0, 0.045, 1.0))
        edges = np.linspace(-limit, limit, 34) * 34 / 33
        scale.pcolormesh([0, 1], edges, shades((edges[1:] + edges[:-1])[:, None] / 2))
        scale.set(xlim=(0, 1), ylim=(edges[0], edges[-1]), xticks=[])
        scale.yaxis.tick_right()
        scale.set_yticks([-limit, 0, limit], [f"−{limit:.2g}", "0", f"+{limit:.2g}"])
        for each in (axes, scale):
            each.grid(False)
            each.spines[:].set_visible(True)
            each.spines[:].set_color(_NEUTRAL)

    return panel
