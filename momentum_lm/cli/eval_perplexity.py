"""``fairseq-eval --task lm_perplexity``."""

from __future__ import annotations

import argparse

from momentum_lm.errors import UserError
from momentum_lm.studies.flags import integers

from .options import add_model_arguments, add_output_arguments, check_seed, load_native_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this task."""
    group = parser.add_argument_group("data")
    group.add_argument("data", metavar="DATA", help="folder from `momentum-lm prepare` or `fairseq-preprocess`")
    group.add_argument("--split", default="valid", help="split, or several with commas between (default: %(default)s)")
    group.add_argument(
        "--context-lengths",
        default="256,512,1024",
        metavar="N,N,...",
        help="tokens that are seen at once (default: %(default)s)",
    )
    group.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens per forward pass (default: %(default)s)"
    )
    group.add_argument(
        "--packed-documents", default="auto", choices=["auto", "yes", "no"],
        help="no document of a block sees another; auto: as the model was trained (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of bootstrap intervals (default: %(default)s)")
    add_model_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace, command: str) -> bool:
    """Evaluates; whether this is the process that writes."""
    from momentum_lm.studies import perplexity

    lengths = integers(args.context_lengths, "--context-lengths", 1, "256,512")
    if args.batch_tokens < 1:
        raise UserError(f"--batch-tokens {args.batch_tokens}: must be at least 1")
    check_seed(args.seed)
    lm = load_native_model(args)
    packed = lm.packed_documents if args.packed_documents == "auto" else args.packed_documents == "yes"
    splits = args.split.split(",")
    perplexity.evaluate(
        lm, args.data, args.results_dir, lengths, splits, args.batch_tokens, packed, args.seed, args.force
    )
    return True
