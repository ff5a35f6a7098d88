"""Which momentum, if any, lowers perplexity? Trains every variant on equal tokens with stock ``fairseq-train`` and
compares.

    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --splits valid
    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --seeds 1,2,3 --variants vanilla,ema_0.3

DATA comes from ``momentum-lm prepare``. Variants and seeds may be added by later calls: what is finished is not run
again, and what was interrupted goes on; another --lr, --autocast or DATA needs another --output. Selection uses the
``valid`` split; quote the ``test`` split.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from momentum_lm.analysis.statistics import t_interval
from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import file_sha256, write_json
from momentum_lm.results.records import read_results
from momentum_lm.studies.flags import choices, integers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from jobs import Job, JobError, open_config, perplexity_command, run_all, saving, train, train_command

ETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
VARIANTS: dict[str, list[str]] = {
    "vanilla": ["--arch", "gpt_lm_tiny"],
    **{f"ema_{eta}": ["--arch", "momentum_lm_tiny", "--momentum-eta", str(eta)] for eta in ETAS},
    "ema_learned": ["--arch", "momentum_lm_tiny", "--momentum-eta", "0.5", "--momentum-learned"],
    **{
        f"ema_{eta}_normalized": ["--arch", "momentum_lm_tiny", "--momentum-eta", str(eta), "--momentum-normalize"]
        for eta in (0.7, 0.9)
    },
    "ema_0.5_gated": ["--arch", "momentum_lm_tiny", "--momentum-eta", "0.5", "--momentum-gate", "zero"],
    "multi_ema": ["--arch", "momentum_lm_tiny", "--momentum-kind", "multi_ema"],
}
TOKENS_PER_SAMPLE, BATCH = 256, 8


def training(args: argparse.Namespace, folder: Path, variant: str, seed: int) -> Job:
    """One run, which goes on from its last checkpoint where it was interrupted."""
    updates = round(args.tokens / (TOKENS_PER_SAMPLE * BATCH))
    command = train_command(
        args.data, VARIANTS[variant], seed, updates, lr=args.lr, warmup=40, tokens_per_sample=TOKENS_PER_SAMPLE,
        batch_size=BATCH,
        autocast=args.autocast,
    )  # fmt: skip
    command += [*saving(folder, every=500), "--tensorboard-logdir", str(folder / "tensorboard"), "--log-interval", "25"]
    return Job("train", command, folder, args.threads, updates)


def evaluation(args: argparse.Namespace, folder: Path, split: str) -> Job:
    """Perplexities of one run on one split."""
    command = perplexity_command(args.data, folder, split, args.context_lengths, folder / f"perplexity_{split}")
    return Job(f"perplexity_{split}", command, folder, args.threads)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--variants", default="all", help="comma-separated, or all: " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--tokens", type=float, default=8e5, help="training tokens per run")
    parser.add_argument(
        "--lr",
        type=float,
        default=6e-3,
        help="peak learning rate: the best of 1e-3, 3e-3, 6e-3 for vanilla, whose choice no momentum variant had a "
        "part in",
    )
    parser.add_argument("--context-lengths", default="64,128,256")
    parser.add_argument("--splits", default="valid,test")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument(
        "--autocast",
        default="none",
        choices=["none", "bf16"],
        help="bf16: twice as fast where the CPU has bf16 instructions",
    )
    parser.add_argument("--train-only", action="store_true")
    args = parser.parse_args(argv)
    names = list(VARIANTS) if args.variants == "all" else choices(args.variants, "--variants", list(VARIANTS))
    seeds, splits = integers(args.seeds, "--seeds", 1, "1,2,3"), args.splits.split(",")
    lengths = integers(args.context_lengths, "--context-lengths", 1, "64,128")
    for flag, least in (("jobs", 1), ("threads", 1), ("tokens", TOKENS_PER_SAMPLE * BATCH)):
        if not getattr(args, flag) >= least:
            raise UserError(f"--{flag} {getattr(args, flag):g}: must be at least {least}")

    args.data = args.data.resolve()
    sweep = args.output / f"{args.tokens:.3g}"
    data = file_sha256(args.data / "train.idx", args.data / "train.bin")[:16]
    open_config(sweep, {"tokens": args.tokens, "lr": args.lr, "autocast": args.autocast, "data": data}, "a sweep")
    # seed by seed, so that an interrupted sweep has whole seeds
    folders = {(name, seed): sweep / name / f"seed{seed}" for seed in seeds for name in names}
    evaluations = [evaluation(args, folder, split) for folder in folders.values() for split in splits]
    try:
        train([training(args, folder, *run) for run, folder in folders.items()], args.jobs, "training")
        if args.train_only:
            return 0
        run_all(evaluations, args.jobs, "evaluating")
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [
        {"variant": name, "seed": seed, **run}
        for (name, seed), folder in folders.items()
        for split in splits
        for run in read_results(folder / f"perplexity_{split}")["runs"]
    ]
    stored = args.output / f"results_{args.tokens:.3g}.json"
    earlier = json.loads(stored.read_text())["runs"] if stored.exists() else []
    merged = {(r["variant"], r["seed"], r["split"], r["context_length"]): r for r in [*earlier, *rows]}
    write_json(stored, {"tokens": args.tokens, "lr": args.lr, "runs": list(merged.values())})
    for split, length in itertools.product(splits, lengths):
        print(f"\n{split}, context {length}, after {args.tokens:.3g} tokens\n{table(rows, names, split, length)}")
    return 0


def table(rows: list[dict], names: list[str], split: str, length: int) -> str:
    """Markdown: perplexity (geometric mean over seeds) and its ratio to vanilla's, with Student's interval over paired
    seeds.
    """
    logs: dict[str, dict[int, float]] = {name: {} for name in names}
    for row in rows:
        if (row["split"], row["context_length"]) == (split, length):
            logs[row["variant"]][row["seed"]] = math.log(row["perplexity"])
    lines = ["| variant | seeds | perplexity | against vanilla | 95% interval |", "|---|---|---|---|---|"]
    for name in names:
        mean = math.exp(statistics.mean(logs[name].values()))
        differences = [
            value - logs["vanilla"][seed] for seed, value in logs[name].items() if seed in logs.get("vanilla", {})
        ]
        ratio = interval = ""
        if differences and name != "vanilla":
            ratio = f"{math.exp(statistics.mean(differences)) - 1:+.1%}"
            if len(differences) > 1:
                bounds = t_interval(differences)
                interval = f"{math.exp(bounds.low) - 1:+.1%} to {math.exp(bounds.high) - 1:+.1%}"
        lines.append(f"| {name} | {len(logs[name])} | {mean:.1f} | {ratio} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
