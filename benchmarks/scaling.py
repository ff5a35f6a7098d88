"""How much longer a training step takes with more processes, each doing as much: the cost of communication, and of what
they share.

    python benchmarks/scaling.py [--processes 1,2] [--updates 40] [--rounds 2] [--backend pytorch_ddp]

Runs examples/pretraining/train.sh on random tokens, one thread a process on a CPU, and prints the median step and its
ratio to the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from momentum_lm.text.indexed import IndexedDatasetWriter

TRAIN = Path(__file__).parent.parent / "examples" / "pretraining" / "train.sh"
VOCAB = 8000


def make_data(folder: Path, tokens: int) -> None:
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(VOCAB - 4)))
    draw = np.random.default_rng(0)
    for split, count in (("train", tokens), ("valid", 2000)):
        with IndexedDatasetWriter(folder / split, VOCAB) as writer:
            for _ in range(count // 500):
                writer.add(np.append(draw.integers(4, VOCAB, 499), 2))


def seconds_a_step(data: Path, save: Path, processes: int, args: argparse.Namespace) -> list[float]:
    flags = f"""--arch momentum_lm_tiny --decoder-layers {args.layers} --decoder-embed-dim {args.dim}
        --decoder-ffn-embed-dim {4 * args.dim} --decoder-attention-heads {args.dim // 64} --tokens-per-sample 256
        --batch-size 8 --update-freq 1 --max-update {args.updates} --cpu --distributed-backend gloo
        --ddp-backend {args.backend} --num-workers 0 --disable-validation --no-save --log-interval 5
        --log-format json""".split()
    environment = {**os.environ, "GPUS": str(processes), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
    command = ["bash", str(TRAIN), str(data), str(save), *flags]
    output = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    lines = [json.loads(line.split(" | ")[-1]) for line in output.splitlines() if "| train_inner | {" in line]
    rates = [float(line["tokens_per_second"]) for line in lines if "tokens_per_second" in line]
    return [processes * 8 * 256 / rate for rate in rates[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--backend", default="pytorch_ddp")
    args = parser.parse_args()
    counts = [int(n) for n in args.processes.split(",")]
    times: dict[int, list[float]] = {n: [] for n in counts}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), 256 * 8 * max(counts) * args.updates + 10_000)
        for number in range(args.rounds):
            for n in counts:
                times[n] += seconds_a_step(Path(folder), Path(folder) / f"run{number}-{n}", n, args)
    first = statistics.median(times[counts[0]])
    for n in counts:
        step = statistics.median(times[n])
        print(
            f"{n} processes: {step:.3f} s a step ({min(times[n]):.3f}-{max(times[n]):.3f}), {step / first:.3f} of "
            f"{counts[0]}'s"
        )


if __name__ == "__main__":
    sys.exit(main())
