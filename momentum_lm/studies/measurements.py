"""What is measured of one finetuned model, and the records made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis import metrics
from momentum_lm.analysis.per_example import PerExample, nullable
from momentum_lm.analysis.statistics import wilson_interval
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.icl.engine import Scores

from .tasks import CHOICE

SETTINGS = ("zero_shot", "in_context", "finetuned")
PARTS = (
    "paper",
    "corrected",
    "heads",
)  # metrics by layer in the authors' form, corrected, and the latter's by layer and head


class Measurements:
    """Scores in the three settings and metrics by example; ``broken``: the finetuned model gives no finite
    probabilities."""

    def __init__(self, examples: int) -> None:
        self.metrics = {part: PerExample(examples) for part in PARTS}
        self.sums: dict[str, dict[int, list[float]]] = {setting: {} for setting in SETTINGS}
        self.outputs: dict[int, NDArray[np.float16]] = {}
        self.shares: dict[int, NDArray[np.float32]] = {}
        self.losses: list[float] = []
        self.scores: dict[str, Scores] = {}
        self.broken = False

    @classmethod
    def join(cls, parts: Sequence[Measurements], losses: list[float]) -> Measurements:
        """What several processes measured of one model."""
        whole = cls(parts[0].metrics["paper"].examples)
        whole.losses = losses
        for part in parts:
            whole.broken |= part.broken
            whole.outputs |= part.outputs
            whole.shares |= part.shares
            for setting in SETTINGS:
                whole.sums[setting] |= part.sums[setting]
            for name in PARTS:
                whole.metrics[name].merge(part.metrics[name].arrays)
        return whole

    def finite(self, setting: str) -> bool:
        """Whether the model gave a probability to every choice."""
        return all(np.isfinite(sums).all() for sums in self.sums[setting].values())

    def lines(self, examples: Sequence[Example], score: str) -> Iterator[dict[str, Any]]:
        """Every example's prediction in every setting."""
        for setting in SETTINGS:
            lines = CHOICE.predictions(examples, self.scores[setting].values(score))
            yield from ({"setting": setting} | line for line in lines)

    def report(self, examples: Sequence[Example], score: str) -> dict[str, Any]:
        """Accuracies, Rec2FTP and the metrics by layer, with intervals over examples."""
        gold = np.array([example.gold for example in examples])
        right = {setting: CHOICE.answers(self.scores[setting].values(score)) == gold for setting in SETTINGS}
        recall = metrics.rec2ftp(*(right[setting] for setting in SETTINGS))
        result: dict[str, Any] = {
            "accuracy": {setting: float(values.mean()) for setting, values in right.items()},
            "accuracy_ci95": {
                setting: _ends(wilson_interval(int(values.sum()), len(gold))) for setting, values in right.items()
            },
            "rec2ftp": recall.value,
            "rec2ftp_ci95": _ends(recall.wilson),
            "rec2ftp_bootstrap_ci95": _ends(recall.bootstrap),
            "rec2ftp_chance": recall.chance,
            "rec2ftp_counts": {
                "recovered": recall.recovered,
                "recoverable": recall.recoverable,
                "cells": recall.cells.tolist(),
            },
            "finetune_losses": self.losses,
        }
        if recall.value is None:
            result["note"] = (
                "finetuning put nothing right that was wrong zero-shot, so there is nothing for Rec2FTP to recover"
            )
        for part in ("paper", "corrected"):
            kept = self.metrics[part]
            bands = {name: kept.bands(name) for name in kept}
            result[part] = {name: nullable(band.estimate) for name, band in bands.items()}
            result[f"{part}_ci95"] = {
                name: [nullable(np.array(ends)) for ends in zip(band.low, band.high, strict=True)]
                for name, band in bands.items()
            }
        heads = self.metrics["heads"]
        result["heads"] = {name: nullable(heads.mean(name)) for name in heads}
        return result


def record(
    main: Measurements, baselines: Mapping[str, Measurements | None], examples: Sequence[Example], score: str
) -> dict[str, Any]:
    """One entry of ``runs``, without what names it. A baseline that diverged is null. ``attention``: the shares of
    attention that a few examples give to each demonstration, (L, M), in context and by finetuning, as means over
    heads."""
    result = {"num_examples": len(examples), **main.report(examples, score)}
    result["attention"] = [
        {"index": examples[i].index, "in_context": _rounded(shares[0]), "finetuned": _rounded(shares[1])}
        for i, shares in sorted(main.shares.items())
    ]
    result["baselines"] = {
        name: None if measured is None else measured.report(examples, score) for name, measured in baselines.items()
    }
    return result


def _rounded(values: NDArray[np.float32]) -> list[list[float]]:
    return [[round(value, 5) for value in row] for row in values.tolist()]


def _ends(interval: Any) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]
