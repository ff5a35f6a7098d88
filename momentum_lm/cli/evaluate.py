"""``fairseq-eval --task TASK``: runs one of the studies and writes its report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard, named
from momentum_lm.studies.registry import STUDIES
from momentum_lm.system import isolated_children

from .options import NAMES, Parser


@main_guard
def main(argv: Sequence[str] | None = None, prog: str = "fairseq-eval") -> int:
    """Entry point of ``fairseq-eval``, and of ``momentum-lm eval``. Raises UserError for impossible flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chooser = Parser(prog=prog, add_help=False)
    chooser.add_argument("--task")
    task = chooser.parse_known_args(argv)[0].task
    examples = "\n".join(
        f"  {prog} --task {name} {study.example}"
        for name, study in STUDIES.items()
        if name == task or task not in STUDIES
    )
    more = "" if task in STUDIES else f"`{prog} --task TASK --help` shows the task's own flags. "
    parser = Parser(
        prog=prog,
        usage=f"{prog} --task {task if task in STUDIES else 'TASK'} [FLAGS] --results-dir OUT",
        epilog=f"example:\n{examples}\n\n{more}An interrupted evaluation goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = "; ".join(f"{name}: {study.text}" for name, study in STUDIES.items())
    parser.add_argument("--task", choices=STUDIES, required=True, metavar="TASK", help=tasks)
    if task not in STUDIES:
        if "-h" in argv or "--help" in argv:
            parser.print_help()
            return 0
        raise UserError(f"--task {task or 'is missing'}: choose one of {', '.join(STUDIES)}")
    chosen = STUDIES[task]
    chosen.add_arguments(parser)
    args = parser.parse_args(argv)
    with isolated_children(), named(NAMES):
        if chosen.run(args, shlex.join([*prog.split(), *argv])):
            print(chosen.write_report(args.results_dir, args.force).text())
            print(f"\n{os.path.join(args.results_dir, 'report.html')}")
    return 0
