"""Which examples are shown as demonstrations, in which order, and which are evaluated: the same for the same seed, anywhere."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from momentum_lm.data.classification import Example
from momentum_lm.errors import UserError

PAPER_EVALUATED = 2000  # the authors evaluate no more of a split
log = logging.getLogger(__name__)
T = TypeVar("T")


def select(
    train: Sequence[Example],
    shots: int,
    seed: int,
    sampling: str = "random",
    num_labels: int | None = None,
    order: int = 0,
) -> list[Example]:
    """``shots`` examples of ``train``, drawn with ``seed``.

    random: the first of a permutation by NumPy's PCG64, which are those of ``datasets.Dataset.shuffle(seed)`` that the authors of
    arXiv 2212.10559 take; more shots keep the fewer ones in front. balanced: as many of each label as of any other, but for one more of
    some, which the seed chooses; more shots keep the fewer ones too, in a new order. ``num_labels``: how many labels there are; default:
    those that occur. ``order`` 0 leaves the order as drawn, another number permutes it, by (seed, order).

    Raises UserError for more shots than examples, a negative seed and, if balanced, a label without an example. Warns of labels that
    are not shown because there are fewer shots.
    """
    if shots > len(train):
        raise UserError(f"{shots} shots (--shots): the training split has no more than {len(train)} examples")
    if seed < 0:
        raise UserError(f"seed {seed} (--seeds): must not be negative")
    if not shots:
        return []
    generator = np.random.default_rng(seed)
    permutation = generator.permutation(len(train)).tolist()
    drawn = _balanced(train, permutation, shots, num_labels, generator) if sampling == "balanced" else permutation[:shots]
    if order:
        drawn = [drawn[i] for i in np.random.default_rng([seed, order]).permutation(shots)]
    return [train[i] for i in drawn]


def evaluation_subset(examples: Sequence[T], limit: int | None, seed: int = 1, protocol_paper: bool = False) -> list[T]:
    """The examples that are evaluated: all, or a sample of ``limit`` of them in the order of the file.

    ``protocol_paper``: as the authors do, the first 2000 (or ``limit``, if that is less) after a shuffle with ``seed``, in this order.
    """
    permutation = np.random.default_rng(seed).permutation(len(examples))
    if protocol_paper:
        return [examples[i] for i in permutation[:PAPER_EVALUATED][:limit]]
    return [examples[i] for i in sorted(permutation[:limit])]


def _balanced(
    train: Sequence[Example], permutation: Sequence[int], shots: int, num_labels: int | None, generator: np.random.Generator
) -> list[int]:
    """Takes one example of each label in turn, until there are enough; a label that has no more is passed over."""
    waiting: dict[int, list[int]] = defaultdict(list)
    for index in reversed(permutation):
        waiting[train[index].gold].append(index)
    labels = list(range(num_labels)) if num_labels else sorted(waiting)
    missing = [label for label in labels if label not in waiting]
    if missing:
        raise UserError(
            f"--sampling balanced: the training split has no example of {len(missing)} of {len(labels)} labels (number "
            f"{', '.join(map(str, missing[:10]))}, counted from 0); use --sampling random, or another training split"
        )
    if shots < len(labels):
        log.warning("%d shots for %d labels: %d of them have no demonstration", shots, len(labels), len(labels) - shots)
    turns = [labels[i] for i in generator.permutation(len(labels))]
    drawn: list[int] = []
    while len(drawn) < shots:
        drawn += [waiting[label].pop() for label in turns if waiting[label]][: shots - len(drawn)]
    return [drawn[i] for i in generator.permutation(shots)]
