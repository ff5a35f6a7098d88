"""Puts what gpu_checks.py found into benchmarks/results/CARD.json, and makes the documents' tables of what is there.

python benchmarks/gpu_results.py OUT [OUT ...]    merges folders of results, then writes the documents
python benchmarks/gpu_results.py                  writes GPU_CHECKS.md, and docs/performance.md between its markers
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_registry import FIRST, SECOND, Check, Stage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Cards = Mapping[str, Mapping[str, Any]]  # by the name of the file: {"card": its name, "stages": {name: record}}


def merge(folder: Path, results: Path = RESULTS) -> Path:
    """Adds the stages of one run to the file of its card, in place of older ones.

    Raises ValueError for a folder without results of one card, and for a run in miniature or on a CPU.
    """
    stages = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if "stage" in record and record["results"]:
            written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
            stages[record["stage"]] = record | {"date": written.date().isoformat()}
    cards = {record["card"] for record in stages.values()}
    if len(cards) != 1:
        raise ValueError(f"{folder}: its stages are of {len(cards)} cards, not of one")
    card = cards.pop()
    if card in ("cpu", "cuda") or any(record["smoke"] for record in stages.values()):
        raise ValueError(f"{folder}: a run in miniature or on a CPU, which is no result")
    path = results / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"card": card, "stages": {}}
    stored["stages"] |= stages
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return path


def load(results: Path = RESULTS) -> Cards:
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def found(card: Mapping[str, Any], stage: Stage) -> Mapping[str, Any]:
    return card["stages"].get(stage.name, {}).get("results", {})


def table(rows: Iterable[tuple[Stage, Check, str]], cards: Cards) -> str:
    """A row a check, under the name given, and a column a card."""
    names = [card["card"] for card in cards.values()] or ["any GPU"]
    lines = [f"| | goal | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for stage, check, name in rows:
        cells = []
        for card in cards.values():
            results = found(card, stage)
            cells.append(check.show(results) + (" (missed)" if check.met(results) is False else ""))
        lines.append(f"| {name} | {check.goal()} | {' | '.join(cells or ['not yet measured'])} |")
    return "\n".join(lines)


def state(card: Mapping[str, Any], stage: Stage) -> str:
    """How the stage went."""
    record = card["stages"].get(stage.name)
    if record is None:
        return f"{card['card']}: not yet run"
    errors = "; ".join(f"{name}: {error}" for name, error in record["errors"].items())
    return f"{card['card']}: {record['status']}, {record['seconds']:.0f} s, {record['date']}" + f" ({errors})" * bool(
        errors
    )


def document(cards: Cards) -> str:
    """GPU_CHECKS.md."""
    parts = [
        "# What runs on a GPU, and what it said",
        "Made by `python benchmarks/gpu_results.py` from `benchmarks/gpu_registry.py` and `benchmarks/results/`: "
        "do not edit.",
        "A machine with a GPU may be at hand for minutes only, without network. On another machine "
        "`bash benchmarks/gpu_bundle.sh DIR` makes a folder to take along, and prints the command to give there; "
        "the results come back with "
        "`python benchmarks/gpu_results.py OUT`. `python benchmarks/gpu_checks.py --help` says the rest.",
    ]
    for title, stages in (("First call", FIRST), ("Second call", SECOND)):
        parts.append(f"## {title}")
        for stage in stages:
            parts.append(f"### `{stage.name}`")
            states = [state(card, stage) for card in cards.values()] or ["not yet run"]
            parts.append(f"{textwrap.fill(stage.text, 120)}\n\n{'; '.join(states)}")
            parts.append(table(((stage, check, check.text) for check in stage.checks), cards))
    parts += ["## By hand", BY_HAND]
    return "\n\n".join(parts) + "\n"


BY_HAND = """- DDP with `--gradient-as-bucket-view` on several GPUs
- waits for the device in an update (`torch.cuda.set_sync_debug_mode`)
- a batch of prompts that does not fit is halved, its memory given back (`GPU_SHARE` in icl/engine.py at 3.0)
- the harness on `device=cuda`, an exported momentum model's `generate`
- logits per chunk (`CHUNK_LOGITS` in model/loss.py) over 2^26 to 2^30; one product for queries, keys and values
- `python benchmarks/icl_eval.py` and `benchmarks/analysis.py` with both sides on the GPU"""


def performance_part(cards: Cards) -> str:
    """What stands between the markers of docs/performance.md."""
    if not cards:
        return "No GPU figure has been measured yet: `benchmarks/GPU_CHECKS.md` has what is going to be."
    rows = ((stage, check, check.readme) for stage in FIRST for check in stage.checks if check.readme)
    return "`benchmarks/GPU_CHECKS.md` has more:\n\n" + table(rows, cards)


def with_part(text: str, part: str) -> str:
    """``text`` with ``part`` between its markers. Raises ValueError where it has none."""
    before, begin, rest = text.partition("<!-- GPU: made by benchmarks/gpu_results.py -->\n")
    _, end, after = rest.partition("\n<!-- GPU: end -->")
    if not begin or not end:
        raise ValueError("docs/performance.md has lost its markers of the GPU part")
    return before + begin + part + end + after


def documents(cards: Cards, root: Path = ROOT) -> dict[Path, str]:
    """The documents as they should be."""
    performance = root / "docs" / "performance.md"
    return {
        root / "benchmarks" / "GPU_CHECKS.md": document(cards),
        performance: with_part(performance.read_text("utf-8"), performance_part(cards)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="OUT", help="what gpu_checks.py wrote")
    args = parser.parse_args(argv)
    for folder in args.folders:
        try:
            print(f"results: {merge(folder)}")
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for path, text in documents(load()).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
