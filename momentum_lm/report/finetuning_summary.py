"""ICL against finetuning in numbers: means over layers and seeds with intervals, differences from the controls, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.per_example import column_means, spread_over_seeds
from momentum_lm.analysis.statistics import ratio_difference_interval, ratio_interval, t_interval, wilson_interval

Run = Mapping[str, Any]
Setting = tuple[str, int]  # dataset, shots
Estimate = dict[str, Any]

TASK = "icl_finetune_analysis"
SETTINGS = {"zero_shot": "zero-shot", "finetuned": "finetuned", "in_context": "in context"}
PARTS = ("paper", "corrected")
METRICS = {  # in the order of the tables
    "simaou": "SimAOU",
    "simaou_relaxed": "SimAOU, relaxed attention",
    "simam": "SimAM",
    "simam_delta": "SimAM-delta",
    "simam_delta_centred": "SimAM-delta, centred",
    "kendall": "Kendall, tokens",
    "kendall_example": "Kendall, demonstrations",
    "recall_at_k": "recall@100, tokens",
    "recall_at_k_example": "recall@5, demonstrations",
    "dw_similarity": "cos(dW_ICL, dW_FT)",
    "relaxation_cosine": "relaxed vs softmax, cosine",
    "relaxation_ratio": "relaxed vs softmax, length",
}
UNITS = {  # of the metrics' axes; the rest are cosines
    **dict.fromkeys(("kendall", "kendall_example"), "rank correlation (tau)"),
    **dict.fromkeys(("recall_at_k", "recall_at_k_example"), "recall (share)"),
    "relaxation_ratio": "ratio of lengths",
}
EVIDENCE = ("simaou", "simam_delta_centred", "kendall", "dw_similarity")  # what the conclusions are drawn from
# Without learning from the right labels, ICL and FT should have nothing in common; the others are other ways of learning.
NULLS = {"random": "random", "before": "before finetuning", "untrained": "untrained", "shuffled_labels": "shuffled labels"}
OTHERS = {"lcgd": "LCGD", "all_parameters": "all parameters"}
CONTROLS = NULLS | OTHERS


def settings(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """The runs of each dataset and number of shots, by seed: datasets in the order of their first runs."""
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    grouped: dict[Setting, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (datasets.index(run["dataset"]), run["shots"], run["seed"])):
        grouped.setdefault((run["dataset"], run["shots"]), []).append(run)
    return grouped


def layers(run: Run, metric: str, part: str = "corrected", control: str | None = None) -> NDArray[np.float64] | None:
    """A metric by layer, (L,), NaN where undefined; None where the run has no such metric or control.

    ``control``: ``random`` and ``before`` are metrics of the run itself, the rest are its ``baselines``.
    """
    values: Any
    if control in ("random", "before"):
        values = run[part].get(f"{metric}_{control}")
    elif control is not None:
        values = ((run["baselines"] or {}).get(control) or {}).get(part, {}).get(metric)
    else:
        values = run[part].get(metric)
    return None if values is None else np.asarray(values, dtype=np.float64)


def over_layers(run: Run, metric: str, part: str = "corrected", control: str | None = None) -> float | None:
    """Mean over the layers where the metric is defined; None if none."""
    values = layers(run, metric, part, control)
    return None if values is None or np.isnan(values).all() else float(np.nanmean(values))


def bands(runs: Sequence[Run], metric: str, part: str, control: str | None = None) -> NDArray[np.float64] | None:
    """Mean, low and high by layer, (3, L): Student's interval over seeds; for one seed its own over examples, if recorded."""
    found = [(run, row) for run in runs if (row := layers(run, metric, part, control)) is not None]
    rows = [row for _, row in found]
    if not rows or all(np.isnan(row).all() for row in rows):
        return None
    if len(rows) > 1:
        spread = spread_over_seeds(np.stack(rows))
        return np.stack([spread.estimate, spread.low, spread.high])
    own = control in (None, "random", "before")
    source = found[0][0] if own else found[0][0]["baselines"][control]
    ends = source.get(f"{part}_ci95", {}).get(f"{metric}_{control}" if own and control else metric)
    low_high = _ends(ends) if ends else np.full((2, rows[0].size), np.nan)
    return np.stack([rows[0], *low_high])


def estimate(values: Sequence[float | None], over_examples: Sequence[float] | None = None, share: bool = False) -> Estimate:
    """``mean``, ``ci95`` and what it is ``over``, ``sd``, ``min``, ``max`` and ``num``, the number of seeds that have a value.

    The interval is Student's over seeds, cut to [0, 1] for a ``share``. For one seed, and where all agree, which does not remove all
    doubt, it is ``over_examples``, if given. What is not known is null.
    """
    known = [value for value in values if value is not None]
    found: Estimate = {"mean": None, "ci95": None, "over": None, "sd": None, "min": None, "max": None, "num": len(known)}
    if not known:
        return found
    found |= {"mean": float(np.mean(known)), "min": min(known), "max": max(known)}
    if len(known) > 1:
        found["sd"] = float(np.std(known, ddof=1))
    if max(known) > min(known):
        interval = t_interval(known)
        low, high = (max(0.0, interval.low), min(1.0, interval.high)) if share else (interval.low, interval.high)
        found |= {"ci95": [low, high], "over": "seeds"}
    elif over_examples is not None:
        found |= {"ci95": list(over_examples), "over": "examples"}
    return found


