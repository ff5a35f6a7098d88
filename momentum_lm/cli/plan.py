"""``momentum-lm plan``: what a training run needs and how long it takes, before it starts."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from momentum_lm.errors import Argument, UserError, arg, flags, main_guard, named

from .options import Parser, add_user_dir

if TYPE_CHECKING:
    from momentum_lm.planning.plan import Job, Option, Plan

_EPILOG = """
Numbers may end in K, M, B or T: 512K, 300B. Memory comes from a simulated training step of the real decoder (no
dropout, documents not packed, blocks not compiled), which tests compare with measured ones on CPUs, to 10%. Speed
does not: it is --mfu of the data sheet's peak, an assumption until a run's log shows its own mfu. The command's
learning rate is that of GPT-3 at this size, its warm-up 1% of the updates.
Exit status: 1 if nothing fits, and then the last lines say what would.
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Peak learning rates by parameters, up to so many: GPT-3's (arXiv 2005.14165, table 2.1); of tiny, the quickstart's.
_RATES = ((2e7, 6e-3), (2e8, 6e-4), (5e8, 3e-4), (1.6e9, 2e-4), (4e9, 1.6e-4), (1e10, 1.2e-4), (math.inf, 1e-4))


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    result = Parser(
        prog="momentum-lm plan",
        description="Parameters, FLOPs, memory by strategy, batch, days, cost of momentum, and the command that "
        "trains.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = result.add_argument_group("model")
    model.add_argument(
        "--arch", required=True, metavar="ARCH", help="momentum_lm_1_3b, llama_lm_8b, ...: as for fairseq-train"
    )
    add_user_dir(model)
    model.add_argument("--vocab-size", type=int, default=51200, metavar="N", help="(default: %(default)s)")
    model.add_argument(
        "--context", type=int, default=2048, metavar="N", help="tokens of a sample (default: %(default)s)"
    )
    for name, (_, kind, entry) in _model_options().items():
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"metavar": "X"}
        model.add_argument(f"--{name.replace('_', '-')}", **how, default=None, help=entry.help)
    machine = result.add_argument_group("machines")
    machine.add_argument(
        "--gpu", required=True, metavar="GPU", help="h200, h100, a100-80gb, ...; a name that is not known lists all"
    )
    machine.add_argument("--gpus", type=int, default=1, metavar="N", help="in all (default: %(default)s)")
    machine.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    machine.add_argument(
        "--node-bandwidth", type=float, default=400.0, metavar="GB/s",
        help="between nodes, one direction (default: %(default)g: eight InfiniBand cards of 400 Gbit/s)",
    )  # fmt: skip
    run = result.add_argument_group("training")
    run.add_argument("--tokens", required=True, metavar="N", help="to train on, in all, such as 300B")
    run.add_argument(
        "--batch-tokens", default="512K", metavar="N", help="of an update, all GPUs together (default: %(default)s)"
    )
    run.add_argument(
        "--batch-size", type=int, metavar="N", help="samples of a GPU's micro-batch (default: as many as fit)"
    )
    run.add_argument(
        "--precision",
        default="bf16",
        choices=["bf16", "fp32"],
        help="bf16: autocast over fp32 weights (default: %(default)s)",
    )
    run.add_argument(
        "--strategy", default="auto", choices=["auto", "ddp", "fsdp"],
        help="auto: the fastest that fits (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--checkpoint-activations", action="store_true", help="consider nothing else (default: where it is needed)"
    )
    run.add_argument("--compile", action="store_true", help="compile each block: memory is then less than stated")
    run.add_argument(
        "--mfu", type=float, default=0.45, metavar="SHARE", help="assumed share of the peak (default: %(default)s)"
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``momentum-lm plan``: exit status 1 if nothing fits, else 0."""
    args = parser().parse_args(argv)
    from momentum_lm.planning.plan import make_plan

    plan = make_plan(_job(args))
    command = _command(plan, args) if plan.chosen else None
    print(json.dumps(_as_json(plan, command), indent=1) if args.json else _text(plan, args, command))
    return 0 if plan.chosen else 1


def number(text: str, flag: str) -> int:
    """``300B`` -> 300,000,000,000. Raises UserError naming the flag for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.upper())
    if not match:
        raise UserError(f"{flag} {text}: give a number, which may end in K, M, B or T, such as 300B")
    return round(float(match[1]) * _UNITS[match[2]])


def _job(args: argparse.Namespace) -> Job:
    from momentum_lm.formats.decoder_options import defaults, from_fairseq
    from momentum_lm.planning.plan import Job

    if args.vocab_size < 5:
        raise UserError(
            arg(vocab_size=args.vocab_size), ": a fairseq dictionary has four special entries, so at least 5"
        )
    given = {name: getattr(args, name) for name in _model_options() if getattr(args, name) is not None}
    given["max_target_positions"] = args.context
    with named(_flag):
        return Job(
            config=from_fairseq({**defaults(args.arch), **given}, args.vocab_size, names=lambda argument: argument),
            gpu=args.gpu,
            gpus=args.gpus,
            tokens=number(args.tokens, "--tokens"),
            length=args.context,
            batch_tokens=number(args.batch_tokens, "--batch-tokens"),
            micro_batch=args.batch_size,
            bf16=args.precision == "bf16",
            strategy=args.strategy,
            checkpointing=args.checkpoint_activations,
            mfu=args.mfu,
            gpus_per_node=args.gpus_per_node,
            node_bandwidth=args.node_bandwidth * 1e9,
        )


