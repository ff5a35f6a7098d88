"""``momentum-lm prepare``: text to binarised data for fairseq-train."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from momentum_lm.errors import UserError, main_guard

from .options import Parser

_EPILOG = """
sources: text files, folders (all .txt and .md in them and in folders linked from them, but for hidden ones), .csv .tsv
.jsonl .parquet with the text in --column, each but parquet also as .gz or .zst; or a data set of the Hugging Face hub,
hf:NAME[:CONFIG][@SPLIT] or its bare name (needs: pip install datasets).

Tabs alone separate columns of .tsv, quotation marks are text there. What spells a special token, such as </s>, is text.

Exact duplicates are dropped; a document's split follows from its content and --seed alone; the output is the same for
any number of --workers. Interrupted, even by kill -9, the same command goes on. Nothing in --output changes before
the new data is complete.

memory: under 400 MB with 2 workers, however much text there is: 2 MiB of text per worker under way in processes of 60
to 100 MB each, and before that 25 times --sample-mb while SentencePiece trains. Beside that about 110 bytes for every
distinct document, to know it again, the window of a .zst file (8 MiB by default, at most 128), and while a document
of 8 MiB, the longest allowed, is tokenised, 350 MB for it.
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    result = Parser(
        prog="momentum-lm prepare",
        description="Tokenises text into fairseq's binarised format: train, valid and test, dict.txt, the tokenizer, "
        "prepare.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="file, folder or data set")
    add("--output", required=True, metavar="DIR", help="folder for the data")
    column_help = "column of a table that holds the text; a.b is b inside of a (default: text)"
    add("--column", default="text", metavar="NAME", help=column_help)
    add(
        "--document",
        choices=("file", "line", "blank-line", "record"),
        help="what a document is: a whole file (default for text), a line, lines up to a blank one, a row of a table "
        "(default for tables)",
    )
    tokenizer = result.add_mutually_exclusive_group()
    vocab_help = "train a SentencePiece model: entries of the dictionary, specials included (default: 8192)"
    tokenizer.add_argument("--vocab-size", type=int, default=8192, metavar="N", help=vocab_help)
    tokenizer.add_argument(
        "--sentencepiece", metavar="FILE", help="use this SentencePiece model, and a dict.txt beside it"
    )
    tokenizer.add_argument(
        "--gpt2-bpe", metavar="DIR", help="use GPT-2's encoder.json and vocab.bpe, and a dict.txt beside them"
    )
    tokenizer.add_argument(
        "--hf-tokenizer", metavar="FILE", help="use a tokenizer.json (needs: pip install tokenizers)"
    )
    add(
        "--sample-mb",
        type=int,
        default=10,
        metavar="N",
        help="text that SentencePiece trains on, about 1 s per MB (default: 10)",
    )
    add(
        "--valid",
        default="0.01",
        metavar="SHARE",
        help="fraction of the documents, or their number; 0 for none (default: 0.01)",
    )
    add("--test", default="0.01", metavar="SHARE", help="likewise (default: 0.01)")
    add("--seed", type=int, default=1, metavar="N", help="of the splits and the sample (default: 1)")
    add("--max-documents", type=int, metavar="N", help="stop after this many distinct documents")
    add("--workers", type=int, metavar="N", help="processes (default: the CPUs this process may use)")
    add("--force", action="store_true", help="replace data that is there, or unfinished work, made with other settings")
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; a UserError becomes one line on stderr and status 2."""
    args = vars(parser().parse_args(argv))
    for flag, least in (("vocab_size", 1), ("sample_mb", 1), ("max_documents", 1), ("workers", 1)):
        if args[flag] is not None and args[flag] < least:
            raise UserError(f"--{flag.replace('_', '-')} {args[flag]}: must be at least {least}")
    from tqdm import tqdm

    from momentum_lm.files import naming
    from momentum_lm.text.corpus import PrepareConfig, prepare

    workers, force = args.pop("workers"), args.pop("force")
    config = PrepareConfig(**args | {"sources": tuple(args["sources"])})
    pace = 0.5 if sys.stderr.isatty() else 10  # seconds; a log file gets few lines, and none from a short run
    bar = functools.partial(tqdm, file=sys.stderr, mininterval=pace, delay=pace)
    with naming(config.output):
        result = prepare(config, workers, force, progress=bar, say=functools.partial(print, file=sys.stderr))
    print(summary(result, config.output))
    return 0


def summary(result: dict[str, Any], output: str) -> str:
    """What was made, in a few lines, and the command that trains on it. ``result`` is the content of
    ``prepare.json``.
    """
    splits = result["splits"]
    lines = [f"{output}: dictionary of {result['tokenizer']['vocab_size']:,} ({result['tokenizer']['kind']}), "
    f"{result['duplicates']:,} "
             f"duplicates and {result['empty']:,} empty documents dropped of {result['documents_read']:,}"]  # fmt: skip
    lines.append(f"{'split':8}{'documents':>14}{'tokens':>16}{'bytes':>18}{'bytes/token':>13}")
    for name, split in splits.items():
        ratio = split["bytes"] / split["tokens"]
        lines.append(f"{name:8}{split['documents']:>14,}{split['tokens']:>16,}{split['bytes']:>18,}{ratio:>13.2f}")
    if unknown := sum(split["unknown"] for split in splits.values()):
        share = unknown / sum(split["tokens"] for split in splits.values())
        lines.append(
            f"warning: {unknown:,} tokens ({share:.2%}) are <unk>: the tokenizer lacks characters of this text"
        )
    if result.get("nulls"):
        lines.append(f"note: {result['nulls']:,} rows have no text (null) and are left out")
    if result.get("quoted"):
        lines.append(
            f"note: {result['quoted']:,} texts of .tsv files look as if they were quoted for CSV; they are taken as "
            "they are, with their quotation marks doubled"
        )
    if result.get("special_tokens"):
        lines.append(
            f"note: the text spells out special tokens of the tokenizer {result['special_tokens']:,} times; they are "
            "ordinary text here, and end no document"
        )
    if not result["tokenizer"]["lossless"]:
        lines.append("note: this tokenizer normalises text; decoding does not give it back exactly")
    no_valid = (
        "" if "valid" in splits else " --disable-validation --valid-subset train"
    )  # fairseq loads one all the same
    lines.append(
        f"next: fairseq-train {shlex.quote(output)} --task language_modeling --arch momentum_lm_tiny "
        "--tokens-per-sample 512 "
        f"--max-tokens 8192 --optimizer adam --lr 0.001 --max-update 1000 --save-dir "
        f"{shlex.quote(output.rstrip('/') + '-model')}{no_valid}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
