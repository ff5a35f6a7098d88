"""``fairseq-eval --task icl_classification``."""

from __future__ import annotations

import argparse
import dataclasses

from momentum_lm.cpu import keep_memory
from momentum_lm.errors import UserError
from momentum_lm.icl.calibration import CALIBRATIONS
from momentum_lm.studies import flags

from .options import add_model_arguments, add_output_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task."""
    add_model_arguments(parser, huggingface=True)
    flags.add_question_arguments(parser)
    flags.add_speed_arguments(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--score", default="mean", choices=["mean", "sum"], help="of a label's log-probabilities (default: %(default)s)"
    )
    group.add_argument(
        "--calibration", default="none", metavar="C,C,...",
        help=f"one or more of {', '.join(CALIBRATIONS)}, from the same scores (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--orders", type=int, default=1, metavar="N", help="orders of each seed's demonstrations (default: %(default)s)"
    )
    group.add_argument(
        "--fresh-queries", action="store_true",
        help="with --limit: another sample for each seed; the spread over seeds is then over demonstrations "
        "and queries",
    )  # fmt: skip
    add_output_arguments(parser)


def run(args: argparse.Namespace, command: str) -> bool:
    """Evaluates; whether this is the process that writes."""
    from momentum_lm.studies import classification

    timeout = flags.process_timeout(args)
    calibrations = tuple(flags.choices(args.calibration, "--calibration", CALIBRATIONS))
    if args.orders < 1:
        raise UserError(f"--orders {args.orders}: must be at least 1")
    if args.fresh_queries and (args.limit is None or args.protocol == "paper"):
        raise UserError("--fresh-queries: samples of their own for each seed need a --limit, and --protocol default")
    own = {
        "score": args.score,
        "calibrations": calibrations,
        "orders": args.orders,
        "fresh_queries": args.fresh_queries,
    }
    settings = dataclasses.replace(flags.settings_from(args), **own)
    lm = load_model(args)
    keep_memory()
    datasets = flags.load_datasets(args, lm)
    return classification.evaluate(lm, datasets, settings, args.results_dir, command, args.force, timeout=timeout)
