"""``momentum-lm report RUN [RUN ...]``: results side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from momentum_lm.errors import main_guard


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``momentum-lm report``. Raises UserError for folders that hold no results, or results that do not
    compare."""
    parser = argparse.ArgumentParser(
        prog="momentum-lm report",
        description="Compares the results of `fairseq-eval --task lm_perplexity`; differences are from the first, with a paired bootstrap.",
        epilog="example:\n  momentum-lm report results/vanilla results/momentum --output compare.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a --results-dir of fairseq-eval")
    parser.add_argument("--output", metavar="FILE", help="also write an HTML page")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args(argv)

    from momentum_lm.report.perplexity import Comparison

    comparison = Comparison(args.runs, seed=args.seed)
    table = comparison.table()
    print(table.markdown() if args.markdown else table.text())
    if args.output:
        comparison.write_page(args.output)
        print(f"\n{args.output}")
    return 0
