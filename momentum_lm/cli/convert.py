"""``momentum-lm convert``: Hugging Face models to fairseq checkpoints and back, and parts of a checkpoint to one."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentum_lm.errors import TornCheckpoint, UserError, main_guard, named
from momentum_lm.system import progress_bar

from .options import NAMES, Parser, add_user_dir

if TYPE_CHECKING:
    import torch

    from momentum_lm.formats.lazy import Lazy

_EPILOG = """
What SOURCE is says what is done:
  a folder with config.json or a GGUF file, or a name on the Hugging Face hub, NAME@REVISION for a branch, tag or
      commit (Llama, Mistral, Qwen2, Qwen3, GPT-NeoX, GPT-2, OPT, XGLM, which is what fairseq's dense LMs are
      published as, and momentum models made by this command)  ->  a folder with model.pt, dict.txt and the
      tokenizer, for fairseq-eval --path, fairseq-train --finetune-from-model and every other command of fairseq
  a fairseq checkpoint, or a folder with one  ->  a folder with model.safetensors, config.json and the tokenizer, for
      AutoModelForCausalLM.from_pretrained: as a class of transformers where one computes the same, otherwise, as
      momentum models, as one of ours that goes with it (trust_remote_code=True)
  CHECKPOINT-shardN.pt, a part of a checkpoint of --use-sharded-state  ->  one ordinary checkpoint, OUTPUT.pt;
      the other parts lie beside it

Weights are read, changed and written one tensor at a time. OUTPUT is whole or not there; --force replaces
it once the new one is whole.

examples: momentum-lm convert openai-community/gpt2 gpt2
          momentum-lm convert EleutherAI/pythia-160m@step3000 pythia
          momentum-lm convert models llama --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf
          momentum-lm convert checkpoints/checkpoint_best.pt published
          momentum-lm convert checkpoints/checkpoint_last-shard0.pt checkpoints/checkpoint_last.pt
"""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    result = Parser(
        prog="momentum-lm convert",
        description="Converts models between Hugging Face and fairseq, and joins checkpoints in parts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("source", metavar="SOURCE", help="a folder, a checkpoint, or a name on the Hugging Face hub")
    add("output", metavar="OUTPUT", help="the folder to make (of a checkpoint in parts: the file)")
    add("--force", action="store_true", help="replace OUTPUT if it is there and holds nothing but a conversion's files")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as they are)")
    add(
        "--tokenizer",
        metavar="DIR",
        help="tokenizer of a fairseq checkpoint (default: beside it, or in the data that it was trained on)",
    )
    add("--gguf-file", metavar="FILE", help="the GGUF file of SOURCE to convert (Llama, Mistral, Qwen2, Qwen3)")
    add("--model-overrides", default="{}", metavar="DICT",
        help="options that a fairseq checkpoint lacks, as a Python dict: \"{'decoder_attention_heads': "
             "8}\"")  # fmt: skip
    add(
        "--trust-checkpoint",
        action="store_true",
        help="load a file that holds more than plain data; such a file can run code",
    )
    add_user_dir(result)
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; a UserError becomes one line on stderr and status 2."""
    args = parser().parse_args(argv)
    if match := re.fullmatch(r"(.*-shard)\d+(\.pt)", args.source):
        _join(args, match)
        return 0
    from momentum_lm.files import refuse_pipes
    from momentum_lm.formats.from_huggingface import find_model

    source, output = find_model(args.source, args.gguf_file), Path(os.path.abspath(args.output))
    refuse_pipes(*(source.iterdir() if source.is_dir() else [source]))
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{args.output} holds {args.source}; choose another OUTPUT")
    if source.is_dir() and (args.gguf_file or (source / "config.json").exists()):
        _to_fairseq(args, source, output)
    elif source.suffix == ".gguf":
        raise UserError(f"{args.source} is a GGUF file: give its folder, and --gguf-file {source.name}")
    elif not source.is_dir() or any(source.glob("*.pt")):
        with named(NAMES):
            _to_huggingface(args, output)
    else:
        found = next((f"; for its GGUF file add --gguf-file {path.name}" for path in source.glob("*.gguf")), "")
        raise UserError(
            f"{args.source} is neither a model of Hugging Face (it has no config.json) nor a fairseq checkpoint (no "
            f".pt file){found}"
        )
    return 0


