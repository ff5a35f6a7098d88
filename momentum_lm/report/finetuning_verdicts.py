"""ICL against finetuning in words: what the numbers of :mod:`momentum_lm.studies.finetuning_summary` say, and how they
are written."""

from __future__ import annotations

from collections.abc import Sequence

from momentum_lm.studies import finetuning_summary as numbers
from momentum_lm.studies.controls import CONTROLS
from momentum_lm.studies.finetuning_summary import EVIDENCE, METRICS, SETTINGS, Estimate, Run

from .tables import counted

NULLS = {name: control.title for name, control in CONTROLS.items() if control.null}


def place(gap: Estimate) -> str:
    """Where a difference lies: ``above`` or ``below`` zero with its whole interval, ``level`` if not, ``unknown``
    without an interval."""
    if gap["ci95"] is None:
        return "unknown"
    low, high = gap["ci95"]
    return "above" if low > 0 else "below" if high < 0 else "level"


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What came out over all settings, how sure it is and what could be done next, in sentences."""
    groups = numbers.settings(runs)
    sentences = [text for setting, chosen in groups.items() for text in _similarity_sentences(*setting, chosen)]
    places = [place(gap) for chosen in groups.values() if (gap := numbers.above_chance(chosen))["num"]]
    if len(groups) > 1 and places:
        sentences.append(
            "ICL is shown to repair what finetuning repairs more often than other errors in "
            f"{places.count('above')} of {counted(len(places), 'setting')} where finetuning repairs anything."
        )
    draws = sorted({len(chosen) for chosen in groups.values()})
    examples = sorted({run["num_examples"] for run in runs})
    few = ""
    if draws[0] == 1:
        few = " With one draw the controls' own doubt is left out, and nothing is known of other demonstrations."
    if draws[0] < 5:
        few += " More draws (--seeds 1,2,...,10) would say more."
    sentences.append(f"How sure: {_span(draws, 'draw')} of demonstrations, {_span(examples, 'example')} each.{few}")
    return sentences


_SIDES = {"below": "below", "level": "not told apart from", "unknown": "no interval beside"}


def _similarity_sentences(dataset: str, shots: int, runs: Sequence[Run]) -> list[str]:
    """Which similarities of a setting exceed all of their controls."""
    above, rest, bare = list[str](), list[str](), list[str]()
    tested = []
    for name in EVIDENCE:
        if numbers.metric(runs, name)["mean"] is None:
            continue
        gaps = {control: numbers.difference(runs, name, control) for control in NULLS}
        sides = {NULLS[control]: place(gap) for control, gap in gaps.items() if gap["num"]}
        failed = [
            f"{words} {', '.join(controls)}"
            for side, words in _SIDES.items()
            if (controls := [control for control, its in sides.items() if its == side])
        ]
        if not sides:
            bare.append(METRICS[name])
            continue
        tested.append(METRICS[name])
        if failed:
            rest.append(f"{METRICS[name]} ({'; '.join(failed)})")
        else:
            above.append(METRICS[name])
    where = f"{dataset}, {counted(shots, 'shot')}"
    sentences = []
    if tested:
        found = f"{'; '.join(above)} ({len(above)} of {len(tested)})"
        sentences.append(
            f"{where}: similarities of ICL and finetuning above every control: {found}."
            if above
            else f"{where}: none of the tested similarities of ICL and finetuning lies above every control "
            f"({'; '.join(tested)})."
        )
    if rest:
        sentences.append(f"{where}, not shown to lie above every control: {'; '.join(rest)}.")
    if bare:
        sentences.append(f"{where}, measured without a control: {'; '.join(bare)}.")
    return sentences or [f"{where}: no similarity of ICL and finetuning could be measured."]


def _span(values: Sequence[int], noun: str) -> str:
    most = counted(values[-1], noun)
    return most if values[0] == values[-1] else f"{values[0]:,} to {most}"


def verdict(runs: Sequence[Run]) -> list[str]:
    """What one setting says of accuracy and predictions, and of SimAM in the authors' form, in sentences."""
    zero, ft, icl = (numbers.accuracy(runs, setting)["mean"] for setting in SETTINGS)
    sentences = [f"Accuracy: {100 * zero:.1f}% zero-shot, {100 * ft:.1f}% finetuned, {100 * icl:.1f}% in context."]
    sentences.append(_rec2ftp_sentence(runs))
    authors, before = (numbers.metric(runs, "simam", "paper", control)["mean"] for control in (None, "before"))
    if authors is not None and before is not None:
        sentences.append(
            f"SimAM in the authors' form is {three(authors)}, and {three(before)} before any finetuning: "
            "only what exceeds the latter can be finetuning's doing."
        )
    return sentences


def _rec2ftp_sentence(runs: Sequence[Run]) -> str:
    counts = numbers.cells(runs)
    recovered, recoverable = int(counts[0, 1, 1]), int(counts[0, :, 1].sum())
    if recoverable == 0:
        return "Finetuning puts nothing right that was wrong zero-shot, so there is nothing for Rec2FTP to recover."
    value, level, gap = numbers.rec2ftp(runs), numbers.chance(runs), numbers.above_chance(runs)
    words = {"above": "lies above it", "below": "lies below it", "level": "cannot be told from it"}[place(gap)]
    over = f"Over {len(runs)} draws together, of" if len(runs) > 1 else "Of"
    return (
        f"{over} {counted(recoverable, 'error')} that finetuning repairs ICL repairs {recovered:,}: Rec2FTP is "
        f"{number(value, percent=True)}. ICL repairs {number(level, percent=True)} of all zero-shot errors, the level "
        f"that chance would give; Rec2FTP {words} (difference {signed(gap, percent=True)} points)."
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
