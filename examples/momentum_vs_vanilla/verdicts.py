"""Judges a sweep as PLAN.md says: momentum (ema) against vanilla, against three taps (fir3), and against the best of
the filters that see one token back, in each form, on test text.

    python examples/momentum_vs_vanilla/verdicts.py runs/study/results_1.02e+06.json --picture verdicts.png

Prints Markdown. Comparisons whose runs are not there yet are named; p-values are corrected for all that are planned.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sweep

from momentum_lm.analysis.statistics import Interval, holm, t_interval, t_test
from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.report.figures import COLOURS, MARKERS, draw, save_png
from momentum_lm.results.ownership import PICTURE, check_ours

FORMS, RATES = ("gpt", "llama"), (3e-3, 6e-3, 1.2e-2)
ONE_LAG = ("shift", "shift_values", "kv_shift", "smear")
PLANNED = 3 * len(FORMS)  # comparisons
SELECTION_SEEDS, SEEDS, MORE_SEEDS, CONTEXT = (101, 102), range(1, 9), range(1, 17), 256
SMALLEST = 0.01  # effect of interest, of perplexity
WIDEST = {"gpt": 0.02, "llama": 0.01}  # half of an interval, of perplexity, before more seeds are run


@dataclass(frozen=True)
class Comparison:
    """ema against another variant of a form: differences of test loss, by seed (nats a token; negative: ema is better),
    and Student's interval and p-value of their mean."""

    form: str
    other: str
    rates: tuple[float, float]  # learning rates of ema and of the other
    differences: dict[int, float]

    @property
    def interval(self) -> Interval:
        return t_interval(list(self.differences.values()))

    @property
    def whole(self) -> bool:
        """Whether all planned seeds are there: what is planned is judged then."""
        return len(self.differences) >= len(SEEDS)

    def verdict(self, p: float | None) -> str:
        """``p``: corrected; None of a comparison that is not whole."""
        if p is None:
            return f"not there yet: {len(self.differences)} of {len(SEEDS)} seeds"
        low, high = math.expm1(self.interval.low), math.expm1(self.interval.high)
        if high < -SMALLEST:
            return "gain"
        if low > SMALLEST:
            return "loss"
        if low > -SMALLEST and high < SMALLEST:
            return "tie"
        if p < 0.05 and not low <= 0 <= high:
            return f"{'gain' if high < 0 else 'loss'}, its size not settled"
        return "open"


def chosen(known: dict[tuple, dict], form: str, variant: str) -> tuple[float, float] | None:
    """The learning rate of the lowest mean loss on ``valid``, and that loss; None until all planned ones were tried."""
    losses = sweep.selection(known, form, variant, SELECTION_SEEDS, CONTEXT)
    return min(losses.items(), key=lambda pair: pair[1]) if losses.keys() >= set(RATES) else None


def losses_on_test(known: dict[tuple, dict], form: str, variant: str, lr: float) -> dict[int, float]:
    """By seed, in nats a token."""
    return {
        seed: math.log(row["perplexity"])
        for (f, v, rate, seed, split, length), row in known.items()
        if (f, v, rate, split, length) == (form, variant, lr, "test", CONTEXT)
    }


def compare(known: dict[tuple, dict], form: str, other: str, seeds: Sequence[int]) -> Comparison | None:
    """None where fewer than two of the seeds of both are there."""
    ours, theirs = chosen(known, form, "ema"), chosen(known, form, other)
    if ours is None or theirs is None:
        return None
    mine, its = losses_on_test(known, form, "ema", ours[0]), losses_on_test(known, form, other, theirs[0])
    differences = {seed: mine[seed] - its[seed] for seed in seeds if seed in mine and seed in its}
    return Comparison(form, other, (ours[0], theirs[0]), differences) if len(differences) > 1 else None


def best_one_lag(known: dict[tuple, dict], form: str) -> str | None:
    """The one with the lowest loss on ``valid``; None until all four were tried."""
    found = {name: chosen(known, form, name) for name in ONE_LAG}
    return None if None in found.values() else min(found, key=lambda name: found[name][1])


def judge(known: dict[tuple, dict], seeds: Sequence[int]) -> tuple[list[Comparison], list[str]]:
    """The primary comparisons that can be made, and the names of the others."""
    made, missing = [], []
    for form in FORMS:
        for other in ("vanilla", "fir3", best_one_lag(known, form)):
            found = None if other is None else compare(known, form, other, seeds)
            if found is None:
                missing.append(f"{form}: ema against {other or 'the best filter of one lag'}")
            else:
                made.append(found)
    return made, missing


