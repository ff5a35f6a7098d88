"""Flags that several evaluations share, and what they mean."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, NoReturn

from momentum_lm.errors import UserError, flags
from momentum_lm.studies.flags import integers
from momentum_lm.system import import_user_dir

if TYPE_CHECKING:
    import torch

    from momentum_lm.lm.huggingface import HuggingFaceLM
    from momentum_lm.lm.native import NativeLM


# What fairseq-eval calls arguments of the studies and of loading, where a flag is not the argument's name.
NAMES = flags(
    folder="--results-dir", timeout="--process-timeout", seed="--seeds", splits="--split", shorten="--max-field-tokens",
    rates="--finetune-lr", parameters="--finetune-parameters", overrides="--model-overrides",
    trust="--trust-checkpoint",
    trust_remote_code="--trust-checkpoint", name="--hf-model", gguf_file="--hf-gguf-file", eta="--hf-momentum-eta",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Reads flags, which must be written out. Raises UserError where they are wrong, for ``main_guard`` to show in one
    line.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a wrong flag."""
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")


def add_model_arguments(parser: argparse.ArgumentParser, huggingface: bool = False) -> None:
    """Flags that say which model, on what device."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True) if huggingface else group
    which.add_argument(
        "--path",
        required=not huggingface,
        metavar="CKPT",
        help="checkpoint file, or a folder with one (model.pt, checkpoint_best.pt, ...)",
    )
    if huggingface:
        which.add_argument(
            "--hf-model", metavar="NAME", help="a causal model of Hugging Face: name on the hub, or folder"
        )
        group.add_argument("--hf-gguf-file", metavar="FILE", help="the GGUF file of --hf-model to load")
        group.add_argument(
            "--hf-momentum-eta",
            type=float,
            metavar="ETA",
            help="adds momentum of this decay to the attention of --hf-model",
        )
        group.add_argument(
            "--tokenizer",
            metavar="DIR",
            help="tokenizer of --path (default: beside the checkpoint, or in the data that it was trained on)",
        )
    group.add_argument(
        "--model-overrides", default="{}", metavar="DICT",
        help="options that the checkpoint lacks, as a Python dict: \"{'decoder_attention_heads': 8}\" (default: "
             "%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--without-momentum",
        metavar="LAYERS",
        help="take out the filters that --path was trained with: all, or those of some layers, counted from 0, such as "
        "0,2",
    )
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that holds more than plain data; such a file can run code",
    )
    add_user_dir(group)
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="auto: cuda if there is one (default: %(default)s)",
    )
    where.add_argument("--cpu", action="store_const", dest="device", const="cpu", default="auto", help="--device cpu")
    group.add_argument(
        "--dtype",
        default="fp32",
        choices=["fp32", "bf16", "fp16"],
        help="of weights and computation (default: %(default)s)",
    )


class _ImportFolder(argparse.Action):
    """Imports the folder when its flag is read, before anything asks for what it registers."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        import_user_dir(values)
        setattr(namespace, self.dest, values)


def add_user_dir(parser: Any) -> None:
    """The flag ``--user-dir`` of a parser, or of a group of flags."""
    text = "import this folder's code, such as filters of your own"
    parser.add_argument("--user-dir", action=_ImportFolder, metavar="DIR", help=text)


def add_output_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags that say where results go, in a group to which a task may add."""
    group = parser.add_argument_group("results")
    group.add_argument(
        "--results-dir",
        required=True,
        metavar="OUT",
        help="gets results.json, figures, report.html and TensorBoard events",
    )
    group.add_argument(
        "--force", action="store_true", help="replace results of another model or configuration in --results-dir"
    )
    return group


def _without_momentum(args: argparse.Namespace) -> list[int] | str | None:
    text: str | None = args.without_momentum
    return text if text in (None, "all") else integers(str(text), "--without-momentum", 0, "0,2, or all")


def load_native_model(args: argparse.Namespace) -> NativeLM:
    """The checkpoint that ``--path`` names."""
    from momentum_lm.lm.native import load_native

    tokenizer, without = getattr(args, "tokenizer", None), _without_momentum(args)
    lm = load_native(
        args.path, args.model_overrides, args.trust_checkpoint, device(args.device), _dtype(args), tokenizer
    )
    if without is not None:
        lm.remove_momentum(without)
    return lm


def load_model(args: argparse.Namespace) -> NativeLM | HuggingFaceLM:
    """The model that the flags of :func:`add_model_arguments` name. Raises UserError for flags that do not fit it."""
    eta = args.hf_momentum_eta
    if args.path is not None:
        if eta is not None:
            raise UserError(
                "--hf-momentum-eta is for --hf-model; a checkpoint has the momentum that it was trained with"
            )
        return load_native_model(args)
    from momentum_lm.lm.huggingface import load_huggingface
    from momentum_lm.lm.momentum_attention import add_momentum, check_eta

    if args.without_momentum is not None:
        raise UserError("--without-momentum is for --path; leave out --hf-momentum-eta to evaluate --hf-model without")
    if eta is not None:
        check_eta(eta)
    lm = load_huggingface(args.hf_model, args.hf_gguf_file, device(args.device), _dtype(args), args.trust_checkpoint)
    if eta is not None:
        add_momentum(lm.model, eta)
    return lm


def _dtype(args: argparse.Namespace) -> torch.dtype:
    from momentum_lm.model.precision import DTYPES

    return DTYPES[args.dtype]


def device(name: str) -> torch.device:
    """The device that ``--device`` means; under torchrun each process has its own GPU. Raises UserError for a GPU that
    is not there.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu, or see `momentum-lm doctor`")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_seed(seed: int) -> int:
    """``--seed``. Raises UserError for one that NumPy does not take."""
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    return seed
