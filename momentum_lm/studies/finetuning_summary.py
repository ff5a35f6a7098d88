"""ICL against finetuning in numbers: means over layers and seeds with intervals, and differences from the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.per_example import column_means, spread_over_seeds
from momentum_lm.analysis.statistics import ratio_difference_interval, ratio_interval, t_interval, wilson_interval

from .controls import CONTROLS

Run = Mapping[str, Any]
Setting = tuple[str, int]  # dataset, shots
Estimate = dict[str, Any]

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
MEANINGS = {  # corrected; AUTHORS adds what the authors' form does otherwise
    "simaou": "cosine of what ICL and what FT change in a layer's attention output.",
    "simaou_relaxed": "SimAOU where ICL's attention has no softmax, as in the paper's algebra.",
    "simam": "cosine of the attention logits of ICL and FT, over the test example's own tokens.",
    "simam_delta": "cosine of what ICL and FT change in the attention logits over the test example's own tokens "
    "(arXiv 2311.07772).",
    "simam_delta_centred": "cosine of what ICL and FT change in the attention logits over the test example's own "
    "tokens, less each row's mean, on which no attention depends (arXiv 2311.07772).",
    "kendall": "rank correlation, over the demonstrations' tokens, of ICL's attention to them with the inner products "
    "of FT's attention queries in training and in the test.",
    "kendall_example": "rank correlation, over whole demonstrations, of ICL's attention to them with those inner "
    "products of FT's attention queries.",
    "recall_at_k": "of the 100 demonstrations' tokens with the most attention in context, the share among the first "
    "100 by the inner products of FT's attention queries; 0 by chance, 1 at best.",
    "recall_at_k_example": "of the 5 demonstrations with the most attention in context, the share among the first 5 "
    "by the inner products of FT's attention queries; 0 by chance, 1 at best.",
    "dw_similarity": "cosine, per head, of what demonstrations in the prompt would add to the weights of attention "
    "without softmax (the sum of their values times their keys) and what finetuning adds through its keys and values.",
    "relaxation_cosine": "cosine of what a head puts out in context without and with softmax: how far the paper's "
    "algebra is from the model.",
    "relaxation_ratio": "ratio of the lengths of what a head puts out in context without and with softmax.",
}
AUTHORS = {
    "simaou": " Outputs are divided by their lengths first, which makes unrelated changes look alike.",
    **dict.fromkeys(("kendall", "kendall_example"), " Attention is summed over heads first."),
    **dict.fromkeys(("recall_at_k", "recall_at_k_example"), " Not corrected: chance is above 0."),
}
EVIDENCE = ("simaou", "simam_delta_centred", "kendall", "dw_similarity")  # what the conclusions are drawn from


def settings(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """The runs of each dataset and number of shots, by seed: datasets in the order of their first runs."""
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    grouped: dict[Setting, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (datasets.index(run["dataset"]), run["shots"], run["seed"])):
        grouped.setdefault((run["dataset"], run["shots"]), []).append(run)
    return grouped


def layers(run: Run, metric: str, part: str = "corrected", control: str | None = None) -> NDArray[np.float64] | None:
    """A metric by layer, (L,), NaN where undefined; None where the run has no such metric or control.

    ``control``: one of :data:`CONTROLS`, of which some are metrics of the run itself, and the rest its ``baselines``.
    """
    source, name = _where(run, metric, control)
    values = source.get(part, {}).get(name)
    return None if values is None else np.asarray(values, dtype=np.float64)


def _where(run: Run, metric: str, control: str | None) -> tuple[Mapping[str, Any], str]:
    """The part of a run that holds a metric of a control, and the metric's name there."""
    if control is None or CONTROLS[control].of_run:
        return run, metric if control is None else f"{metric}_{control}"
    return (run["baselines"] or {}).get(control) or {}, metric


def over_layers(run: Run, metric: str, part: str = "corrected", control: str | None = None) -> float | None:
    """Mean over the layers where the metric is defined; None if none."""
    values = layers(run, metric, part, control)
    return None if values is None or np.isnan(values).all() else float(np.nanmean(values))


def bands(runs: Sequence[Run], metric: str, part: str, control: str | None = None) -> NDArray[np.float64] | None:
    """Mean, low and high by layer, (3, L): Student's interval over seeds; for one seed its own over examples, if
    recorded."""
    found = [(run, row) for run in runs if (row := layers(run, metric, part, control)) is not None]
    rows = [row for _, row in found]
    if not rows or all(np.isnan(row).all() for row in rows):
        return None
    if len(rows) > 1:
        spread = spread_over_seeds(np.stack(rows))
        return np.stack([spread.estimate, spread.low, spread.high])
    source, name = _where(found[0][0], metric, control)
    ends = source.get(f"{part}_ci95", {}).get(name)
    low_high = _ends(ends) if ends else np.full((2, rows[0].size), np.nan)
    return np.stack([rows[0], *low_high])


