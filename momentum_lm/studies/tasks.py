"""Kinds of in-context tasks: the requests of an example, what counts as its answer, and the numbers made of
the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.classification import accuracy, confusion_matrix, macro_f1, majority_rate
from momentum_lm.analysis.statistics import Interval, wilson_interval
from momentum_lm.icl.datasets.loading import DatasetSpec, Example
from momentum_lm.icl.prompts import PromptFormat, Prompts, build
from momentum_lm.lm.protocol import LanguageModel


class TaskKind:
    """One kind of task. ``metric``: the entry of a run that summaries, intervals, figures and comparisons are about,
    and ``title`` its column; ``others``: entries with columns of their own. All are shares, shown in percent."""

    metric: str
    title: str
    others: Mapping[str, str]

    def requests(
        self, lm: LanguageModel, form: PromptFormat, demonstrations: Sequence[Example], examples: Sequence[Example]
    ) -> Prompts:
        """The requests of each example after the demonstrations. Raises UserError for what does not
        fit."""
        raise NotImplementedError

    def answers(self, outputs: Any) -> Any:
        """One answer an example, of what the model gave for each."""
        raise NotImplementedError

    def predictions(self, examples: Sequence[Example], outputs: Any) -> list[dict[str, Any]]:
        """A line of predictions.jsonl for each example, without what names its run."""
        raise NotImplementedError

    def measure(self, spec: DatasetSpec, examples: Sequence[Example], answers: Any) -> dict[str, Any]:
        """The entries of a run: the metric with its interval over examples (``ci95``), and more."""
        raise NotImplementedError

    def interval(self, value: float, examples: int) -> Interval:
        """The metric's interval over so many examples, where seeds say nothing."""
        raise NotImplementedError


class Choice(TaskKind):
    """The answer is the choice with the highest score: ``outputs`` are scores (n, C), NaN where an example has
    fewer."""

    metric, title = "accuracy", "accuracy %"
    others: Mapping[str, str] = {"macro_f1": "macro-F1 %"}

    def requests(
        self, lm: LanguageModel, form: PromptFormat, demonstrations: Sequence[Example], examples: Sequence[Example]
    ) -> Prompts:
        return build(lm, form, demonstrations, examples)

    def answers(self, outputs: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.asarray(np.nanargmax(outputs, axis=1))

    def predictions(self, examples: Sequence[Example], outputs: NDArray[np.float64]) -> list[dict[str, Any]]:
        rows = zip(examples, self.answers(outputs).tolist(), outputs.tolist(), strict=True)
        return [
            {"index": e.index, "gold": e.gold, "pred": answer, "scores": [x for x in row if x == x]}  # no NaN
            for e, answer, row in rows
        ]

    def measure(self, spec: DatasetSpec, examples: Sequence[Example], answers: NDArray[np.int64]) -> dict[str, Any]:
        """answers (n,) -> accuracy with Wilson's interval, macro-F1, confusion counts, and what needs no model to
        reach."""
        gold = np.array([example.gold for example in examples])
        interval = wilson_interval(int((gold == answers).sum()), len(gold))
        low_high = [interval.low, interval.high]
        result = {"num_examples": len(gold), "accuracy": accuracy(gold, answers), "ci95": low_high}
        if spec.labels is None:
            chance = float(np.mean([1 / len(example.continuations) for example in examples]))
            return result | {"macro_f1": None, "confusion": None, "majority": None, "chance": chance}
        return result | {
            "macro_f1": macro_f1(gold, answers),
            "confusion": confusion_matrix(gold, answers, len(spec.labels)).tolist(),
            "majority": majority_rate(gold),
        }

    def interval(self, value: float, examples: int) -> Interval:
        return wilson_interval(round(value * examples), examples)


CHOICE = Choice()
