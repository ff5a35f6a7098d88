"""Which examples are shown as demonstrations, in which order, and which are evaluated: the same for the same seed,
anywhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from momentum_lm.errors import Argument, UserError, arg
from momentum_lm.icl.datasets.loading import Example

PAPER_EVALUATED = 2000  # the authors evaluate no more of a split
POOL = 512  # training examples that are enough to draw demonstrations from
log = logging.getLogger(__name__)
T = TypeVar("T")
Identity = tuple[tuple[str, ...], tuple[str, ...]]


def select(
    train: Sequence[Example],
    shots: int,
    seed: int,
    sampling: str = "random",
    num_labels: int | None = None,
    order: int = 0,
    hidden: Collection[int] = (),
) -> list[Example]:
    """``shots`` examples of ``train``, drawn with ``seed``, without those whose places in ``train`` are ``hidden``
    (:func:`separate`).

    random: the first of a permutation by NumPy's PCG64, which are those of ``datasets.Dataset.shuffle(seed)`` that the
    authors of arXiv 2212.10559 take; more shots keep the fewer ones in front. balanced: as many of each label as of any
    other, but for one more of some, which the seed chooses; more shots keep the fewer ones too, in a new order.
    ``num_labels``: how many labels there are; default: those that occur. ``order`` 0 leaves the order as drawn, another
    number permutes it, by (seed, order).

    Raises UserError for more shots than examples, a negative seed and, if balanced, a label without an example. Warns
    of labels that are not shown because there are fewer shots.
    """
    not_evaluated: list[str | Argument] = [
        " that are not evaluated too; use a smaller ", arg("limit"), ", or another training split",
    ]  # fmt: skip
    for there, rest in ((len(train), []), (len(train) - len(hidden), not_evaluated)):
        if shots > there:
            raise UserError(arg(shots=shots), f": the training split has no more than {there} examples", *rest)
    if seed < 0:
        raise UserError(arg(seed=seed), ": must not be negative")
    if not shots:
        return []
    generator = np.random.default_rng(seed)
    permutation = [i for i in generator.permutation(len(train)).tolist() if i not in hidden]
    drawn = (
        _balanced(train, permutation, shots, num_labels, generator) if sampling == "balanced" else permutation[:shots]
    )
    if order:
        drawn = [drawn[i] for i in np.random.default_rng([seed, order]).permutation(shots)]
    return [train[i] for i in drawn]


def evaluation_subset(examples: Sequence[T], limit: int | None, seed: int = 1, protocol_paper: bool = False) -> list[T]:
    """The examples that are evaluated: all, or a sample of ``limit`` of them in the order of the file.

    ``protocol_paper``: as the authors do, the first 2000 (or ``limit``, if that is less) after a shuffle with ``seed``,
    in this order.
    """
    permutation = np.random.default_rng(seed).permutation(len(examples))
    if protocol_paper:
        return [examples[i] for i in permutation[:PAPER_EVALUATED][:limit]]
    return [examples[i] for i in sorted(permutation[:limit])]


@dataclass(frozen=True)
class Separation:
    """What is evaluated and what may be shown where the same texts are in both splits. ``hidden``: places in the
    training split of what is not shown, because it is evaluated; ``left_out``: how many examples are not evaluated,
    because they may be shown; ``shared``: how many training examples are evaluated and, as by the authors' code, may be
    shown all the same."""

    evaluated: list[Example]
    hidden: frozenset[int] = frozenset()
    left_out: int = 0
    shared: int = 0

    def counts(self) -> dict[str, int]:
        """For a record: training examples that are not shown, examples that are not evaluated, and those that are both
        all the same."""
        return {"not_shown": len(self.hidden), "not_evaluated": self.left_out, "shown_and_evaluated": self.shared}

    def notes(self) -> Iterator[str]:
        """What is to be told, a line each."""
        if self.hidden:
            yield (
                f"{len(self.hidden):,} training examples are evaluated too (the same text) and are not shown "
                "as demonstrations"
            )
        if self.left_out:
            yield (
                f"{self.left_out:,} examples are not evaluated, for demonstrations are drawn from the training "
                "split's copies of them"
            )
        if self.shared:
            yield (
                f"{self.shared:,} training examples are evaluated too (the same text) and may be "
                "demonstrations, as in the authors' code"
            )


def separate(
    train: Sequence[Example], evaluated: Sequence[Example], shots: int, protocol_paper: bool = False
) -> Separation:
    """Sees to it that no evaluated example is a demonstration, for any seed and up to ``shots`` shots, so that all of
    them are compared on the same examples. Without shots, or with more than :func:`select` allows, nothing is done.

    Examples are the same if their inputs and choices are. A training example that is evaluated is not shown. Where that
    leaves fewer than ``shots``, or less than a tenth of the training split, to draw from, as with one file for both
    splits, examples are shown and not evaluated instead: until half of the training split, or POOL examples of it, can
    be shown; and one of each label that could not be shown otherwise. They are chosen by their text alone, of each
    label in turn. ``protocol_paper``: nothing is left out, only counted.
    Raises UserError where nothing is left to evaluate.
    """
    keys = {identity(example) for example in evaluated}
    hidden = {i: key for i, example in enumerate(train) if (key := identity(example)) in keys}
    if not 0 < shots <= len(train):
        hidden = {}
    if protocol_paper or not hidden:
        return Separation(list(evaluated), shared=len(hidden))
    free = len(train) - len(hidden)
    missing = 0
    if free < max(shots, len(train) / 10):
        missing = max(shots, min((len(train) + 1) // 2, POOL)) - free
    labels = {example.gold for i, example in enumerate(train) if i not in hidden}
    all_labels = {example.gold for example in train}
    copies: dict[Identity, list[int]] = defaultdict(list)
    for i, key in hidden.items():
        copies[key].append(i)
    shown: set[Identity] = set()
    for key in _in_turn({key: train[places[0]].gold for key, places in copies.items()}):
        if missing <= 0 and labels == all_labels:
            break
        label = train[copies[key][0]].gold
        if missing > 0 or (label not in labels and len(shown) + 1 < len(keys)):
            shown.add(key)
            labels.add(label)
            missing -= len(copies[key])
    rest = [example for example in evaluated if identity(example) not in shown]
    if not rest:
        raise UserError(
            "the training split has every evaluated example, and ",
            arg(shots=shots),
            " leaves none to evaluate; use fewer, or another training split",
        )
    return Separation(rest, frozenset(i for i, key in hidden.items() if key not in shown), len(evaluated) - len(rest))


def identity(example: Example) -> Identity:
    """The same for examples with the same inputs and choices, whatever their labels and places."""
    return example.inputs, example.continuations


def _in_turn(labels: dict[Identity, int]) -> Iterator[Identity]:
    """The keys, one of each label after the other; in an order of their own, whatever the files'."""
    waiting: dict[int, list[Identity]] = defaultdict(list)
    for key in sorted(labels, key=lambda key: hashlib.sha256(ascii(key).encode()).digest(), reverse=True):
        waiting[labels[key]].append(key)
    while waiting:
        for label in sorted(waiting):
            yield waiting[label].pop()
            if not waiting[label]:
                del waiting[label]


