"""``momentum-lm preflight``: checks the machines of a run against each other before it starts."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from momentum_lm.errors import UserError, main_guard

from .options import Parser


def parser() -> argparse.ArgumentParser:
    """The command's flags; what is not given comes from the environment that examples/pretraining/train.sh and SLURM
    use.
    """
    result = Parser(
        prog="momentum-lm preflight",
        description="Run on every machine at once: names those that do not come, cannot be reached or differ, instead "
        "of hanging.",
        epilog="example, under SLURM: HEAD=node001:29500 srun --ntasks-per-node=1 momentum-lm preflight",
    )
    add = result.add_argument
    add("--head", default=os.environ.get("HEAD"), metavar="HOST:PORT", help="where node 0 listens (default: $HEAD)")
    add(
        "--nodes",
        default=os.environ.get("NODES") or os.environ.get("SLURM_NNODES"),
        metavar="N",
        help="default: $NODES or $SLURM_NNODES",
    )
    add("--rank", default=os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID"), metavar="R",
        help="this machine's number, from 0 (default: $NODE_RANK or $SLURM_NODEID)")  # fmt: skip
    add(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for the others (default: %(default)g)"
    )
    add("--megabytes", type=int, default=64, metavar="N", help="size of the all-reduce (default: %(default)s)")
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; a UserError becomes one line on stderr and status 2."""
    args = parser().parse_args(argv)
    host, _, port = (args.head or "").rpartition(":")
    if not host or not port.isdigit():
        raise UserError("--head HOST:PORT (or $HEAD) is needed: the name of node 0, and a free port of it")
    for name, least in (("nodes", 1), ("rank", 0)):
        value = getattr(args, name)
        if value is None or not str(value).isdigit() or int(value) < least:
            raise UserError(
                f"--{name} {value or 'is missing'}: a number from {least} on is needed, here or in the environment"
            )
    nodes, rank = int(args.nodes), int(args.rank)
    if rank >= nodes:
        raise UserError(f"--rank {rank}: of {nodes} nodes the last is {nodes - 1}")
    if args.timeout <= 0 or args.megabytes < 1:
        raise UserError("--timeout and --megabytes must be positive")
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "FATAL"
    )  # torch's own warnings about connections tell less than this command
    from momentum_lm.planning.preflight import Place, preflight

    preflight(Place(rank, nodes, host, int(port), _hosts()), args.timeout, args.megabytes)
    return 0


def _hosts() -> tuple[str, ...]:
    """The machines' names in their order, where SLURM tells them."""
    nodes, scontrol = os.environ.get("SLURM_JOB_NODELIST"), shutil.which("scontrol")
    if not nodes or not scontrol:
        return ()
    return tuple(
        subprocess.run(
            [scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout.split()
    )


if __name__ == "__main__":
    sys.exit(main())
