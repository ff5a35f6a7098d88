"""``predictions.jsonl`` of a results folder, read line by line."""

from __future__ import annotations

import os
from array import array
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.errors import UserError, arg

from .records import PREDICTIONS, prediction, prediction_lines
from .schema import RECORDS

KEY = RECORDS["icl_classification"].key


@dataclass(frozen=True)
class Answers:
    """What one run answered: index, gold and predicted class of its examples, each (n,), in the order of their
    indices."""

    index: NDArray[np.int64]
    gold: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.gold == self.predicted


def run_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a run, or a line of predictions, from those of others."""
    return tuple(run[name] for name in KEY)


def _which(key: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(KEY, key, strict=True))


def read_answers(folder: str | os.PathLike[str], runs: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Answers]:
    """{:func:`run_key`: answers} of these runs of a folder; memory grows with their answers, not with the file's other
    lines.

    Raises UserError where the file is missing or damaged, lacks answers of a run, or contradicts its accuracy.
    """
    path = Path(folder) / PREDICTIONS
    found: dict[tuple[Hashable, ...], tuple[array[int], array[int], array[int]]]
    found = {run_key(run): (array("q"), array("q"), array("q")) for run in runs}
    try:
        for number, line in prediction_lines(path):
            entry, wrong = prediction(line)
            if not wrong and not entry.keys() >= set(KEY):
                wrong = f"no {next(name for name in KEY if name not in entry)}"
            if wrong:
                if not line.endswith(b"\n"):
                    break  # an evaluation that goes on, or was interrupted, in a run that is not wanted
                raise UserError(f"{path}, line {number} is damaged ({wrong}); run the evaluation again")
            columns = found.get(run_key(entry))
            if columns is not None:
                for column, name in zip(columns, ("index", "gold", "pred"), strict=True):
                    column.append(entry[name])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; run the evaluation again") from error
    answers = {}
    for run in runs:
        key = run_key(run)
        index, gold, predicted = (np.array(column, dtype=np.int64) for column in found[key])
        examples = len(np.unique(index))
        if not examples == len(index) == run["num_examples"]:
            raise UserError(
                f"{path} answers {examples:,} examples in {len(index):,} lines for {_which(key)}, but "
                f"{run['num_examples']:,} were evaluated; "
                "run the evaluation again"
            )
        right, told = int((gold == predicted).sum()), run["accuracy"] * len(gold)
        if abs(right - told) > 1e-6 * len(gold):
            raise UserError(
                f"{path} is damaged: for {_which(key)} {right:,} of {len(gold):,} answers are right, {told:,.6g} by "
                "results.json; evaluate again with ",
                arg(force=True),
            )
        order = np.argsort(index)
        answers[key] = Answers(index[order], gold[order], predicted[order])
    return answers