def _balanced(
    train: Sequence[Example],
    permutation: Sequence[int],
    shots: int,
    num_labels: int | None,
    generator: np.random.Generator,
) -> list[int]:
    """Takes one example of each label in turn, until there are enough; a label that has no more is passed over."""
    waiting: dict[int, list[int]] = defaultdict(list)
    for index in reversed(permutation):
        waiting[train[index].gold].append(index)
    labels = list(range(num_labels)) if num_labels else sorted(waiting)
    missing = [label for label in labels if label not in waiting]
    if missing:
        known = train[0].continuations
        absent = [label for label in missing if all(example.gold != label for example in train)]
        what = "example" if absent else "example that is not evaluated too"
        missing = absent or missing
        words = [known[label].strip() if label < len(known) else f"number {label + 1}" for label in missing[:10]]
        raise UserError(
            arg(sampling="balanced"),
            f": the training split has no {what} of {len(missing)} of {len(labels)} labels "
            f"({', '.join(words)}{', ...' * (len(missing) > 10)}); use ",
            arg(sampling="random"),
            ", or another training split",
        )
    if shots < len(labels):
        log.warning("%d shots for %d labels: %d of them have no demonstration", shots, len(labels), len(labels) - shots)
    turns = [labels[i] for i in generator.permutation(len(labels))]
    drawn: list[int] = []
    while len(drawn) < shots:
        drawn += [waiting[label].pop() for label in turns if waiting[label]][: shots - len(drawn)]
    return [drawn[i] for i in generator.permutation(shots)]
