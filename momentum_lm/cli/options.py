"""Flags that several evaluations share, and what they mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from momentum_lm.errors import UserError

if TYPE_CHECKING:
    import torch

    from momentum_lm.lm.native import NativeLM


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model, on what device."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--path", required=True, metavar="CKPT", help="checkpoint file, or a folder with one (model.pt, checkpoint_best.pt, ...)"
    )
    group.add_argument(
        "--model-overrides", default="{}", metavar="DICT",
        help="options that the checkpoint lacks, as a Python dict: \"{'decoder_attention_heads': 8}\" (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--trust-checkpoint", action="store_true", help="load a checkpoint that holds more than plain data; such a file can run code"
    )
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there is one (default: %(default)s)"
    )
    group.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of weights and computation (default: %(default)s)")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where results go."""
    group = parser.add_argument_group("results")
    group.add_argument("--results-dir", required=True, metavar="OUT", help="gets results.json, figures, report.html and TensorBoard events")
    group.add_argument("--force", action="store_true", help="replace results of another model or configuration in --results-dir")
    group.add_argument("--seed", type=int, default=0, help="of bootstrap intervals (default: %(default)s)")


def load_model(args: argparse.Namespace) -> NativeLM:
    """The model that the flags of :func:`add_model_arguments` name."""
    import torch

    from momentum_lm.lm.native import load_native

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    return load_native(args.path, args.model_overrides, args.trust_checkpoint, device(args.device), dtype)


def device(name: str) -> torch.device:
    """The device that ``--device`` means. Raises UserError for a GPU that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or see `momentum-lm doctor`")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def positive_integers(text: str, flag: str) -> list[int]:
    """``256,512`` -> [256, 512]. Raises UserError naming the flag."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise UserError(f"{flag} {text}: give whole numbers above 0 with commas between, such as 256,512")
    return values
