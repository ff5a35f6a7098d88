"""Everything of GPU_CHECKS.md that a machine can do alone, on one GPU, in about 15 minutes: correctness, then speed.

    python benchmarks/gpu_checks.py [--out FOLDER] [--only NAME,NAME] [--device cuda]

Each check is a process of its own with a time limit; its output goes to FOLDER/NAME.log, and the summary, a line each, to
FOLDER/summary.txt. Exit status 1 if one failed. `--device cpu` tries the training checks without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scaling import make_data

HERE = Path(__file__).parent
TRAINING = """--task momentum_language_modeling --criterion chunked_cross_entropy --optimizer fused_adamw --arch momentum_lm_tiny
    --momentum-learned --clip-norm 1.0 --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 10 --tokens-per-sample 256 --batch-size 8
    --max-update 40 --num-workers 0 --disable-validation --no-save --log-interval 1 --log-format json --seed 1"""
# Flags of a training run, and how far its losses may be from those of the CPU in fp32, relatively.
VARIANTS = {
    "fp32": ("--autocast none", 1e-3),
    "bf16": ("--autocast bf16", 0.02),
    "compiled": ("--autocast bf16 --compile", 0.02),
    "fp16": ("--fp16 --fp16-no-flatten-grads --fp16-init-scale 4", 0.02),
    "packed": ("--autocast none --packed-documents", 1e-3),
}


def run(words: list[str], limit: float, log: Path) -> str:
    """The output, also in ``log``. Raises subprocess errors."""
    with open(log, "a") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, cwd=HERE.parent)
        file.write(done.stdout)
    done.check_returncode()
    return done.stdout


def python(*words: object, limit: float = 600) -> Callable[[Path], str]:
    """A check that is a command; its last line is the summary."""
    return lambda log: run([sys.executable, *map(str, words)], limit, log).strip().splitlines()[-1]


def losses(data: str, flags: str, log: Path) -> list[float]:
    output = run([sys.executable, "-m", "fairseq_compat", "fairseq-train", data, *TRAINING.split(), *flags.split()], 300, log)
    lines = [json.loads(line.split(" | ")[-1]) for line in output.splitlines() if "| train_inner | {" in line]
    return [float(line["loss"]) for line in lines]


def training(name: str, device: str, log: Path) -> str:
    """One variant on the device beside fp32 on the CPU."""
    flags, tolerance = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), 256 * 8 * 45)
        packed = " --packed-documents" if "packed" in flags else ""
        expected = losses(folder, f"--cpu --autocast none{packed} --save-dir {folder}/a", log)
        found = losses(folder, f"{flags} {'--cpu' if device == 'cpu' else ''} --save-dir {folder}/b", log)
    assert len(found) == len(expected) == 40, f"{len(found)} and {len(expected)} losses"
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst < tolerance, f"losses differ by up to {worst:.2%}"
    return f"losses within {worst:.3%} of fp32 on the CPU, over 40 updates from {expected[0]:.2f} to {expected[-1]:.2f}"


def step(*words: object) -> Callable[[Path], str]:
    return lambda log: "\n    ".join(run([sys.executable, HERE / "train_step.py", *map(str, words)], 600, log).splitlines()[-15:])


def checks(device: str) -> dict[str, Callable[[Path], str]]:
    train = {f"train_{name}": functools.partial(training, name, device) for name in VARIANTS}
    if device == "cpu":
        return train
    return {
        "kernels": python("-m", "pytest", "-q", "tests/ops/triton_kernel.py"),
        **train,
        "ema_speed": lambda log: "\n    ".join(run([sys.executable, HERE / "ema_kernel.py"], 300, log).splitlines()[-20:]),
        "step_350m": step("--device", "cuda", "--shape", "350m", "--length", 2048, "--batch", 16, "--steps", 20, "--rounds", 2),
        "step_350m_eager": step(
            "--device", "cuda", "--shape", "350m", "--length", 2048, "--batch", 16, "--steps", 10, "--rounds", 1, "--no-compile"
        ),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_checks")))
    parser.add_argument("--only", help="names with commas between")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = checks(args.device)
    names = args.only.split(",") if args.only else list(wanted)
    failed = 0
    with open(args.out / "summary.txt", "a") as summary:
        for name in names:
            began = time.monotonic()
            try:
                result = f"ok    {wanted[name](args.out / f'{name}.log')}"
            except (subprocess.SubprocessError, AssertionError) as error:
                failed += 1
                result = f"FAILED {type(error).__name__}: {str(error)[:200]}; see {name}.log"
            line = f"{name:16} {time.monotonic() - began:5.0f} s  {result}"
            print(line, flush=True)
            summary.write(line + "\n")
            summary.flush()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
