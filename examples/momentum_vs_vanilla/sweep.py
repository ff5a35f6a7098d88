"""Which momentum, if any, lowers perplexity? Trains every variant on equal tokens with stock ``fairseq-train`` and compares.

    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --splits valid
    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --seeds 1,2,3 --variants vanilla,ema_0.3

DATA comes from ``momentum-lm prepare``. Variants and seeds may be added by later calls: what is finished is not run again.
Selection uses the ``valid`` split; quote the ``test`` split.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from momentum_lm.analysis.statistics import t_interval
from momentum_lm.files import write_json

ETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
VARIANTS: dict[str, list[str]] = {
    "vanilla": ["--arch", "gpt_lm_tiny"],
    **{f"ema_{eta}": ["--arch", "momentum_lm_tiny", "--momentum-eta", str(eta)] for eta in ETAS},
    "ema_learned": ["--arch", "momentum_lm_tiny", "--momentum-eta", "0.5", "--momentum-learned"],
    **{f"ema_{eta}_normalized": ["--arch", "momentum_lm_tiny", "--momentum-eta", str(eta), "--momentum-normalize"] for eta in (0.7, 0.9)},
    "ema_0.5_gated": ["--arch", "momentum_lm_tiny", "--momentum-eta", "0.5", "--momentum-gate", "zero"],
    "multi_ema": ["--arch", "momentum_lm_tiny", "--momentum-kind", "multi_ema"],
}
TOKENS_PER_SAMPLE, BATCH = 256, 8


def script(name: str) -> str:
    """A console script of this interpreter's environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"error: {name} is not installed beside {sys.executable}; install the project first (README.md)")
    return found


def train(data: Path, folder: Path, variant: str, seed: int, tokens: float, lr: float, autocast: str, threads: int) -> None:
    """One run; its folder holds ``done`` when it is finished, and goes on from its last checkpoint when it is not."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    updates = round(tokens / (TOKENS_PER_SAMPLE * BATCH))
    command = [
        script("fairseq-train"), str(data), "--task", "momentum_language_modeling", *VARIANTS[variant], "--autocast", autocast,
        "--criterion", "chunked_cross_entropy", "--optimizer", "fused_adamw", "--weight-decay", "0.1", "--clip-norm", "1.0",
        "--lr", str(lr), "--lr-scheduler", "cosine", "--warmup-updates", str(min(40, updates // 5)), "--max-update", str(updates),
        "--tokens-per-sample", str(TOKENS_PER_SAMPLE), "--batch-size", str(BATCH), "--seed", str(seed), "--cpu", "--num-workers", "0",
        "--save-dir", str(folder), "--save-interval-updates", "500", "--keep-interval-updates", "1", "--no-epoch-checkpoints",
        "--disable-validation", "--log-interval", "25", "--log-format", "json", "--tensorboard-logdir", str(folder / "tensorboard"),
    ]  # fmt: skip
    (folder / "command.json").write_text(json.dumps(command))
    start = time.time()
    with open(folder / "train.log", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if status:
        tail = (folder / "train.log").read_text().splitlines()[-5:]
        raise SystemExit("error: " + "\n".join([f"{variant} seed {seed} failed, see {folder / 'train.log'}:", *tail]))
    (folder / "done").write_text(f"{time.time() - start:.0f} s\n")


def evaluate(data: Path, folder: Path, split: str, lengths: str) -> list[dict]:
    """Perplexities of one run on one split; fairseq-eval keeps and reuses its own results."""
    out = folder / f"perplexity_{split}"
    command = [script("fairseq-eval"), "--task", "lm_perplexity", str(data), "--path", str(folder / "checkpoint_last.pt"),
               "--split", split, "--context-lengths", lengths, "--results-dir", str(out)]  # fmt: skip
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(result.stdout)
    return json.loads((out / "results.json").read_text())["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--variants", default="all", help="comma-separated, or all: " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--tokens", type=float, default=8e5, help="training tokens per run")
    parser.add_argument(
        "--lr",
        type=float,
        default=6e-3,
        help="peak learning rate: the best of 1e-3, 3e-3, 6e-3 for vanilla, whose choice no momentum variant had a part in",
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
    args = parser.parse_args()
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants {','.join(unknown)}: not one of {', '.join(VARIANTS)}")

    # seed by seed, so that an interrupted sweep has whole seeds
    jobs = [(name, int(seed)) for seed in args.seeds.split(",") for name in names]

    def folder(name: str, seed: int) -> Path:
        return args.output / f"{args.tokens:.3g}" / name / f"seed{seed}"

    def work(job: tuple[str, int]) -> None:
        train(args.data, folder(*job), *job, args.tokens, args.lr, args.autocast, args.threads)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in tqdm(pool.map(work, jobs), total=len(jobs), desc="training", unit="run", smoothing=0):
            pass
    if args.train_only:
        return
    rows = []
    for name, seed in tqdm(jobs, desc="evaluating", unit="run"):
        for split in args.splits.split(","):
            rows += [{"variant": name, "seed": seed, **run} for run in evaluate(args.data, folder(name, seed), split, args.context_lengths)]
    stored = args.output / f"results_{args.tokens:.3g}.json"
    earlier = json.loads(stored.read_text())["runs"] if stored.exists() else []
    merged = {(r["variant"], r["seed"], r["split"], r["context_length"]): r for r in [*earlier, *rows]}
    write_json(stored, {"tokens": args.tokens, "lr": args.lr, "runs": list(merged.values())})
    for split in args.splits.split(","):
        for length in map(int, args.context_lengths.split(",")):
            print(f"\n{split}, context {length}, after {args.tokens:.3g} tokens\n{table(rows, names, split, length)}")


def table(rows: list[dict], names: list[str], split: str, length: int) -> str:
    """Markdown: perplexity (geometric mean over seeds) and its ratio to vanilla's, with Student's interval over paired seeds."""
    logs: dict[str, dict[int, float]] = {name: {} for name in names}
    for row in rows:
        if (row["split"], row["context_length"]) == (split, length):
            logs[row["variant"]][row["seed"]] = math.log(row["perplexity"])
    lines = ["| variant | seeds | perplexity | against vanilla | 95% interval |", "|---|---|---|---|---|"]
    for name in names:
        mean = math.exp(statistics.mean(logs[name].values()))
        differences = [value - logs["vanilla"][seed] for seed, value in logs[name].items() if seed in logs.get("vanilla", {})]
        ratio = interval = ""
        if differences and name != "vanilla":
            ratio = f"{math.exp(statistics.mean(differences)) - 1:+.1%}"
            if len(differences) > 1:
                bounds = t_interval(differences)
                interval = f"{math.exp(bounds.low) - 1:+.1%} to {math.exp(bounds.high) - 1:+.1%}"
        lines.append(f"| {name} | {len(logs[name])} | {mean:.1f} | {ratio} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
