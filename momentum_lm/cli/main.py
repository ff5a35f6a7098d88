"""``momentum-lm COMMAND``: finds the command's module and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from momentum_lm import __version__
from momentum_lm.errors import UserError, main_guard
from momentum_lm.system import isolated_children

COMMANDS = {  # each is momentum_lm/cli/NAME.py, but for eval
    "prepare": "turn text into the binarised data that fairseq-train reads",
    "eval": "evaluate a model: `fairseq-eval` by another name, which needs no fairseq",
    "convert": "models between Hugging Face and fairseq, and checkpoints in parts into whole ones",
    "plan": "memory, time and command of a training run, before it starts",
    "report": "put evaluation results side by side",
    "datasets": "list the data sets for in-context learning, or show a prompt of one",
    "preflight": "check the machines of a run against each other before it starts",
    "doctor": "check this installation and say how to fix it",
}


def usage() -> str:
    lines = [f"  {name:9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: momentum-lm COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "`momentum-lm COMMAND --help` says more; `momentum-lm --version` prints the version.",
            "Training is `fairseq-train --arch momentum_lm_tiny ...`.",
        ]
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``momentum-lm``. Raises UserError for an unknown command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"momentum-lm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"momentum-lm has no command {argv[0]!r}; {hint}")
    with isolated_children():  # from Python 3.14 on, a progress bar starts a process that looks after its lock
        name, more = ("evaluate", {"prog": "momentum-lm eval"}) if argv[0] == "eval" else (argv[0], {})
        result: int | None = importlib.import_module(f"momentum_lm.cli.{name}").main(argv[1:], **more)
    return result or 0


if __name__ == "__main__":
    sys.exit(main())
