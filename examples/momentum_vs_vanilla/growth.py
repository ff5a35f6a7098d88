"""Does a gain last as training goes on, and at larger sizes? Compares training losses of a sweep, tenth by tenth.

    python examples/momentum_vs_vanilla/growth.py runs/study/results_*.json --picture growth.png

Runs of a seed see the same batches in the same order, so that their training losses are compared on the same tokens,
which are new to them for as long as training is in its first epoch. Prints Markdown.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import sweep
import verdicts

from momentum_lm.analysis.statistics import Interval, t_interval
from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.report.figures import draw, interval_panel, save_png
from momentum_lm.untrusted import parse_json

SHOWN = (1, 2, 4, 6, 8, 10)  # tenths in the table


@dataclass(frozen=True)
class Curve:
    """A variant against another: of each tenth of training the mean difference of training losses over seeds (nats a
    token; negative: the variant is better), with Student's 95% interval. ``tokens``: where each tenth ends."""

    form: str
    variant: str
    other: str
    source: str  # the folder of the results
    context: int
    tokens: list[float]
    gaps: list[Interval]


class Sweep(NamedTuple):
    """A results file: its folder's name, its rows, on how many tokens its models were trained, and their context."""

    source: str
    known: dict[tuple, dict]
    tokens: float
    context: int

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        if not path.exists():
            raise UserError(f"{path} does not exist: give results_TOKENS.json of a sweep's --output")
        known = sweep.results(path, {})
        tokens = parse_json(path.read_bytes())["settings"].get("tokens")
        if not isinstance(tokens, float):
            raise UserError(f"{path} does not say on how many tokens its models were trained")
        context = max((row["context_length"] for row in known.values()), default=0)
        return cls(path.resolve().parent.name, known, tokens, context)


def losses(known: dict[tuple, dict], form: str, variant: str) -> dict[int, list[float]]:
    """Training losses by seed, of the runs that results are of. Raises UserError where those have several rates."""
    rows = [
        row for row in known.values() if (row["form"], row["variant"]) == (form, variant) and row["split"] == "test"
    ]
    rates = sorted({row["lr"] for row in rows})
    if len(rates) > 1:
        raise UserError(f"{variant} ({form}) has test results at the learning rates {rates}: keep those of one")
    return {row["seed"]: row["training_loss"] for row in rows if row.get("training_loss")}


def compare(one: Sweep, form: str, variant: str, other: str) -> Curve | None:
    """None where fewer than two seeds of both are there. Raises UserError where two runs logged differently."""
    ours, theirs = losses(one.known, form, variant), losses(one.known, form, other)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    parts, *others = {len(by_seed[seed]) for by_seed in (ours, theirs) for seed in seeds}
    if others:
        raise UserError(f"the training losses of {variant} and {other} ({form}) have different numbers of parts")
    gaps = [t_interval([ours[seed][part] - theirs[seed][part] for seed in seeds]) for part in range(parts)]
    ends = [one.tokens * (part + 1) / len(gaps) for part in range(len(gaps))]
    return Curve(form, variant, other, one.source, one.context, ends, gaps)


def table(curves: Sequence[Curve]) -> str:
    """Markdown, one curve a row: perplexity in some tenths of training against the other's."""
    head = ["results in", "form", "variant", "against", "context", "tokens", "seeds", *(f"{part}/10" for part in SHOWN)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in curves:
        parts = [one.gaps[part - 1] for part in SHOWN if part <= len(one.gaps)]
        cells = [f"{sweep.percent(p.estimate)} ({sweep.percent(p.low)} to {sweep.percent(p.high)})" for p in parts]
        numbers = [str(one.context), f"{one.tokens[-1]:.3g}", str(one.gaps[0].size)]
        words = [one.source, one.form, one.variant, one.other, *numbers, *cells]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def names(curves: Sequence[Curve]) -> list[str]:
    """Of each curve its form, and what else tells it from the others."""
    told = [
        {"context": str(one.context), "tokens": f"{one.tokens[-1]:.3g}", "results in": one.source} for one in curves
    ]
    several = [key for key in ("context", "tokens", "results in") if len({each[key] for each in told}) > 1]
    return [
        ", ".join([one.form, *(f"{key} {each[key]}" for key in several), f"n = {one.gaps[0].size}"])
        for one, each in zip(curves, told, strict=True)
    ]


def panel(curves: Sequence[Curve], title: str):
    """Differences over tokens seen, a line a curve: all tenths but the first, for which the axis has no room."""
    series = {}
    for name, one in zip(names(curves), curves, strict=True):
        ends = ("estimate", "low", "high")
        gaps = [replace(gap, **{end: 100 * math.expm1(getattr(gap, end)) for end in ends}) for gap in one.gaps]
        series[name] = list(zip(one.tokens, gaps, strict=True))[1:]
    return interval_panel(series, ("tokens seen (training text)", "perplexity, difference (%)"), title)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results_TOKENS.json of sweeps")
    parser.add_argument("--variant", default="ema")
    parser.add_argument("--against", default="vanilla,fir3", help="comma-separated")
    parser.add_argument("--picture", type=Path, metavar="PNG")
    args = parser.parse_args(argv)
    if args.picture:
        verdicts.check_picture(args.picture)
    curves = []
    for one in map(Sweep.read, args.results):
        pairs = itertools.product(sweep.FORMS, args.against.split(","))
        curves += [compare(one, form, args.variant, other) for form, other in pairs]
    found = [curve for curve in curves if curve is not None]
    if not found:
        raise UserError(
            f"no two seeds of {args.variant} and {args.against} on test in {', '.join(map(str, args.results))}"
        )
    print(table(found))
    if args.picture:
        by_other: dict[str, list[Curve]] = {}
        for curve in found:
            by_other.setdefault(curve.other, []).append(curve)
        save_png(
            draw(*(panel(some, f"{args.variant} against {name}") for name, some in by_other.items())), args.picture
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