def _to_fairseq(args: argparse.Namespace, source: Path, output: Path) -> None:
    from momentum_lm.formats.decoder_options import training_words
    from momentum_lm.formats.folder import whole_folder
    from momentum_lm.formats.from_huggingface import look, write_checkpoint

    _refuse(args, "a model of Hugging Face", "tokenizer", "model_overrides")
    if args.gguf_file and not (source / args.gguf_file).is_file():
        raise UserError(f"{args.source} holds no {args.gguf_file}")
    with whole_folder(output, args.force) as folder:
        found = look(source, folder, args.trust_checkpoint, args.gguf_file)
        with _bar(found.tensors.values()) as progress:
            write_checkpoint(found, folder, _dtype(args), progress)
    print(
        f"{args.output}: {found.family.architecture} of {sum(lazy.numel for lazy in found.tensors.values()):,} "
        "parameters"
    )
    for note in found.notes:
        print(f"note: {note}")
    words = [*training_words(found.decoder), "--tokens-per-sample", str(found.decoder.max_positions)]
    print(
        f"next: fairseq-eval --task lm_perplexity DATA --path {args.output}, or to train on: fairseq-train DATA "
        f"--finetune-from-model {args.output}/model.pt {shlex.join(words)}"
    )


def _to_huggingface(args: argparse.Namespace, output: Path) -> None:
    from momentum_lm.formats.folder import whole_folder
    from momentum_lm.formats.lazy import Lazy
    from momentum_lm.formats.native import read_native
    from momentum_lm.formats.to_huggingface import write_model

    _refuse(args, "a fairseq checkpoint", "gguf_file")
    with whole_folder(output, args.force) as folder:
        lm = read_native(args.source, args.model_overrides, args.trust_checkpoint, tokenizer=args.tokenizer)
        tensors = [Lazy.of(parameter) for parameter in lm.model.parameters()]
        with _bar(tensors) as progress:
            architecture, numbers, notes = write_model(lm, folder, _dtype(args), progress)
    print(f"{args.output}: {architecture} of {numbers:,} parameters")
    for note in notes:
        print(f"note: {note}")


@contextlib.contextmanager
def _bar(tensors: Iterable[Lazy]) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr, and what to tell of the bytes that are written."""
    total = sum(lazy.nbytes for lazy in tensors)
    with progress_bar(total=total, unit="B", unit_scale=True, desc="weights", delay=1) as bar:
        yield bar.update


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    from momentum_lm.model.precision import DTYPES

    return DTYPES.get(args.dtype)


def _refuse(args: argparse.Namespace, what: str, *flags: str) -> None:
    for flag in flags:
        if getattr(args, flag) not in (None, "{}"):
            raise UserError(f"--{flag.replace('_', '-')} does nothing to {args.source}, which is {what}; leave it out")


def _join(args: argparse.Namespace, match: re.Match[str]) -> None:
    _refuse(args, "a part of a checkpoint", "dtype", "tokenizer", "model_overrides", "gguf_file")
    if os.path.lexists(args.output):
        if os.path.islink(args.output) or not os.path.isfile(args.output):
            what = "a link, a folder or a device"
            raise UserError(f"{args.output} is {what}; OUTPUT of a checkpoint in parts is the file to make")
        if not args.force:
            raise UserError(f"{args.output} is there already; choose another name, or add --force")
    import torch

    from momentum_lm.files import atomic_write, refuse_pipes
    from momentum_lm.formats.checkpoint import load_checkpoint
    from momentum_lm.formats.options import num_updates
    from momentum_lm.formats.shards import join_shards, part_count

    refuse_pipes(args.source)

    def load(rank: int) -> dict[str, Any]:
        return load_checkpoint(f"{match[1]}{rank}{match[2]}", trust=args.trust_checkpoint, mmap=True)

    try:
        first = load(0)
        world = part_count(first)
        bar = progress_bar(range(1, world), desc="parts", delay=1)
        state = join_shards([first, *map(load, bar)])
        updates = num_updates(state)
    except TornCheckpoint:
        raise
    except UserError as error:
        raise UserError(f"{args.source}: ", error) from error
    with atomic_write(args.output, "wb") as file:
        torch.save(state, file)
    print(f"{args.output}: {world} parts, {updates:,} updates, {os.path.getsize(args.output):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