def longer(made: Sequence[Comparison], more: Sequence[Comparison]) -> list[Comparison]:
    """Each comparison, and after it the same over all of MORE_SEEDS where they were run."""
    again = {(one.form, one.other): one for one in more if len(one.differences) == len(MORE_SEEDS)}
    return [row for one in made for row in (one, again.get((one.form, one.other))) if row is not None]


def corrected(rows: Sequence[Comparison]) -> list[float | None]:
    """p-values, each corrected in the family of all planned comparisons; of one that was made twice with its own.

    None for what is not whole, which has no place in the family either: it would weaken the correction of the others.
    """
    own = {row: t_test(list(one.differences.values())) for row, one in enumerate(rows) if one.whole}
    first: dict[tuple[str, str], float] = {}
    for row, p in own.items():
        first.setdefault((rows[row].form, rows[row].other), p)
    found: list[float | None] = [None] * len(rows)
    for row, p in own.items():
        family = first | {(name := (rows[row].form, rows[row].other)): p}
        found[row] = holm(list(family.values()), PLANNED)[list(family).index(name)]
    return found


def table(rows: Sequence[Comparison]) -> str:
    """Markdown, one comparison a row."""
    lines = [
        "| form | ema against | learning rates | seeds | perplexity | 95% interval | p (Holm) | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one, p in zip(rows, corrected(rows), strict=True):
        differences, rates = list(one.differences.values()), f"{one.rates[0]:g}, {one.rates[1]:g}"
        chance = "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"
        cells = [one.form, one.other, rates, str(len(differences)), *sweep.change(differences), chance, one.verdict(p)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def forest(rows: Sequence[Comparison]):
    """A panel: a row a comparison, with its interval and a faint point a seed."""

    def panel(axes):
        axes.axvspan(-100 * SMALLEST, 100 * SMALLEST, color="#888888", alpha=0.15, lw=0)
        axes.axvline(0, color="#888888", linewidth=1.2)
        forms = list(dict.fromkeys(one.form for one in rows))
        for row, one in enumerate(rows):
            look, gap = forms.index(one.form), one.interval
            low, value, high = (100 * math.expm1(nats) for nats in (gap.low, gap.estimate, gap.high))
            seeds = [100 * math.expm1(nats) for nats in one.differences.values()]
            colour, marker = COLOURS[look], MARKERS[look]
            axes.plot(seeds, [row + 0.25] * len(seeds), marker, color=colour, alpha=0.35, markersize=4)
            axes.errorbar(value, row, xerr=[[value - low], [high - value]], fmt=marker, color=colour, capsize=3)
        axes.set_yticks(range(len(rows)), [f"{one.form}: {one.other}, n = {len(one.differences)}" for one in rows])
        axes.invert_yaxis()
        axes.set_xlabel("perplexity of ema against it (%): left is better")

    return panel


def check_picture(path: Path) -> None:
    """Raises UserError where another file has the name that a picture is to get."""
    try:
        check_ours(path, PICTURE)
    except UserError:
        raise UserError(f"--picture {path} is there and not our picture: choose another name") from None


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results_TOKENS.json of a sweep")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draws the comparisons")
    args = parser.parse_args(argv)
    if not args.results.exists():
        raise UserError(f"{args.results} does not exist: give results_TOKENS.json of a sweep's --output")
    if args.picture:
        check_picture(args.picture)
    known = sweep.results(args.results, {})
    made, missing = judge(known, SEEDS)
    if not made:
        raise UserError(f"{args.results} has no comparison of the plan yet: {'; '.join(missing)}")
    more = judge(known, MORE_SEEDS)[0]
    rows = longer(made, more)
    print(table(rows))
    for name in missing:
        print(f"not there yet: {name}")
    for form in FORMS:
        for name in dict.fromkeys(["ema", *(one.other for one in made if one.form == form)]):
            if (best := chosen(known, form, name)) and best[0] in (min(RATES), max(RATES)):
                print(f"{form}, {name}: the best learning rate, {best[0]:g}, is at an end of those tried")
    for one in made:
        gap, widest = one.interval, WIDEST[one.form]
        half = math.expm1((gap.high - gap.low) / 2)
        if half > widest and one.whole and longer([one], more) == [one]:
            print(f"{one.form}, {one.other}: the interval is +-{half:.1%}, wanted +-{widest:.0%}: the plan adds seeds")
    if args.picture:
        save_png(draw(forest(rows), size=(6.5, 0.5 * len(rows) + 1.2)), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
