"""``momentum-lm convert``: one ordinary checkpoint from the parts that a fully sharded run wrote."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard

from .options import Parser


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    result = Parser(
        prog="momentum-lm convert",
        description="Joins the parts of a checkpoint of --ddp-backend fully_sharded --use-sharded-state into one ordinary checkpoint.",
        epilog="example: momentum-lm convert checkpoints/checkpoint_last-shard0.pt checkpoints/checkpoint_last.pt",
    )
    result.add_argument("source", metavar="CHECKPOINT-shardN.pt", help="any of the parts; the others lie beside it")
    result.add_argument("output", metavar="OUT.pt", help="the checkpoint to write")
    result.add_argument("--force", action="store_true", help="replace OUT.pt if it is there")
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; a UserError becomes one line on stderr and status 2."""
    args = parser().parse_args(argv)
    match = re.fullmatch(r"(.*-shard)\d+(\.pt)", args.source)
    if not match:
        raise UserError(f"{args.source} is not a part of a sharded checkpoint: those are called NAME-shard0.pt, NAME-shard1.pt, ...")
    if os.path.exists(args.output) and not args.force:
        raise UserError(f"{args.output} is there already; choose another name, or add --force")
    import torch
    from tqdm import tqdm

    import fairseq_compat
    from momentum_lm.files import atomic_write
    from momentum_lm.training.sharding import join_shards

    first = fairseq_compat.load_checkpoint(f"{match[1]}0{match[2]}", mmap=True)
    world = (first.get("fsdp_metadata") or {}).get("world_size", 1)
    bar = tqdm(range(1, world), desc="parts", file=sys.stderr, delay=1)
    others = [fairseq_compat.load_checkpoint(f"{match[1]}{rank}{match[2]}", mmap=True) for rank in bar]
    state = join_shards([first, *others])
    with atomic_write(args.output, "wb") as file:
        torch.save(state, file)
    updates = state["optimizer_history"][-1]["num_updates"]
    print(f"{args.output}: {world} parts, {updates:,} updates, {os.path.getsize(args.output):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
