"""``fairseq-eval --task icl_finetune_analysis``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from momentum_lm.errors import UserError
from momentum_lm.studies import controls, flags

from .options import add_model_arguments, add_output_arguments, load_model

LARGE = 1_000_000_000  # parameters from which on a second, untrained, model is only loaded if asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task."""
    add_model_arguments(parser, huggingface=True)
    flags.add_question_arguments(parser)
    flags.add_speed_arguments(parser)
    parser.set_defaults(shots="16")
    group = parser.add_argument_group("finetuning")
    group.add_argument(
        "--finetune-lr", default="auto", metavar="LR,LR,...",
        help="learning rate, or several to choose from by accuracy on training examples that are not demonstrations, "
             "or with --protocol "
        "paper on the evaluated ones (default: 0.1,0.03,0.01,...,0.0001)",
    )  # fmt: skip
    group.add_argument(
        "--lr-examples",
        type=int,
        default=100,
        metavar="N",
        help="training examples to choose the learning rate on (default: %(default)s)",
    )
    group.add_argument(
        "--finetune-loss", default="sequence", choices=["sequence", "label"],
        help="what a demonstration teaches: all its tokens, as in the authors' code, or its label (default: "
             "%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--finetune-parameters", default="kv", metavar="WHICH",
        help="kv: key and value projections, as in the paper; all; or a regular expression for names (default: "
             "%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--controls", metavar="C,C,...",
        help=f"what the similarities are to be compared with: none, or some of {', '.join(controls.CHOICES)} "
        "(default: all but the last, and without untrained from a billion parameters on)",
    )  # fmt: skip
    group.add_argument(
        "--score", default="mean", choices=["mean", "sum"], help="of a label's log-probabilities (default: %(default)s)"
    )
    group = add_output_arguments(parser)
    group.add_argument(
        "--save-traces", action="store_true", help="write attention outputs and metrics by example to OUT/traces/*.npz"
    )


def run(args: argparse.Namespace, command: str) -> bool:
    """Analyses; whether this is the process that writes."""
    from momentum_lm.cpu import map_large_tensors, return_memory
    from momentum_lm.studies import icl_vs_finetuning as study

    if args.lr_examples < 1:
        raise UserError(f"--lr-examples {args.lr_examples}: must be at least 1")
    names: Sequence[str] = ()
    if args.controls != "none":
        names = (
            controls.DEFAULT if args.controls is None else flags.choices(args.controls, "--controls", controls.CHOICES)
        )
    rates: tuple[float, ...] = study.GRID
    if args.finetune_lr != "auto":
        rates = tuple(flags.positives(args.finetune_lr, "--finetune-lr", "0.01,0.003"))
    settings = study.Settings(
        questions=dataclasses.replace(flags.settings_from(args), score=args.score),
        rates=rates,
        held_out=args.lr_examples,
        loss=args.finetune_loss,
        parameters=args.finetune_parameters,
        save_traces=args.save_traces,
    )
    timeout = flags.process_timeout(args)
    map_large_tensors()  # finetuned and untrained weights come and go
    lm = load_model(args)
    if args.controls is None and sum(parameter.numel() for parameter in lm.model.parameters()) >= LARGE:
        names = [name for name in names if name != "untrained"]
    settings = dataclasses.replace(settings, controls=tuple(names))
    datasets = flags.load_datasets(args, lm)
    writes = study.analyse(lm, datasets, settings, args.results_dir, command, args.force, timeout=timeout)
    del lm
    return_memory()  # what the figures need comes in its place
    return writes