def _model_options() -> dict[str, tuple[str, Any, Any]]:
    """The options of the decoder's table that are flags here too. Memory is that without dropout."""
    from momentum_lm.formats.decoder_options import table

    elsewhere = ("max_target_positions", "checkpoint_activations")  # --context, and what the command may choose itself
    return {name: row for name, row in table().items() if name not in elsewhere and not name.endswith("dropout")}


def _flag(argument: Argument) -> Argument | str:
    """What this command calls an argument of Job."""
    if argument.name == "bf16":
        return f"--precision {'bf16' if argument.value else 'fp32'}"
    if argument.name == "node_bandwidth":
        return f"--node-bandwidth {argument.value / 1e9:g}"
    return flags(
        length="--context", max_target_positions="--context", micro_batch="--batch-size",
        checkpointing="--checkpoint-activations",
    )(argument)  # fmt: skip


def _command(plan: Plan, args: argparse.Namespace) -> str:
    """The line that trains so. Several nodes: on each of them, with HOST the first one's name."""
    from momentum_lm.formats.decoder_options import training_words

    job, option = plan.job, plan.chosen
    assert option is not None
    nodes = max(1, job.gpus // job.gpus_per_node)
    launch = [] if job.gpus == 1 else ["torchrun", "--nproc-per-node", min(job.gpus, job.gpus_per_node)]
    if nodes > 1:
        launch += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500", "--no-python"]
    elif launch:
        launch += ["--standalone", "--no-python"]
    model = training_words(job.config, args.arch)
    for flag, on in (("--checkpoint-activations", option.checkpointing), ("--compile", args.compile)):
        model += [flag] if on else []
    backend = {"ddp": ["--ddp-backend", "pytorch_ddp"], "fsdp": ["--ddp-backend", "fully_sharded"]}.get(
        option.strategy, []
    )
    updates = plan.updates
    words = [
        *[*launch, "fairseq-train", "data", "--task", "momentum_language_modeling"],
        *([] if args.user_dir is None else ["--user-dir", args.user_dir]),
        *["--autocast", "bf16" if job.bf16 else "none", *model],
        *[
            "--criterion",
            "chunked_cross_entropy",
            "--optimizer",
            "fused_adamw",
            "--weight-decay",
            0.1,
            "--clip-norm",
            2.0,
        ],
        *["--lr", next(rate for most, rate in _RATES if plan.parameters.total <= most)],
        *["--lr-scheduler", "polynomial_decay"],
        *["--warmup-updates", max(1, updates // 100), "--total-num-update", updates, "--max-update", updates],
        *["--tokens-per-sample", job.length, "--batch-size", option.micro_batch, "--update-freq", option.update_freq],
        *[*backend, "--save-dir", "checkpoints"],
    ]
    return shlex.join(map(str, words))


def _text(plan: Plan, args: argparse.Namespace, command: str | None) -> str:
    from momentum_lm.planning.plan import USABLE
    from momentum_lm.report.tables import Table

    job, parameters, chosen = plan.job, plan.parameters, plan.chosen
    lines = [
        f"{args.arch} on {job.gpus:,} x {job.gpu}, {_short(job.tokens)} tokens, context {job.length:,}, "
        f"{args.precision}",
        "",
        f"parameters      {parameters.total:,}: embedding {parameters.embedding:,}, other {parameters.other:,}, "
        f"of which momentum {parameters.momentum:,}",
        f"FLOPs           {plan.flops_per_token:.3g} a token, forward and backward; "
        f"{plan.flops_per_token * job.tokens:.3g} in all",
        "",
        Table(["on each GPU", *map(_title, plan.options)], _rows(plan)).text(),
        "",
    ]
    usable = f"{USABLE * job.hardware.memory / 1e9:,.0f} of {job.hardware.memory / 1e9:,.0f} GB"
    if chosen is None:
        lines += [f"nothing fits in {usable}. What would:"]
        others = "a shorter --context or a smaller --arch; no GPU of the table is large enough"
        lines += [f"  {hint}" for hint in _hints(plan) or [others]]
        return "\n".join(lines)
    rate = plan.tokens_per_second
    lines += [
        f"choice          {_title(chosen)}: {chosen.micro_batch} x {job.length:,} tokens a GPU, --update-freq "
        f"{chosen.update_freq}, "
        f"{chosen.tokens_per_update:,} tokens an update",
        f"speed           {rate / job.gpus:,.0f} tokens/s a GPU, {rate:,.0f} in all",
        f"time            {_days(plan.days)}: {plan.updates:,} updates of {chosen.step_seconds:.3g} s",
    ]
    if job.gpus > 1:
        hidden = (
            f"{chosen.exposed_seconds:.3g} s of it not hidden" if chosen.exposed_seconds else "hidden behind computing"
        )
        sent = f"{chosen.communication_bytes / 1e9:,.3g} GB sent by each GPU"
        lines.append(f"communication   {sent}, {chosen.communication_seconds:.3g} s an update, {hidden}")
    if plan.momentum is not None:
        moved, seconds = plan.momentum.bytes_per_block, plan.momentum.seconds
        lines.append(
            f"momentum        {moved / 1e6:,.0f} MB moved by a block for a micro-batch, {1e3 * seconds:.3g} ms an "
            "update "
            f"({seconds / chosen.step_seconds:.2%}); {plan.momentum.flops_share:+.2%} FLOPs"
        )
    return "\n".join([*lines, "", *_assumptions(plan, usable), "", command or ""])


def _hints(plan: Plan) -> list[str]:
    return [" ".join(str(_flag(Argument(*one))) for one in hint.items()) for hint in plan.hints]


def _title(option: Option) -> str:
    return f"{option.strategy}, checkpointed" if option.checkpointing else option.strategy


def _rows(plan: Plan) -> list[list[str]]:
    """What tells the options apart: the micro-batch that each takes, and its memory with it."""
    names = {
        "weights": "weights, fp32",
        "gradients": "gradients, fp32",
        "optimizer": "Adam, fp32",
        "copies": "weights in bf16",
        "activations": "activations",
        "loss": "logits and loss",
        "backward": "backward pass",
        "communication": "communication",
    }
    options = plan.options
    return [
        ["largest micro-batch", *(str(o.largest_micro_batch) for o in options)],
        ["micro-batch taken", *(str(o.micro_batch) for o in options)],
        ["--update-freq", *(str(o.update_freq) for o in options)],
        *[[f"{text}, GB", *(f"{getattr(o.memory, name) / 1e9:.2f}" for o in options)] for name, text in names.items()],
        ["all, GB", *(f"{o.memory.total / 1e9:.2f}" for o in options)],
        ["fits", *("yes" if o.fits else "no" for o in options)],
        ["seconds an update", *(f"{o.step_seconds:.3g}" if o.fits else "" for o in options)],
    ]


def _assumptions(plan: Plan, usable: str) -> list[str]:
    job = plan.job
    lines = [
        f"assumed: MFU {job.mfu:.0%} of {job.peak_flops / 1e12:,.0f} TFLOP/s, until measured; checkpointing adds a "
        "third to the work",
        f"assumed: {usable} are usable; the rest is for CUDA, NCCL and gaps",
    ]
    if job.gpus > 1:
        inside = f"{job.hardware.link / 1e9:,.0f} GB/s between the GPUs of a node"
        between = f", {job.node_bandwidth / 1e9:,.0f} GB/s between nodes" if job.gpus > job.gpus_per_node else ""
        lines.append(f"assumed: {inside}{between}, one direction, at the full rate of the data sheets")
    if plan.momentum is not None:
        how = "in a fused kernel" if plan.momentum.kernel else "by torch's operations one by one, without a kernel"
        lines.append(
            f"assumed: momentum {how}, at the data sheet's memory bandwidth of {job.hardware.bandwidth / 1e12:.3g} TB/s"
        )
    return lines


def _short(count: float) -> str:
    unit = next(unit for unit in ("T", "B", "M", "K", "") if count >= _UNITS[unit] or not unit)
    return f"{count / _UNITS[unit]:.4g}{unit}"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"


def _as_json(plan: Plan, command: str | None) -> dict[str, Any]:
    """The same numbers: bytes, seconds, days."""

    def option(o: Option) -> dict[str, Any]:
        return {**asdict(o), "memory": {**asdict(o.memory), "total": o.memory.total}, "step_seconds": o.step_seconds}

    chosen = None
    if plan.chosen is not None:
        chosen = {
            **option(plan.chosen),
            "updates": plan.updates,
            "tokens_per_second": plan.tokens_per_second,
            "tokens_per_second_per_gpu": plan.tokens_per_second / plan.job.gpus,
            "days": plan.days,
        }
    return {
        "job": asdict(plan.job),
        "hardware": asdict(plan.job.hardware),
        "parameters": {**plan.parameters._asdict(), "total": plan.parameters.total},
        "flops_per_token": plan.flops_per_token,
        "total_flops": plan.flops_per_token * plan.job.tokens,
        "options": [option(o) for o in plan.options],
        "chosen": chosen,
        "momentum": None if plan.momentum is None else asdict(plan.momentum),
        "hints": _hints(plan),
        "command": command,
    }


if __name__ == "__main__":
    sys.exit(main())
