"""Programs that run side by side and log to files: trainings and evaluations of the quickstart and of examples."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from momentum_lm.cpu import usable_cpus
from momentum_lm.errors import UserError
from momentum_lm.files import write_json
from momentum_lm.system import progress_bar


class JobError(Exception):
    """A program failed; the message says which, and shows the end of its log."""


@dataclass
class Job:
    """A program that writes to a log file. A lock that it inherits says whether one from an earlier
    start still runs.
    """

    name: str
    command: list[str]
    folder: Path
    threads: int
    updates: int = 0  # of a training
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def done(self) -> Path:
        """Holds the command that has ended well."""
        return self.folder / f"{self.name}.done"

    def is_done(self) -> bool:
        """Whether this very command has ended well, now or earlier."""
        return self.done.exists() and json.loads(self.done.read_text(encoding="utf-8")) == self.command

    def start(self) -> bool:
        """False while one from an earlier, killed start is at it: it is left to finish or fail."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{self.name}.lock", "w") as lock, open(self.log, "ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock.fileno()],
            )
        return True

    def finished(self) -> bool:
        """Whether it has ended well. Raises JobError if it has failed."""
        status = None if self.process is None else self.process.poll()
        if status:
            text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")  # progress bars
            lines = [line for line in text.splitlines() if line.strip()][-15:]
            how = f"was killed by signal {-status}" if status < 0 else f"failed with exit status {status}"
            raise JobError("\n".join([f"{self.name} ({self.folder}) {how}. The end of {self.log}:", "", *lines]))
        if status == 0:
            write_json(self.done, self.command)
        return status == 0


def run_jobs(jobs: Sequence[Job], at_once: int, watch: Callable[[], None] = lambda: None) -> None:
    """Runs what is not done yet, ``at_once`` at a time, calling ``watch`` now and then. On any error, ends those that
    it started.
    """
    pending, active = [job for job in jobs if not job.is_done()], []
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


def train(jobs: Sequence[Job], at_once: int, label: str) -> None:
    """Runs trainings under one bar with the time left."""
    total = sum(job.updates for job in jobs)

    def progress() -> int:
        return sum(
            job.updates if job.is_done() else int(lines[-1]["num_updates"]) if (lines := log_lines(job.log)) else 0
            for job in jobs
        )

    with progress_bar(
        total=total, initial=progress(), desc=label, unit="update", smoothing=0.05, dynamic_ncols=True
    ) as bar:

        def watch() -> None:
            bar.update(progress() - bar.n)

        run_jobs(jobs, at_once, watch)


def last_bar(job: Job) -> Callable[[], None]:
    """What shows a program's own progress bar, out of its log, where this one's output is looked at."""
    shown = ""

    def watch() -> None:
        nonlocal shown
        text = job.log.read_text(encoding="utf-8", errors="replace")[-2000:] if job.log.exists() else ""
        bar = (re.findall(r"[^\r\n]*%\|[^\r\n]*\]", text) or [""])[-1]
        if bar != shown and sys.stderr.isatty():
            print(f"\r      {bar:<90.90}", end="", file=sys.stderr, flush=True)
        shown = bar
        if job.is_done() and sys.stderr.isatty():
            print("\r" + " " * 96 + "\r", end="", file=sys.stderr, flush=True)

    return watch


def log_lines(log: Path) -> list[dict[str, float]]:
    """What ``fairseq-train --log-format json`` logged of training, one entry an update, in order; a run that was
    resumed counts once.
    """
    found: dict[int, dict[str, float]] = {}
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for line in text.splitlines():
        if "| train_inner | {" in line and line.endswith("}"):
            entry = {
                key: float(value) for key, value in json.loads(line.split(" | ", 3)[3]).items() if value is not None
            }
            if {"num_updates", "loss"} <= entry.keys():
                found[int(entry["num_updates"])] = entry
    return [found[update] for update in sorted(found)]


def tool(name: str) -> str:
    """A console script of this interpreter's environment."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UserError(
            f"{path} is missing: start with `bash scripts/quickstart.sh`, or install by hand (docs/install.md)"
        )
    return str(path)


def train_command(
    data: Path,
    model: Sequence[str],
    seed: int,
    updates: int,
    *,
    lr: float,
    warmup: int,
    tokens_per_sample: int,
    batch_size: int,
    autocast: str,
    device: str = "cpu",
) -> list[str]:
    """The ``fairseq-train`` command of one run on a ``device`` ("cpu" or "cuda"), without the folders that it writes.
    ``model``: ``--arch`` and its flags.
    """
    words = [
        tool("fairseq-train"), data, "--task", "momentum_language_modeling", "--autocast", autocast,
        "--criterion", "chunked_cross_entropy", "--optimizer", "fused_adamw", "--weight-decay", 0.1, "--clip-norm", 1.0,
        "--lr", lr, "--lr-scheduler", "cosine", "--warmup-updates", min(warmup, updates // 5), "--max-update", updates,
        "--tokens-per-sample", tokens_per_sample, "--batch-size", batch_size, "--seed", seed,
        *(["--cpu"] if device == "cpu" else []), "--num-workers", 0, "--disable-validation", "--log-format", "json",
        *model,  # last, so that it may name another optimizer and the like
    ]  # fmt: skip
    return [str(word) for word in words]


def saving(folder: Path, every: int) -> list[str]:
    """Flags of ``fairseq-train``: one checkpoint in ``folder``, from which a run that is started again goes on."""
    return [
        "--save-dir",
        str(folder),
        "--no-epoch-checkpoints",
        "--save-interval-updates",
        str(every),
        "--keep-interval-updates",
        "1",
    ]


def perplexity_command(data: Path, run: Path, split: str, lengths: str, output: Path, device: str = "cpu") -> list[str]:
    """Of the last checkpoint of a run: equal tokens, nothing selected on the text that is measured. ``run``: its
    folder, or a checkpoint.
    """
    checkpoint = run if run.suffix == ".pt" else run / "checkpoint_last.pt"
    return [
        tool("fairseq-eval"), "--task", "lm_perplexity", str(data), "--path", str(checkpoint), "--split", split,
        "--context-lengths", lengths, "--device", device, "--batch-tokens", "2048", "--results-dir", str(output),
    ]  # fmt: skip


def run_all(jobs: Sequence[Job], at_once: int, label: str) -> None:
    """Runs programs under one bar that counts them."""
    with progress_bar(total=len(jobs), desc=label, unit="run", dynamic_ncols=True) as bar:
        run_jobs(jobs, at_once, lambda: bar.update(sum(job.is_done() for job in jobs) - bar.n))


def open_config(folder: Path, settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Opens or begins ``config.json`` of a folder: the settings of ``what`` ("a sweep"), and on what machine with which
    versions it runs.

    Raises UserError if it is of other settings, or if there is no such file but others.
    """
    wanted = json.loads(json.dumps(dict(settings)))
    path = folder / "config.json"
    if path.exists():
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if (there := config["settings"].get(name)) != value:
                raise UserError(
                    f"{path} is of {what} that differs in {name} ({json.dumps(there)} there, {json.dumps(value)} now): "
                    f"choose another --output, or remove {folder}"
                )
        return config
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and not {what}'s folder: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    packages = ("momentum_lm", "torch", "fairseq", "numpy", "sentencepiece", "tensorboard")
    config = {
        "settings": wanted,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
        "cores": usable_cpus(),
    }
    write_json(path, config)
    return config