def metric(runs: Sequence[Run], name: str, part: str = "corrected", control: str | None = None) -> Estimate:
    """:func:`estimate` of the mean over layers. For one seed the interval is the mean of the layers' own over examples, which is no
    narrower than that of their mean."""
    band = bands(runs, name, part, control) if len(runs) == 1 else None
    known = None if band is None else band[1:][:, ~np.isnan(band[1:]).any(axis=0)]
    ends = None if known is None or known.size == 0 else known.mean(axis=1).tolist()
    return estimate([over_layers(run, name, part, control) for run in runs], ends)


def difference(runs: Sequence[Run], name: str, control: str) -> Estimate:
    """Corrected metric minus a control, paired by seed. For one seed the control counts as known: its own doubt is left out."""
    pairs = [(over_layers(run, name), over_layers(run, name, control=control)) for run in runs]
    gaps = [None if a is None or b is None else a - b for a, b in pairs]
    ends, level = (metric(runs, name)["ci95"], pairs[0][1]) if len(runs) == 1 else (None, None)
    return estimate(gaps, None if ends is None or level is None else [end - level for end in ends])


def accuracy(runs: Sequence[Run], setting: str) -> Estimate:
    """:func:`estimate` of a setting's accuracy; where seeds agree, as they do zero-shot, Wilson's interval over examples."""
    values = [run["accuracy"][setting] for run in runs]
    interval = wilson_interval(round(values[0] * runs[0]["num_examples"]), runs[0]["num_examples"])
    return estimate(values, [interval.low, interval.high], share=True)


def rec2ftp(runs: Sequence[Run]) -> Estimate:
    """Of what finetuning puts right under all seeds together, the share that ICL puts right; each seed counts by how much that is."""
    return _share(*_repairs(runs)[:2])


def chance(runs: Sequence[Run]) -> Estimate:
    """Of all zero-shot errors under all seeds together, the share that ICL puts right: what Rec2FTP would be by chance."""
    return _share(*_repairs(runs)[2:])


def above_chance(runs: Sequence[Run]) -> Estimate:
    """Rec2FTP minus chance, paired by seed. For one seed chance counts as known: its own doubt is left out."""
    recall, level = rec2ftp(runs), chance(runs)
    if recall["mean"] is None or level["mean"] is None:
        return estimate([])
    gap = recall["mean"] - level["mean"]
    if recall["over"] == "seeds":
        recovered, recoverable, repaired, wrong = _repairs(runs)
        interval = ratio_difference_interval(recovered, recoverable, repaired, wrong)
        return estimate([gap]) | {"ci95": [interval.low, interval.high], "over": "seeds", "num": len(runs)}
    return estimate([gap], [end - level["mean"] for end in recall["ci95"]])


def _repairs(runs: Sequence[Run]) -> list[NDArray[np.int64]]:
    """By seed: repaired by ICL of what finetuning repairs, what that is, repaired by ICL of all zero-shot errors, and these."""
    wrong = np.stack([_cells(run)[0] for run in runs])  # (n, ICL, FT)
    return [wrong[:, 1, 1], wrong[:, :, 1].sum(1), wrong[:, 1].sum(1), wrong.sum((1, 2))]


def _share(parts: NDArray[np.int64], wholes: NDArray[np.int64]) -> Estimate:
    """:func:`estimate` of part / whole of all seeds together. Where no two seeds differ the interval is Wilson's."""
    known = wholes > 0
    found = estimate((parts[known] / wholes[known]).tolist(), share=True)
    if not known.any():
        return found
    wilson = wilson_interval(int(parts.sum()), int(wholes.sum()))
    found |= {"mean": wilson.estimate, "ci95": [wilson.low, wilson.high], "over": "examples"}
    if found["max"] > found["min"]:
        interval = ratio_interval(parts, wholes)
        found |= {"ci95": [max(0.0, interval.low), min(1.0, interval.high)], "over": "seeds"}
    return found


