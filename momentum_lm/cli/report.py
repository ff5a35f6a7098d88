"""``momentum-lm report RUN [RUN ...]``: results side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard
from momentum_lm.studies.registry import STUDIES

from .options import Parser, check_seed

_EPILOG = """examples:
  momentum-lm report results/vanilla results/momentum --output compare.html
  momentum-lm report results/smollm2 --between calibration=none,batch
  momentum-lm report results/smollm2 --between shots=4,16"""


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``momentum-lm report``. Raises UserError for folders that hold no results, or results that do not
    compare."""
    parser = Parser(
        prog="momentum-lm report",
        description="Compares results of one task of fairseq-eval: differences from the first, paired, with "
        "intervals, for "
        "icl_finetune_analysis by seed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a --results-dir of fairseq-eval")
    parser.add_argument(
        "--between",
        metavar="NAME=A,B,...",
        help="compare settings within one RUN of icl_classification: calibration or shots",
    )
    parser.add_argument("--output", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args(argv)
    check_seed(args.seed)

    from momentum_lm.report.skeleton import read_runs
    from momentum_lm.report.tables import printable

    study = STUDIES[read_runs(args.runs, list(STUDIES))[0]["task"]]
    if args.between is not None and not study.between:
        fitting = " or ".join(name for name, other in STUDIES.items() if other.between)
        raise UserError(f"--between is for results of {fitting}, and {args.runs[0]} holds those of {study.name}")
    varied = {"between": args.between} if study.between else {}
    comparison = study.compare(args.runs, seed=args.seed, **varied)
    print("\n\n".join(table.markdown() if args.markdown else table.text() for table in comparison.tables()))
    for note in comparison.notes:
        print(f"\n{printable(note)}")
    if args.output:
        comparison.write_page(args.output)
        print(f"\n{args.output}")
    return 0
