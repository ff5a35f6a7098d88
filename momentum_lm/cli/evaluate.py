"""``fairseq-eval --task TASK``: measures a trained model. Each task is a study with flags, in one entry of
``TASKS``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from momentum_lm.errors import UserError, main_guard, named
from momentum_lm.system import isolated_children

from .options import NAMES, Parser


@dataclass(frozen=True)
class Task:
    """The module of a task, with add_arguments(parser) and run(args), imported only when it is asked for; what the task answers; an
    example of its flags."""

    module: str
    text: str
    example: str


TASKS = {
    "lm_perplexity": Task(
        "momentum_lm.cli.eval_perplexity",
        "perplexity on binarised text at several context lengths",
        "data/reviews --path checkpoints/checkpoint_best.pt \\\n      --context-lengths 256,512,1024 --results-dir results/perplexity",
    ),
    "icl_classification": Task(
        "momentum_lm.cli.eval_classification",
        "in-context classification of labelled data",
        "--hf-model gpt2 --datasets mr,trec --shots 0,4,16 \\\n      --seeds 1,2,3 --calibration none,batch --results-dir results/icl",
    ),
    "icl_finetune_analysis": Task(
        "momentum_lm.cli.eval_finetune_analysis",
        "whether in-context learning does what finetuning does",
        "--hf-model gpt2 --datasets mr --shots 16 --seeds 1,2,3 \\\n      --sampling balanced --results-dir results/analysis",
    ),
}


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fairseq-eval``. Raises UserError for impossible flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chooser = Parser(prog="fairseq-eval", add_help=False)
    chooser.add_argument("--task")
    task = chooser.parse_known_args(argv)[0].task
    examples = "\n".join(
        f"  fairseq-eval --task {name} {entry.example}" for name, entry in TASKS.items() if name == task or task not in TASKS
    )
    more = "" if task in TASKS else "`fairseq-eval --task TASK --help` shows the task's own flags. "
    parser = Parser(
        prog="fairseq-eval",
        usage=f"fairseq-eval --task {task if task in TASKS else 'TASK'} [FLAGS] --results-dir OUT",
        epilog=f"example:\n{examples}\n\n{more}An interrupted evaluation goes on where it stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = "; ".join(f"{name}: {entry.text}" for name, entry in TASKS.items())
    parser.add_argument("--task", choices=TASKS, required=True, metavar="TASK", help=tasks)
    if task not in TASKS:
        if "-h" in argv or "--help" in argv:
            parser.print_help()
            return 0
        raise UserError(f"--task {task or 'is missing'}: choose one of {', '.join(TASKS)}")
    module = importlib.import_module(TASKS[task].module)
    module.add_arguments(parser)
    with isolated_children(), named(NAMES):
        return module.run(parser.parse_args(argv))