def cells(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Examples of all seeds by whether zero-shot, in context and finetuned are right about them: (2, 2, 2)."""
    return np.sum([_cells(run) for run in runs], axis=0)


def _cells(run: Run) -> NDArray[np.int64]:
    return np.asarray(run["rec2ftp_counts"]["cells"], dtype=np.int64)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The ``summary`` of results.json: {dataset: {shots: {"num_seeds", "num_examples", "accuracy", "rec2ftp", "rec2ftp_chance",
    "rec2ftp_above_chance", "paper", "corrected", "baselines", "differences"}}}, of :func:`estimate`; ``differences`` are corrected minus
    control, by metric and control."""
    found: dict[str, Any] = {}
    for (dataset, shots), chosen in settings(runs).items():
        names = {part: list(dict.fromkeys(name for run in chosen for name in run[part])) for part in PARTS}
        controls = list(dict.fromkeys(name for run in chosen for name in run["baselines"] or {}))
        entry: dict[str, Any] = {"num_seeds": len(chosen), "num_examples": chosen[0]["num_examples"]}
        entry["accuracy"] = {setting: accuracy(chosen, setting) for setting in SETTINGS}
        entry["rec2ftp"] = rec2ftp(chosen)
        entry |= {"rec2ftp_chance": chance(chosen), "rec2ftp_above_chance": above_chance(chosen)}
        entry |= {part: {name: metric(chosen, name, part) for name in names[part]} for part in PARTS}
        entry["baselines"] = {
            control: {n: e for n in names["corrected"] if (e := metric(chosen, n, control=control))["num"]} for control in controls
        }
        entry["differences"] = {
            name: {control: gap for control in CONTROLS if (gap := difference(chosen, name, control))["num"]} for name in METRICS
        }
        found.setdefault(dataset, {})[str(shots)] = entry
    return found


# ---- what the numbers say


def place(gap: Estimate) -> str:
    """Where a difference lies: ``above`` or ``below`` zero with its whole interval, ``level`` if not, ``unknown`` without an interval."""
    if gap["ci95"] is None:
        return "unknown"
    low, high = gap["ci95"]
    return "above" if low > 0 else "below" if high < 0 else "level"


def headlines(runs: Sequence[Run]) -> list[str]:
    """A sentence for each kind of evidence, over all settings."""
    groups = list(settings(runs).values())
    sentences = []
    places = [place(gap) for chosen in groups if (gap := above_chance(chosen))["num"]]
    if places:
        side = _sides({"chance (what ICL repairs of all zero-shot errors)": places})
        sentences.append(f"Predictions: Rec2FTP {side}.")
    for name in EVIDENCE:
        beside = {}
        for control, title in NULLS.items():
            places = [place(gap) for chosen in groups if (gap := difference(chosen, name, control))["num"]]
            if places:
                beside[title] = places
        values = [value["mean"] for chosen in groups if (value := metric(chosen, name))["mean"] is not None]
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
    zero, ft, icl = (accuracy(runs, setting)["mean"] for setting in SETTINGS)
    sentences.append(f"Accuracy: {100 * zero:.1f}% zero-shot, {100 * ft:.1f}% finetuned, {100 * icl:.1f}% in context.")
    sentences.append(_rec2ftp_sentence(runs))
    authors, before = metric(runs, "simam", "paper")["mean"], metric(runs, "simam", "paper", "before")["mean"]
    if authors is not None and before is not None:
        sentences.append(
            f"SimAM in the authors' form is {three(authors)}, and {three(before)} before any finetuning: "
            "only what exceeds the latter can be finetuning's doing."
        )
    for name in EVIDENCE:
        value = metric(runs, name)
        if value["mean"] is None:
            continue
        authors = metric(runs, name, "paper")["mean"] if name == "simaou" else None
        text = f"{METRICS[name]}, corrected, is {number(value)}"
        text += f", and {three(authors)} in the authors' form" if authors is not None else ""
        sides: dict[str, list[str]] = {}
        for control, title in NULLS.items():
            gap = difference(runs, name, control)
            if gap["num"]:
                level = metric(runs, name, control=control)["mean"]
                sides.setdefault(place(gap), []).append(f"{title} ({three(level)})")
        parts = [f"{words} {', '.join(sides[side])}" for side, words in _SIDES.items() if side in sides]
        sentences.append(text + (": " + "; ".join(parts) if parts else "; no control was run") + ".")
    return sentences


def _rec2ftp_sentence(runs: Sequence[Run]) -> str:
    counts = cells(runs)
    recovered, recoverable = int(counts[0, 1, 1]), int(counts[0, :, 1].sum())
    if recoverable == 0:
        return "Finetuning puts nothing right that was wrong zero-shot, so there is nothing for Rec2FTP to recover."
    value, level, gap = rec2ftp(runs), chance(runs), above_chance(runs)
    words = {"above": "lies above it", "below": "lies below it", "level": "cannot be told from it"}[place(gap)]
    return (
        f"Of {recoverable:,} errors that finetuning repairs ICL repairs {recovered:,}: Rec2FTP is {number(value, percent=True)}. "
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


def _ends(pairs: Sequence[Sequence[float | None] | None]) -> NDArray[np.float64]:
    """[[low, high] a layer] as (2, L), NaN for null."""
    rows = [(np.nan, np.nan) if pair is None else [np.nan if end is None else end for end in pair] for pair in pairs]
    return np.asarray(rows, dtype=np.float64).T


def mean_heads(runs: Sequence[Run], name: str) -> NDArray[np.float64] | None:
    """A metric by layer and head, mean over seeds, (L, H); None where it was not kept."""
    tables = [run["heads"][name] for run in runs if name in (run.get("heads") or {})]
    return column_means(np.asarray(tables, dtype=np.float64))[0] if tables else None
