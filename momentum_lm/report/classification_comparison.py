"""In-context classification side by side: several results folders, or several settings of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.classification import AccuracyDifference, compare_accuracy
from momentum_lm.analysis.statistics import Interval
from momentum_lm.errors import UserError, arg
from momentum_lm.results.predictions import Answers, read_answers, run_key
from momentum_lm.studies.classification_summary import Run, baseline, cells, summarise_cell
from momentum_lm.studies.tasks import CHOICE

from .classification import INTERVALS, TASK, interval_text, percent, points, results_table
from .figures import accuracy_panel, draw, to_svg
from .html import Dot, Folded, Forest, Gallery, Picture, Reference
from .skeleton import Comparison, Folder, Sections, differ
from .tables import Table, counted

VARIABLES = ("shots", "calibration")
_READING = (
    "{intervals} Differences are in percentage points from {first}, over the same examples, paired by seed and order "
    "of demonstrations. "
    "The interval over examples (cluster bootstrap: an example is drawn with all its runs) says what other examples "
    "would give with these "
    "demonstrations; the one over seeds (Student's, of the seeds' differences) what other demonstrations would give on "
    "these examples (with --fresh-queries: on others). "
    "p: exact McNemar test where there is one pair of runs, else of the bootstrap, and then at least 0.0002."
)

Setting = tuple[Any, ...]  # of a row: dataset, shots and calibration, but for what the sides differ in


@dataclass(frozen=True)
class Side:
    """What stands beside others: a name, its folder, its runs by setting, seed and order, and whether each seed has
    queries of its own.
    """

    name: str
    folder: Path
    runs: dict[Setting, dict[tuple[int, int], Run]]
    fresh: bool

    def of_draw(self, setting: Setting, draw: tuple[int, int]) -> Run | None:
        """The run of a seed and order; without demonstrations there is one for all orders, and mostly for all seeds."""
        runs = self.runs[setting]
        one = next(iter(runs.values()))
        if one["shots"]:
            return runs.get(draw)
        return runs.get((draw[0], 0)) if self.fresh else one


class ClassificationComparison(Comparison):
    """Accuracies of two or more sides; differences are from the first.

    The sides are ``folders``, or with ``between``, such as ``("calibration", ["none", "batch"])`` or its text on a
    command line, ``"shots=4,16"``, settings within the one folder named. Raises UserError as its base, for settings
    that a folder does not hold, for sides without a run in common, and for sides that evaluated different examples or
    differ in their gold labels.
    """

    task, title = TASK, "In-context classification, side by side"

    def __init__(
        self,
        folders: Sequence[Folder],
        names: Sequence[str] | None = None,
        seed: int = 0,
        between: str | tuple[str, Sequence[Any]] | None = None,
    ) -> None:
        super().__init__(folders, names, seed)
        between = parse_between(between) if isinstance(between, str) else between
        self.varied = between[0] if between else None
        if between is not None:
            self.sides = list(self._settings(*between))
            self.names = [str(self.folders[0])]
        else:
            named = zip(self.names, self.folders, self.results, strict=True)
            self.sides = [Side(n, p, self._settings_of(r["runs"]), _fresh(r)) for n, p, r in named]
        self.differences: dict[tuple[Setting, int], AccuracyDifference] = {}  # by setting and number of the side
        self.pairs: dict[tuple[Setting, int], list[tuple[Run, Run]]] = {}
        if len(self.sides) > 1:
            self._compare()

    def table(self) -> Table:
        """A row for each setting and side; that of :func:`results_table` for a single side."""
        if len(self.sides) == 1:
            return results_table(self.results[0]["runs"])
        rows = []
        for setting in self._all_settings():
            for number, side in enumerate(self.sides):
                if setting in side.runs:
                    cell = summarise_cell(list(side.runs[setting].values()))
                    row = self._names(setting, side) | {CHOICE.title: percent(cell["mean"])}
                    row["95% interval"] = interval_text(cell["ci95"])
                    rows.append(row | self._difference(self.differences.get((setting, number))))
        return Table.of(rows)

    def _names(self, setting: Setting, side: Side) -> dict[str, str]:
        """The first cells of a row."""
        varied = [name for name in ("dataset", *VARIABLES) if name != self.varied]
        return dict(zip(varied, map(str, setting), strict=True)) | {self.varied or "results": side.name}

    def _difference(self, difference: AccuracyDifference | None) -> dict[str, str]:
        first = f"vs {self.sides[0].name}"
        if difference is None:
            return dict.fromkeys((first, "95% over examples", "p over examples", "95% over seeds"), "")
        return {
            first: f"{100 * difference.difference:+.1f}",
            "95% over examples": _points_text(difference.over_examples),
            "p over examples": f"{difference.p_value:.2g}",
            "95% over seeds": _points_text(difference.over_seeds),
        }

    def reading(self) -> str:
        return _READING.format(intervals=INTERVALS, first=self.sides[0].name) if len(self.sides) > 1 else ""

    def sections(self) -> Sections:
        datasets = dict.fromkeys(setting[0] for setting in self._all_settings() if self.varied != "shots")
        found: Sections = {}
        if self.differences:
            forests = map(self._forest, range(1, len(self.sides)))
            found["Differences"] = [forest for forest in forests if forest is not None]
        found |= {dataset: [Gallery(list(self._figures(dataset)))] for dataset in datasets}
        if self.pairs:
            total = sum(map(len, self.pairs.values()))
            found["Every pair of runs"] = [Folded(counted(total, "pair"), [self._pairs_table()])]
        return found

    def conclusions(self) -> list[str]:
        """A sentence for each setting and side: which intervals leave out 0."""
        sentences = []
        for (setting, number), gap in self.differences.items():
            texts = intervals_text(gap)
            word = "" if is_clear(gap) else ", which is not shown to be more than chance"
            sides = f"{self._side(number)} against {self._side(0)}"
            ends = f" (95%: {texts})" if texts else ""
            sentences.append(f"{_where(setting)}: {sides} {100 * gap.difference:+.1f} points{ends}{word}.")
        return sentences

    def _side(self, number: int) -> str:
        """A side by its name, and by the noun that it needs."""
        name = self.sides[number].name
        return {"shots": f"{name} shots", "calibration": f"calibration {name}"}.get(self.varied or "", name)

    def _forest(self, number: int) -> Forest | None:
        """Differences of one side from the first, a row for each of their intervals; None where there are none."""
        dots = [
            Dot(f"{_where(setting)}, over {over}", gap.difference, (ends.low, ends.high), over)
            for (setting, side), gap in self.differences.items()
            for over, ends in intervals_of(gap).items()
            if side == number
        ]
        if not dots:
            return None
        return Forest(
            f"{self._side(number)} against {self._side(0)}:", dots,
            "difference of accuracies in percentage points, over examples and over draws.",
            Reference("no difference", 0.0), percent=(1, " points"), signed=True, unit="percentage points",
        )  # fmt: skip

    def _settings(self, variable: str, values: Sequence[Any]) -> Iterator[Side]:
        if variable not in VARIABLES:
            raise UserError(arg(between=variable), f": choose one of {' or '.join(VARIABLES)}")
        if len(self.folders) != 1:
            raise UserError(arg("between"), " compares settings within one results folder; name one")
        if len(values) < 2 or len(set(values)) < len(values):
            raise UserError(arg(between=variable), f"={','.join(map(str, values))}: name two or more different values")
        runs = self.results[0]["runs"]
        there = list(dict.fromkeys(run[variable] for run in runs))
        for value in values:
            if value not in there:
                raise UserError(
                    arg(between=variable),
                    f": {self.folders[0]} has no runs with {value}, only with {', '.join(map(str, there))}",
                )
            chosen = [run for run in runs if run[variable] == value]
            yield Side(str(value), self.folders[0], self._settings_of(chosen), _fresh(self.results[0]))

    def _settings_of(self, runs: Sequence[Run]) -> dict[Setting, dict[tuple[int, int], Run]]:
        names = [name for name in ("dataset", *VARIABLES) if name != self.varied]
        found: dict[Setting, dict[tuple[int, int], Run]] = {}
        for chosen in cells(runs).values():
            setting = tuple(chosen[0][name] for name in names)
            found[setting] = {(run["seed"], run["order"]): run for run in chosen}
        return found

    def _all_settings(self) -> list[Setting]:
        """Rows of all sides, in the order of the first that has them."""
        return list(dict.fromkeys(setting for side in self.sides for setting in side.runs))

    def _compare(self) -> None:
        for setting in self._all_settings():
            for number, side in enumerate(self.sides[1:], 1):
                pairs = self._pair(setting, side)
                if pairs:
                    self.pairs[setting, number] = pairs
                    self._note_other_texts(setting, side, pairs)
        if not self.pairs:
            raise UserError(
                f"{' and '.join(side.name for side in self.sides)} have no dataset, shots, calibration, seed and order "
                "in common"
            )
        compared = {number for _, number in self.pairs}
        alone = [side.name for number, side in enumerate(self.sides[1:], 1) if number not in compared]
        self.notes += [f"{name} shares no setting with {self.sides[0].name} and is not compared." for name in alone]
        wanted: dict[int, list[Run]] = {}
        for (_, number), pairs in self.pairs.items():
            wanted.setdefault(0, []).extend(first for first, _ in pairs)
            wanted.setdefault(number, []).extend(other for _, other in pairs)
        answers = {number: read_answers(self.sides[number].folder, runs) for number, runs in wanted.items()}
        for (setting, number), pairs in self.pairs.items():
            first = [answers[0][run_key(run)] for run, _ in pairs]
            other = [answers[number][run_key(run)] for _, run in pairs]
            for (run, _), one, two in zip(pairs, first, other, strict=True):
                self._check_examples(run["dataset"], self.sides[number], one, two)
            evaluated, right = _aligned(first, other)
            seeds = [_draw(*pair)[0] for pair in pairs]
            self.differences[setting, number] = compare_accuracy(
                right[1], right[0], seeds, seed=self.seed, evaluated=evaluated
            )

    def _pair(self, setting: Setting, side: Side) -> list[tuple[Run, Run]]:
        """Runs that belong together: of the same draw. Without demonstrations all runs are the same one, which goes
        with any draw of the other side, unless each seed has queries of its own.
        """
        first, other = self.sides[0].runs.get(setting, {}), side.runs.get(setting, {})
        if not first or not other:
            return []
        zero, also = (next(iter(runs.values()))["shots"] == 0 for runs in (first, other))
        alike = zero and also and not self.sides[0].fresh and not side.fresh
        draws = list(other if zero and not also else first)[: 1 if alike else None]
        both = ((self.sides[0].of_draw(setting, draw), side.of_draw(setting, draw)) for draw in draws)
        pairs = [(one, two) for one, two in both if one is not None and two is not None]
        if alike or zero != also:
            return pairs
        where = _where(setting)
        alone = len(first) + len(other) - 2 * len(pairs)
        if alone:
            self.notes.append(
                f"{where}: {alone} runs of {self.sides[0].name} or {side.name} have no counterpart and are not "
                "compared."
            )
        shown = sum(differ(a, b, "demonstrations") or differ(a, b, "demonstrations_sha256") for a, b in pairs)
        if shown and self.varied != "shots":
            self.notes.append(
                f"{where}: {self.sides[0].name} and {side.name} saw other demonstrations in {shown} of {len(pairs)} "
                "pairs."
            )
        return pairs

    def _note_other_texts(self, setting: Setting, side: Side, pairs: Sequence[tuple[Run, Run]]) -> None:
        """Pairs are of the same examples by number and label; says where the digests of their texts differ, or are not
        there."""
        names = f"{self.sides[0].name} and {side.name}"
        other = sum(differ(a, b, "examples_sha256") for a, b in pairs)
        if other:
            self.notes.append(
                f"{_where(setting)}: {names} were evaluated on the same examples with other texts in {other} of "
                f"{len(pairs)} pairs (another template, other data, or other --max-field-tokens)."
            )
        if any("examples_sha256" not in run for pair in pairs for run in pair):
            note = f"{names}: not known to be of the same texts: results of an older version do not say which they saw."
            if note not in self.notes:
                self.notes.append(note)

    def _check_examples(self, dataset: str, side: Side, one: Answers, two: Answers) -> None:
        names = self.sides[0].name, side.name
        only = np.setxor1d(one.index, two.index)
        if only.size:
            owner = names[0] if only[0] in one.index else names[1]
            raise UserError(
                f"{dataset}: {names[0]} evaluated {one.index.size:,} examples and {names[1]} {two.index.size:,}, and "
                f"example {only[0]} is only in {owner}; evaluate both on the same examples (",
                arg("limit"),
                ", ",
                arg("protocol"),
                ")",
            )
        differing = np.flatnonzero(one.gold != two.gold)
        if differing.size:
            at = differing[0]
            raise UserError(
                f"{dataset}: the gold labels of {differing.size:,} examples differ, first that of example "
                f"{one.index[at]} "
                f"({one.gold[at]} in {names[0]}, {two.gold[at]} in {names[1]}); evaluate both on the same data"
            )

    def _figures(self, dataset: str) -> Iterator[Picture]:
        """Accuracy over shots, one line a side; a picture for each calibration, unless the sides are calibrations."""
        pictures: dict[str, dict[str, Any]] = {}
        level = None
        for side in self.sides:
            runs = [run for setting, chosen in side.runs.items() if setting[0] == dataset for run in chosen.values()]
            level = level or (baseline(runs) if runs else None)
            for calibration, line in points(runs).items():
                title = dataset if self.varied else f"{dataset}, calibration {calibration}"
                pictures.setdefault(title, {})[side.name] = line
        for title, lines in pictures.items():
            figure = draw(accuracy_panel(lines, title, level, self.varied), size=(4.3, 4.0))
            yield Picture(to_svg(figure), f"Accuracy on {title}: mean and 95% interval; faint dots are seeds.")

    def _pairs_table(self) -> Table:
        first = self.sides[0].name
        rows, names = [], dict[str, str]()
        for (setting, number), pairs in self.pairs.items():
            names = self._names(setting, self.sides[number])
            for pair, test in zip(pairs, self.differences[setting, number].tests, strict=True):
                accuracies = [percent(run[CHOICE.metric]) for run in pair]
                tests = [str(test.only_b), str(test.only_a), f"{test.p_value:.2g}"]
                rows.append([*names.values(), *map(str, _draw(*pair)), *accuracies, *tests])
        right = [f"only {first} right", "only this right", "McNemar p"]
        return Table([*names, "seed", "order", f"{first} %", "this %", *right], rows)


def parse_between(text: str) -> tuple[str, list[Any]]:
    """``calibration=none,batch`` as the variable and its values. Raises UserError for anything else."""
    variable, sign, values = text.partition("=")
    if variable not in VARIABLES or not sign or not all(values.split(",")):
        raise UserError(arg(between=text), ": say for example calibration=none,batch or shots=4,16")
    if variable != "shots":
        return variable, values.split(",")
    if not all(value.isdecimal() for value in values.split(",")):
        raise UserError(arg(between=text), ": shots are whole numbers")
    return variable, [int(value) for value in values.split(",")]


def _where(setting: Setting) -> str:
    return ", ".join(counted(value, "shot") if isinstance(value, int) else value for value in setting)


def _fresh(results: dict[str, Any]) -> bool:
    return bool(results["config"].get("fresh_queries"))


def _aligned(first: Sequence[Answers], other: Sequence[Answers]) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_]]:
    """Which of all examples each pair of runs was evaluated on, (r, n), None where it is all of them; and whether the
    first and the other of a pair are right about them, (2, r, n)."""
    examples = np.unique(np.concatenate([each.index for each in first]))
    if all(len(each.index) == len(examples) for each in first):
        return None, np.stack([np.stack([each.right for each in side]) for side in (first, other)])
    evaluated = np.stack([np.isin(examples, each.index) for each in first])
    right = np.zeros((2, *evaluated.shape), dtype=bool)
    for number, side in enumerate((first, other)):
        for row, each in enumerate(side):
            right[number, row, evaluated[row]] = each.right
    return evaluated, right


def _draw(first: Run, other: Run) -> tuple[int, int]:
    """Seed and order of the demonstrations of a pair."""
    run = first if first["shots"] else other
    return run["seed"], run["order"]


def intervals_of(gap: AccuracyDifference) -> dict[str, Interval]:
    """What a difference's intervals are over, and they themselves; without one over draws that all agree, which would
    have no width, as if there were no doubt."""
    draws = gap.over_seeds
    known = {"examples": gap.over_examples, "draws": draws if draws and draws.high - draws.low > 1e-9 else None}
    return {over: ends for over, ends in known.items() if ends is not None}


def intervals_text(gap: AccuracyDifference) -> str:
    """The intervals of a difference in points, each with what it is over; empty where there are none."""
    return "; ".join(f"{_points_text(ends)} over {over}" for over, ends in intervals_of(gap).items())


def is_clear(gap: AccuracyDifference) -> bool:
    """Whether a difference has intervals, and none of them holds 0."""
    intervals = intervals_of(gap).values()
    return bool(intervals) and all(ends.low > 0 or ends.high < 0 for ends in intervals)


def _points_text(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
