"""``momentum-lm datasets``: lists the data sets for in-context learning, or shows a prompt of one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard

from .options import Parser, check_seed

SEPARATOR = "\n\n"  # of Hugging Face models; fairseq's have </s> instead


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of all data sets, or of one its description and a sample prompt for each of its templates."""
    parser = Parser(prog="momentum-lm datasets", description="Lists the data sets, or shows a prompt of one.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a name of the list, or a YAML file of your own")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="use DIR/NAME/{train,validation}.{jsonl,csv,tsv,parquet}, not the hub"
    )
    parser.add_argument("--template", metavar="TEMPLATE", help="show this variant only (default: each)")
    parser.add_argument("--shots", type=int, default=2, metavar="N", help="demonstrations (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="draws them, and the query (default: %(default)s)"
    )
    parser.add_argument("--sampling", default="random", choices=["random", "balanced"], help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.shots < 0:
        raise UserError(f"--shots {args.shots}: must not be negative")
    check_seed(args.seed)
    print(_sample(args) if args.name else _table())
    return 0


def _table() -> str:
    from momentum_lm.icl.datasets.definitions import available, load_spec
    from momentum_lm.report.tables import Table

    rows = []
    for spec in map(load_spec, available()):
        classes = str(len(spec.labels)) if spec.labels else "choices"
        hub = spec.hub.id + (f" {spec.hub.subset}" if spec.hub.subset else "") if spec.hub else ""
        rows.append([spec.name, spec.task, classes, hub, spec.licence])
    lines = [
        Table(["name", "task", "classes", "hub", "licence"], rows).text(),
        "",
        "`momentum-lm datasets NAME` shows a prompt.",
    ]
    return "\n".join(lines)


def _sample(args: argparse.Namespace) -> str:
    from momentum_lm.icl.datasets.definitions import load_spec
    from momentum_lm.icl.datasets.loading import load_dataset
    from momentum_lm.icl.demonstrations import evaluation_subset, identity, select

    spec = load_spec(args.name, args.template or "code")
    hub = spec.hub.id if spec.hub else "none"
    lines = [f"{spec.name}: {spec.description}", f"hub: {hub}; licence: {spec.licence}; {spec.path}"]
    notes: dict[str, None] = {}
    for template in [spec.template] if args.template else spec.templates:
        splits = ["train", "evaluation"] if args.shots else ["evaluation"]
        data = load_dataset(args.name, args.data_dir, template, splits=splits)
        labels = len(spec.labels) if spec.labels else None
        query = evaluation_subset(data.evaluation, 1, args.seed)[0]
        hidden = {i for i, example in enumerate(data.train) if identity(example) == identity(query)}
        if args.shots > len(data.train) - len(hidden):
            hidden = set()
        shown = select(data.train, args.shots, args.seed, args.sampling, labels, hidden=hidden)
        notes |= dict.fromkeys(data.notes)
        if any(identity(example) == identity(query) for example in shown):
            notes[f"row {query.index}, which is asked, is among the demonstrations: the training split has it too"] = (
                None
            )
        inputs = query.inputs if len(query.inputs) == 1 else (query.inputs[query.gold],)
        prompt = SEPARATOR.join(["".join(example.pair(example.gold)) for example in shown] + list(inputs))
        choices = query.continuations if len(query.inputs) == 1 else query.inputs
        sizes = ", ".join(
            f"{len(examples):,} to {verb}"
            for examples, verb in ((data.train, "show"), (data.evaluation, "ask"))
            if examples
        )
        lines += ["", f"--- template {template} ({sizes}; row {query.index} is asked)", prompt, "---"]
        lines += [f"{'*' if i == query.gold else ' '} {choice!r}" for i, choice in enumerate(choices)]
        if len(query.inputs) > 1:
            lines.append(f"  each followed by {query.continuations[0]!r}, which is scored")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return "\n".join(lines)