def estimate(
    values: Sequence[float | None], over_examples: Sequence[float] | None = None, share: bool = False
) -> Estimate:
    """``mean``, ``ci95`` and what it is ``over``, ``sd``, ``min``, ``max`` and ``num``, the number of seeds that have a
    value.

    The interval is Student's over seeds, cut to [0, 1] for a ``share``. For one seed, and where all agree, which does
    not remove all doubt, it is ``over_examples``, if given. What is not known is null.
    """
    known = [value for value in values if value is not None]
    found: Estimate = {
        "mean": None,
        "ci95": None,
        "over": None,
        "sd": None,
        "min": None,
        "max": None,
        "num": len(known),
    }
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
    """:func:`estimate` of the mean over layers. For one seed the interval is the mean of the layers' own over examples,
    which is no narrower than that of their mean."""
    band = bands(runs, name, part, control) if len(runs) == 1 else None
    known = None if band is None else band[1:][:, ~np.isnan(band[1:]).any(axis=0)]
    ends = None if known is None or known.size == 0 else known.mean(axis=1).tolist()
    return estimate([over_layers(run, name, part, control) for run in runs], ends)


def difference(runs: Sequence[Run], name: str, control: str) -> Estimate:
    """Corrected metric minus a control, paired by seed. For one seed the control counts as known: its own doubt is left
    out."""
    pairs = [(over_layers(run, name), over_layers(run, name, control=control)) for run in runs]
    gaps = [None if a is None or b is None else a - b for a, b in pairs]
    ends, level = (metric(runs, name)["ci95"], pairs[0][1]) if len(runs) == 1 else (None, None)
    return estimate(gaps, None if ends is None or level is None else [end - level for end in ends])


def accuracy(runs: Sequence[Run], setting: str) -> Estimate:
    """:func:`estimate` of a setting's accuracy; where seeds agree, as they do zero-shot, Wilson's interval over
    examples."""
    values = [run["accuracy"][setting] for run in runs]
    interval = wilson_interval(round(values[0] * runs[0]["num_examples"]), runs[0]["num_examples"])
    return estimate(values, [interval.low, interval.high], share=True)


def rec2ftp(runs: Sequence[Run]) -> Estimate:
    """Of what finetuning puts right under all seeds together, the share that ICL puts right; each seed counts by how
    much that is."""
    return _share(*_repairs(runs)[:2])


def chance(runs: Sequence[Run]) -> Estimate:
    """Of all zero-shot errors under all seeds together, the share that ICL puts right: what Rec2FTP would be by
    chance."""
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
        ends = [max(-1.0, interval.low), min(1.0, interval.high)]  # of shares
        return estimate([gap]) | {"ci95": ends, "over": "seeds", "num": len(runs)}
    return estimate([gap], [end - level["mean"] for end in recall["ci95"]])


def _repairs(runs: Sequence[Run]) -> list[NDArray[np.int64]]:
    """By seed: repaired by ICL of what finetuning repairs, what that is, repaired by ICL of all zero-shot errors, and
    these."""
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
    """The ``summary`` of results.json: {dataset: {shots: {"num_seeds", "num_examples", "accuracy", "rec2ftp",
    "rec2ftp_chance", "rec2ftp_above_chance", "paper", "corrected", "baselines", "differences"}}}, of :func:`estimate`;
    ``differences`` are corrected minus control, by metric and control."""
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
            control: {n: e for n in names["corrected"] if (e := metric(chosen, n, control=control))["num"]}
            for control in controls
        }
        entry["differences"] = {
            name: {control: gap for control in CONTROLS if (gap := difference(chosen, name, control))["num"]}
            for name in METRICS
        }
        found.setdefault(dataset, {})[str(shots)] = entry
    return found


def _ends(pairs: Sequence[Sequence[float | None] | None]) -> NDArray[np.float64]:
    """[[low, high] a layer] as (2, L), NaN for null."""
    rows = [(np.nan, np.nan) if pair is None else [np.nan if end is None else end for end in pair] for pair in pairs]
    return np.asarray(rows, dtype=np.float64).T


def mean_heads(runs: Sequence[Run], name: str) -> NDArray[np.float64] | None:
    """A metric by layer and head, mean over seeds, (L, H); None where it was not kept."""
    tables = [run["heads"][name] for run in runs if name in (run.get("heads") or {})]
    return column_means(np.asarray(tables, dtype=np.float64))[0] if tables else None
