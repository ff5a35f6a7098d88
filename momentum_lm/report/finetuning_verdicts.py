"""ICL against finetuning in words: what the numbers of :mod:`momentum_lm.studies.finetuning_summary` say, and how they
are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from momentum_lm.studies import finetuning_summary as numbers
from momentum_lm.studies.controls import CONTROLS
from momentum_lm.studies.finetuning_summary import EVIDENCE, METRICS, SETTINGS, Estimate, Run

NULLS = {name: control.title for name, control in CONTROLS.items() if control.null}


def place(gap: Estimate) -> str:
    """Where a difference lies: ``above`` or ``below`` zero with its whole interval, ``level`` if not, ``unknown``
    without an interval."""
    if gap["ci95"] is None:
        return "unknown"
    low, high = gap["ci95"]
    return "above" if low > 0 else "below" if high < 0 else "level"


def headlines(runs: Sequence[Run]) -> list[str]:
    """A sentence for each kind of evidence, over all settings."""
    groups = list(numbers.settings(runs).values())
    sentences = []
    places = [place(gap) for chosen in groups if (gap := numbers.above_chance(chosen))["num"]]
    if places:
        side = _sides({"chance (what ICL repairs of all zero-shot errors)": places})
        sentences.append(f"Predictions: Rec2FTP {side}.")
    for name in EVIDENCE:
        beside = {}
        for control, title in NULLS.items():
            places = [place(gap) for chosen in groups if (gap := numbers.difference(chosen, name, control))["num"]]
            if places:
                beside[title] = places
        values = [value["mean"] for chosen in groups if (value := numbers.metric(chosen, name))["mean"] is not None]
        if values:
            sentences.append(
                f"{METRICS[name]}, corrected: {_range(values)}; {_sides(beside) if beside else 'no control was run'}."
            )
    return sentences


_SIDES = {
    "above": "above",
    "level": "not distinguishable from",
    "below": "below",
    "unknown": "without an interval beside",
}


def _sides(beside: Mapping[str, Sequence[str]]) -> str:
    """In words on which side of each control a value lies, of :func:`place` for each setting: with one setting the
    side, with several in how many of them it is above.
    """
    if max(map(len, beside.values())) == 1:
        return "; ".join(
            f"{words} {', '.join(names)}"
            for side, words in _SIDES.items()
            if (names := [name for name, places in beside.items() if places[0] == side])
        )
    return "above " + ", ".join(f"{name} in {_how_many(places)}" for name, places in beside.items())


def _how_many(places: Sequence[str]) -> str:
    count, total = places.count("above"), len(places)
    if count in (0, total):
        return f"{'all' if count else 'none'} of {total} settings"
    return f"{count} of {total} settings"


def verdict(runs: Sequence[Run]) -> list[str]:
    """What the numbers of one setting say, in sentences."""
    sentences = []
    zero, ft, icl = (numbers.accuracy(runs, setting)["mean"] for setting in SETTINGS)
    sentences.append(f"Accuracy: {100 * zero:.1f}% zero-shot, {100 * ft:.1f}% finetuned, {100 * icl:.1f}% in context.")
    sentences.append(_rec2ftp_sentence(runs))
    authors, before = (numbers.metric(runs, "simam", "paper", control)["mean"] for control in (None, "before"))
    if authors is not None and before is not None:
        sentences.append(
            f"SimAM in the authors' form is {three(authors)}, and {three(before)} before any finetuning: "
            "only what exceeds the latter can be finetuning's doing."
        )
    for name in EVIDENCE:
        value = numbers.metric(runs, name)
        if value["mean"] is None:
            continue
        authors = numbers.metric(runs, name, "paper")["mean"] if name == "simaou" else None
        text = f"{METRICS[name]}, corrected, is {number(value)}"
        text += f", and {three(authors)} in the authors' form" if authors is not None else ""
        beside = {}
        for control, title in NULLS.items():
            gap = numbers.difference(runs, name, control)
            if gap["num"]:
                level = numbers.metric(runs, name, control=control)["mean"]
                beside[f"{title} ({three(level)})"] = [place(gap)]
        sentences.append(text + (f": {_sides(beside)}" if beside else "; no control was run") + ".")
    return sentences


def _rec2ftp_sentence(runs: Sequence[Run]) -> str:
    counts = numbers.cells(runs)
    recovered, recoverable = int(counts[0, 1, 1]), int(counts[0, :, 1].sum())
    if recoverable == 0:
        return "Finetuning puts nothing right that was wrong zero-shot, so there is nothing for Rec2FTP to recover."
    value, level, gap = numbers.rec2ftp(runs), numbers.chance(runs), numbers.above_chance(runs)
    words = {"above": "lies above it", "below": "lies below it", "level": "cannot be told from it"}[place(gap)]
    return (
        f"Of {recoverable:,} errors that finetuning repairs ICL repairs {recovered:,}: Rec2FTP is "
        f"{number(value, percent=True)}. "
        f"ICL repairs {number(level, percent=True)} of all zero-shot errors, which is chance; Rec2FTP {words}."
    )


def number(value: Estimate, percent: bool = False) -> str:
    """An estimate with its interval in words, such as ``0.186 (0.170 to 0.201)``; empty where there is none."""
    if value["mean"] is None:
        return ""
    form = (lambda x: f"{100 * x:.1f}") if percent else three
    text, ends = form(value["mean"]) + "%" * percent, value["ci95"]
    return text if ends is None else f"{text} ({form(ends[0])} to {form(ends[1])})"


def signed(gap: Estimate, percent: bool = False) -> str:
    """A difference with its interval in words, such as ``+0.049 (+0.024 to +0.074)``; empty where there is none."""
    if gap["mean"] is None:
        return ""
    form = (lambda x: f"{100 * x:+.1f}") if percent else (lambda x: f"{x:+.3f}")
    ends = gap["ci95"]
    return form(gap["mean"]) + ("" if ends is None else f" ({form(ends[0])} to {form(ends[1])})")


def three(value: float) -> str:
    """Three decimals, none from a hundred on, and no minus before a zero."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{round(value, 3) + 0.0:.3f}"


def _range(values: Sequence[float]) -> str:
    low, high = three(min(values)), three(max(values))
    return low if low == high else f"{low} to {high}"
