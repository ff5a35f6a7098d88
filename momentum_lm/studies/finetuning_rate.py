"""Selection of the finetuning learning rate: by zero-shot accuracy of the finetuned model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from momentum_lm.errors import UserError, arg
from momentum_lm.icl import engine
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.icl.finetuning import Diverged
from momentum_lm.icl.prompts import PromptFormat, Prompts, build
from momentum_lm.results.processes import Processes

from .traces import Learned, TracedModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A learning rate; ``selected_on``: ``given``, ``train`` (held out) or ``evaluation``; ``grid``: what each rate
    scored."""

    rate: float
    selected_on: str
    grid: list[dict[str, Any]]


def choose(
    lm: TracedModel,
    form: PromptFormat,
    examples: Sequence[Example],
    selected_on: str,
    rates: Sequence[float],
    finetune: Callable[[float], Learned],
    score: str,
    batch_tokens: int | None,
    processes: Processes,
    name: str,
) -> Choice:
    """The rate with the highest zero-shot accuracy on ``examples`` after ``finetune(rate)``; of equals the one with the
    lower loss of the right choices, then the smaller one. A rate that diverges is logged and passed over. Raises
    UserError where all of them do.
    """
    if len(rates) == 1:
        return Choice(rates[0], "given", [])
    if not examples:
        raise UserError(
            f"{name}: no training examples are left to choose a learning rate on; give one with ",
            arg("rates"),
        )
    prompts = build(lm, form, [], examples)
    gold = np.array([example.gold for example in examples])
    grid: list[dict[str, Any]] = []
    for rate in rates:
        try:
            with finetune(rate).applied():
                table = _scores(lm, prompts, score, batch_tokens, processes)
            if table is None:
                raise Diverged("the finetuned model gives probabilities of 0 or NaN")
        except Diverged as error:
            if processes.first:
                _log.warning("%s: learning rate %g diverges (%s); going on without it", name, rate, error)
            grid.append({"lr": rate, "accuracy": None, "loss": None, "diverged": str(error)})
            continue
        processes.alive()
        accuracy = float((np.nanargmax(table, axis=1) == gold).mean())
        grid.append({"lr": rate, "accuracy": accuracy, "loss": float(-table[np.arange(len(gold)), gold].mean())})
    usable = [entry for entry in grid if entry["accuracy"] is not None]
    if not usable:
        raise UserError(
            f"{name}: finetuning diverges at every learning rate ({', '.join(f'{r:g}' for r in rates)}); try "
            "smaller ones with ", arg("rates"),
        )  # fmt: skip
    best = min(usable, key=lambda entry: (-entry["accuracy"], entry["loss"], entry["lr"]))
    return Choice(best["lr"], selected_on, grid)


def _scores(lm: TracedModel, prompts: Prompts, score: str, batch_tokens: int | None, processes: Processes) -> Any:
    """(n, C) scores in every process; None where the model is broken."""
    budget = batch_tokens or engine.query_budget(lm, prompts.queries)
    batches = engine.plan(prompts.queries, processes.from_first(budget))
    found: dict[int, list[float]] = {}
    sums: dict[int, list[float]] | None = found
    try:
        numbers = range(processes.rank, len(batches), processes.world)
        for _, answers in engine.score_batches(lm, prompts.queries, batches, numbers=numbers):
            found |= engine.log_probs(answers)
            processes.alive()
    except UserError:  # the one thing that it complains of: the other processes must hear of it too
        sums = None
    parts = processes.gather(sums)
    table = None
    if processes.first and all(part is not None for part in parts):
        table = engine.collect(
            prompts.queries, {query: values for part in parts for query, values in part.items()}
        ).values(score)
    return processes.from_first(table)
