"""Flags that studies share, and what they mean: data, prompts and speed of in-context learning, and lists of
numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from momentum_lm.errors import UserError, arg
from momentum_lm.text.dictionary import BOS, EOS

if TYPE_CHECKING:
    from momentum_lm.icl.datasets.loading import LabelledDataset
    from momentum_lm.lm.protocol import LanguageModel

    from .classification import Settings

FAIRSEQ_BOS = {"<s>": (BOS,), "</s>": (EOS,)}
_MOST = 2**53  # what every reader of JSON takes, and results.schema


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the data sets and of the prompts made of them."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--datasets",
        required=True,
        metavar="D,D,...",
        help="names (see `momentum-lm datasets`) or YAML files of your own",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="use DIR/<dataset>/{train,validation}.{jsonl,csv,tsv,parquet} where it is there, not the hub",
    )
    group.add_argument(
        "--template", default="code", metavar="NAME",
        help="variant where a set has it: code (the authors' code, one line) or paper (with line breaks) (default: "
             "%(default)s)",
    )  # fmt: skip
    group.add_argument("--limit", type=int, metavar="N", help="evaluate at most N examples, a seeded sample")
    group.add_argument("--max-field-tokens", type=int, metavar="N", help="shorten each text of the data to N tokens")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--shots", default="0,4,16", metavar="K,K,...", help="demonstrations in a prompt (default: %(default)s)"
    )
    group.add_argument(
        "--seeds", default="1,2,3", metavar="S,S,...", help="of the draws of demonstrations (default: %(default)s)"
    )
    group.add_argument(
        "--sampling",
        default="random",
        choices=["random", "balanced"],
        help="balanced: as many of each label (default: %(default)s)",
    )
    group.add_argument(
        "--protocol", default="default", choices=["default", "paper"],
        help="paper: demonstrations, evaluated examples, templates and <s> as in the authors' code (default: "
             "%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--separator", metavar="TEXT",
        help=r"between demonstrations, such as '\n' (default: the token </s> for fairseq checkpoints, \n\n for "
        r"others); like texts and "
        "templates it is ordinary text where it spells a special token",
    )  # fmt: skip
    group.add_argument(
        "--bos", default="auto", choices=["auto", "no", "<s>", "</s>"],
        help="what a prompt begins with; the last two for fairseq checkpoints (default: what the model was trained "
             "with)",
    )  # fmt: skip


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that change no prediction."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens per forward pass (default: by the memory there is)"
    )
    group.add_argument(
        "--process-timeout", type=float, default=600.0, metavar="S",
        help="under torchrun: seconds until a process that does not come or hangs is named (default: %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--padding-side",
        default="right",
        choices=["right", "left"],
        help="changes nothing but rounding (default: %(default)s)",
    )


def settings_from(args: argparse.Namespace) -> Settings:
    """What the flags of :func:`add_question_arguments` ask. Raises UserError naming the flag, or the data set that
    there is not."""
    from momentum_lm.icl.datasets.definitions import check_names, load_spec

    from .classification import Settings

    for flag in ("limit", "max_field_tokens", "batch_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    if args.bos in FAIRSEQ_BOS and args.path is None:
        raise UserError(
            arg(bos=args.bos),
            " is for fairseq checkpoints; ",
            arg("name"),
            " begins a prompt as its tokenizer does, or with ",
            arg("bos"),
            " no",
        )
    names = dict.fromkeys(args.datasets.split(","))
    check_names([load_spec(name, _template(args)) for name in names])  # now, not after a large model was read
    paper = args.protocol == "paper"
    return Settings(
        shots=tuple(integers(args.shots, "--shots")),
        seeds=tuple(integers(args.seeds, "--seeds", 0, "1,2,3")),
        sampling=args.sampling,
        protocol=args.protocol,
        limit=args.limit,
        bos=(BOS,) if paper and args.path is not None else {"auto": None, "no": (), **FAIRSEQ_BOS}[args.bos],
        separator=None if args.separator is None else unescape(args.separator),
        batch_tokens=args.batch_tokens,
        padding_side=args.padding_side,
    )


def process_timeout(args: argparse.Namespace) -> float:
    """``--process-timeout`` in seconds. Raises UserError for what is no time."""
    if not 0 < args.process_timeout < 1e8:
        raise UserError(arg(timeout=args.process_timeout), ": must be a positive number of seconds")
    return float(args.process_timeout)


def load_datasets(args: argparse.Namespace, lm: LanguageModel) -> list[LabelledDataset]:
    """The data sets of ``--datasets``, their texts shortened to ``--max-field-tokens``."""
    from momentum_lm.icl.datasets.loading import load_dataset

    return [
        load_dataset(name, args.data_dir, _template(args), shortener(lm, args.max_field_tokens))
        for name in dict.fromkeys(args.datasets.split(","))
    ]


def _template(args: argparse.Namespace) -> str:
    return "code" if args.protocol == "paper" else args.template


def shortener(lm: LanguageModel, tokens: int | None) -> Callable[[str], str] | None:
    """Cuts a text after so many tokens, at a character; None where there is no limit."""
    if tokens is None:
        return None

    def shorten(text: str) -> str:
        ids = lm.encode([text])[0]
        return text if len(ids) <= tokens else lm.decode(ids[:tokens]).rstrip("\ufffd")

    return shorten


def unescape(text: str) -> str:
    r"""The text with ``\n`` and ``\t`` for what they stand for."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def integers(text: str, flag: str, least: int = 0, example: str = "0,4,16") -> list[int]:
    """``256,512`` -> [256, 512]. Raises UserError naming the flag for anything else, or a number below ``least``."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least or max(values) > _MOST:
        upward = "on" if not values or max(values) <= _MOST else f"to {_MOST:,}"
        what = f"whole numbers from {least} {upward} with commas between"
        raise UserError(f"{flag} {text}: give {what}, such as {example}")
    return values


def positives(text: str, flag: str, example: str) -> list[float]:
    """``0.01,0.003`` -> [0.01, 0.003], each once. Raises UserError naming the flag for anything but positive
    numbers."""
    try:
        values = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise UserError(f"{flag} {text}: give positive numbers with commas between, such as {example}")
    return values


def choices(text: str, flag: str, known: Sequence[str]) -> list[str]:
    """``a,b`` -> ["a", "b"]. Raises UserError naming the flag for a name that is not known."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: choose from {', '.join(known)}")
    return names
