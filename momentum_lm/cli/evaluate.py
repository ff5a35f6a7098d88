"""``fairseq-eval --task TASK``: measures a trained model. Each task is a study with flags, in one entry of
``TASKS``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard

from .options import Parser

# name: (module with add_arguments(parser) and run(args), what it answers). A module is imported only when its task is asked for.
TASKS = {
    "lm_perplexity": ("momentum_lm.cli.eval_perplexity", "perplexity on binarised text at several context lengths"),
    "icl_classification": ("momentum_lm.cli.eval_classification", "in-context classification of labelled data"),
    "icl_finetune_analysis": ("momentum_lm.cli.eval_finetune_analysis", "whether in-context learning does what finetuning does"),
}
_EXAMPLE = """\
examples:
  fairseq-eval --task lm_perplexity data/reviews --path checkpoints/checkpoint_best.pt \\
      --context-lengths 256,512,1024 --results-dir results/perplexity
  fairseq-eval --task icl_classification --hf-model gpt2 --datasets mr,trec --shots 0,4,16 --seeds 1,2,3 \\
      --results-dir results/icl

`fairseq-eval --task TASK --help` shows the task's own flags. An interrupted evaluation goes on where it stopped.
"""


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``fairseq-eval``. Raises UserError for impossible flags."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chooser = Parser(prog="fairseq-eval", add_help=False)
    chooser.add_argument("--task")
    task = chooser.parse_known_args(argv)[0].task
    parser = Parser(prog="fairseq-eval", epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = "; ".join(f"{name}: {text}" for name, (_, text) in TASKS.items())
    parser.add_argument("--task", choices=TASKS, required=True, help=tasks)
    if task not in TASKS:
        if "-h" in argv or "--help" in argv:
            parser.print_help()
            return 0
        raise UserError(f"--task {task or 'is missing'}: choose one of {', '.join(TASKS)}")
    module = importlib.import_module(TASKS[task][0])
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv))
