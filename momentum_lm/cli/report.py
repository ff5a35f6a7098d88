"""``momentum-lm report RUN [RUN ...]``: results side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard

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
        description="Compares results of one task of fairseq-eval: differences from the first, paired, with intervals, for "
        "icl_finetune_analysis by seed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a --results-dir of fairseq-eval")
    parser.add_argument(
        "--between", metavar="NAME=A,B,...", help="compare settings within one RUN of icl_classification: calibration or shots"
    )
    parser.add_argument("--output", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args(argv)
    check_seed(args.seed)

    from momentum_lm.report import classification, icl_vs_finetuning, perplexity
    from momentum_lm.report.classification_comparison import ClassificationComparison, parse_between
    from momentum_lm.report.common import read_runs
    from momentum_lm.report.finetuning_comparison import FinetuningComparison
    from momentum_lm.report.tables import printable

    task = read_runs(args.runs, [perplexity.TASK, classification.TASK, icl_vs_finetuning.TASK])[0]["task"]
    comparison: perplexity.Comparison | ClassificationComparison | FinetuningComparison
    notes: Sequence[str] = ()
    if task == classification.TASK:
        between = None if args.between is None else parse_between(args.between)
        comparison = ClassificationComparison(args.runs, between=between, seed=args.seed)
        notes = comparison.notes
    elif args.between is not None:
        raise UserError(f"--between is for results of {classification.TASK}, and {args.runs[0]} holds those of {task}")
    elif task == icl_vs_finetuning.TASK:
        comparison = FinetuningComparison(args.runs)
        notes = comparison.notes
    else:
        comparison = perplexity.Comparison(args.runs, seed=args.seed)
        notes = comparison.notes
    table = comparison.table()
    print(table.markdown() if args.markdown else table.text())
    differences = comparison.differences() if isinstance(comparison, FinetuningComparison) else None
    if differences is not None:
        print(f"\n{differences.markdown() if args.markdown else differences.text()}")
    for note in notes:
        print(f"\n{printable(note)}")
    if args.output:
        comparison.write_page(args.output)
        print(f"\n{args.output}")
    return 0
