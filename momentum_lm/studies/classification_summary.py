"""In-context classification in numbers: means over seeds with intervals, and what needs no model to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from momentum_lm.analysis.statistics import t_interval

from .tasks import CHOICE

Run = Mapping[str, Any]
Cell = tuple[str, int, str]  # dataset, shots, calibration


def cells(runs: Sequence[Run]) -> dict[Cell, list[Run]]:
    """The runs of each dataset, number of shots and calibration: datasets and calibrations in the order of their first
    runs."""
    datasets, names = (list(dict.fromkeys(run[key] for run in runs)) for key in ("dataset", "calibration"))
    grouped: dict[Cell, list[Run]] = {}
    for run in sorted(
        runs,
        key=lambda r: (datasets.index(r["dataset"]), r["shots"], names.index(r["calibration"]), r["seed"], r["order"]),
    ):
        grouped.setdefault((run["dataset"], run["shots"], run["calibration"]), []).append(run)
    return grouped


def by_seed(runs: Sequence[Run]) -> dict[int, float]:
    """Accuracy of each seed, its orders averaged."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run["seed"], []).append(run[CHOICE.metric])
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def summarise_cell(runs: Sequence[Run]) -> dict[str, Any]:
    """``mean``, ``ci95`` and what it is ``over`` (``seeds`` or ``examples``), ``num_seeds``, ``sd``, ``min``, ``max``
    of one cell.

    The interval is Student's over seeds, cut to [0, 1]. It is Wilson's over examples for a single seed, without
    demonstrations (unless each seed has other queries), and where all seeds agree: their interval would have no width,
    as if there were no doubt. ``sd`` is null where nothing was drawn twice.
    """
    values = list(by_seed(runs).values())
    mean = float(np.mean(values))
    samples = {run.get("examples_sha256") for run in runs}
    drawn = len(values) > 1 and (runs[0]["shots"] > 0 or len(samples) > 1)
    if drawn and max(values) > min(values):
        interval, over = t_interval(values), "seeds"
    else:
        interval, over = CHOICE.interval(mean, runs[0]["num_examples"]), "examples"
    return {
        "mean": mean,
        "ci95": [max(0.0, interval.low), min(1.0, interval.high)],
        "over": over,
        "num_seeds": len(values),
        "sd": float(np.std(values, ddof=1)) if drawn else None,
        "min": min(values),
        "max": max(values),
    }


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The ``summary`` of results.json: {dataset: {shots: :func:`summarise_cell` of the first calibration, its name, and
    all of them}}."""
    found: dict[str, Any] = {}
    for (dataset, shots, calibration), chosen in cells(runs).items():
        entry = found.setdefault(dataset, {}).setdefault(str(shots), {"calibration": calibration, "by_calibration": {}})
        entry["by_calibration"][calibration] = summarise_cell(chosen)
    for of_dataset in found.values():
        for entry in of_dataset.values():
            entry |= entry["by_calibration"][entry["calibration"]]
    return found


def baseline(runs: Sequence[Run]) -> tuple[str, float]:
    """What needs no model: ("majority", share of the most frequent label), or ("chance", accuracy of guessing), of the
    queries of all runs together.
    """
    if runs[0]["majority"] is None:
        return "chance", float(np.mean([run["chance"] for run in runs]))
    if runs[0].get("confusion") is None:
        return "majority", runs[0]["majority"]
    gold = np.sum([np.sum(run["confusion"], axis=1) for run in runs], axis=0)
    return "majority", float(gold.max() / gold.sum())
