"""Which momentum, if any, lowers perplexity? Trains every variant on equal tokens with stock ``fairseq-train`` and
compares.

    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --splits valid --lr 3e-3,6e-3 --seeds 101,102
    python examples/momentum_vs_vanilla/sweep.py DATA --output runs/sweep --lr best --seeds 1,2,3 --variants vanilla,ema

DATA comes from ``momentum-lm prepare``. Forms, variants, learning rates and seeds may be added by later calls: what
``results_TOKENS.json`` of --output has is not run again, and what was interrupted goes on; another --autocast or DATA
needs another --output. ``--lr best`` takes for each variant the rate of the lowest mean loss on ``valid`` over the
--selection-seeds; quote the ``test`` split. A variant of your own: ``--variant 'mine=--momentum-kind mine' --user-dir
my_filters``.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from momentum_lm.analysis.statistics import t_interval
from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import file_sha256, locked, write_json
from momentum_lm.results.records import read_results
from momentum_lm.studies.flags import choices, integers, positives
from momentum_lm.untrusted import parse_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from jobs import Job, JobError, log_lines, open_config, perplexity_command, run_all, saving, train, train_command


def _llama(layers: int, heads: int) -> list[str]:
    """Flags of a larger Llama form, with heads of 64 as all have."""
    shape = {"layers": layers, "embed-dim": 64 * heads, "attention-heads": heads, "kv-heads": heads, "ffn-embed-dim": 0}
    return ["--arch", "llama_lm_tiny", *(word for key, n in shape.items() for word in (f"--decoder-{key}", str(n)))]


FORMS = {  # of the decoder, around which variants differ; 2.9 million parameters where the name says no other number
    "gpt": ["--arch", "gpt_lm_tiny"],
    "gpt_rotary": ["--arch", "gpt_lm_tiny", "--position", "rotary"],
    "gpt_none": ["--arch", "gpt_lm_tiny", "--position", "none"],
    "llama": ["--arch", "llama_lm_tiny"],
    "llama_none": ["--arch", "llama_lm_tiny", "--position", "none"],
    "llama_10m": _llama(layers=6, heads=5),
    "llama_30m": _llama(layers=8, heads=8),
}
EMA, FIR = ["--momentum-kind", "ema"], ["--momentum-kind", "fir"]
ONE_BACK = [*FIR, "--momentum-taps", "1"]
VARIANTS: dict[str, list[str]] = {
    "vanilla": [],
    **{f"ema_{eta}": [*EMA, "--momentum-eta", str(eta)] for eta in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "ema": [*EMA, "--momentum-learned"],
    "ema_learned": [*EMA, "--momentum-eta", "0.5", "--momentum-learned"],
    **{f"ema_{eta}_normalized": [*EMA, "--momentum-eta", str(eta), "--momentum-normalize"] for eta in (0.7, 0.9)},
    "ema_0.5_gated": [*EMA, "--momentum-eta", "0.5", "--momentum-gate", "zero"],
    "multi_ema": ["--momentum-kind", "multi_ema"],
    "fir3": FIR,
    "fir16": [*FIR, "--momentum-taps", "16"],
    "shift": ONE_BACK,
    "shift_values": [*ONE_BACK, "--momentum-at", "values"],
    "kv_shift": [*ONE_BACK, "--momentum-at", "keys,values", "--momentum-current"],
    "smear": [*ONE_BACK, "--momentum-at", "embedding"],
    "canon_a": [*FIR, "--momentum-at", "input", "--momentum-current"],
    "depth": [*EMA, "--momentum-at", "depth", "--momentum-learned"],
    "placebo": ["--momentum-kind", "placebo"],
    "head_scale": ["--momentum-kind", "head_scale"],
    "wide": [],  # and WIDE of its form
}
WIDE = {"gpt": "776", "llama": "518"}  # --decoder-ffn-embed-dim that gives about as many parameters as fir16 (2.9M)
CONTROLS = Path(__file__).resolve().parent / "controls"  # the filters placebo and head_scale
TOKENS_PER_UPDATE, CONTEXT = 2048, 256
OF_A_SWEEP = (  # flags that are the same for all variants, and those by which a sweep finds its runs again
    *("--lr", "--seed", "--max-update", "--max-epoch", "--batch-size", "--max-tokens", "--update-freq"),
    *("--tokens-per-sample", "--autocast", "--save-dir", "--save-interval-updates", "--keep-interval-updates"),
    *("--user-dir", "--tensorboard-logdir", "--log-interval", "--log-format", "--cpu", "--task", "--criterion"),
)


class Run(NamedTuple):
    """One training: a variant of a form, at a learning rate, from a seed."""

    form: str
    variant: str
    lr: float
    seed: int

    def folder(self, sweep: Path) -> Path:
        return sweep / self.form / self.variant / f"lr{self.lr}" / f"seed{self.seed}"


def model_flags(args: argparse.Namespace, form: str, variant: str) -> list[str]:
    """The flags of ``fairseq-train`` that make the decoder, but for where its code is."""
    flags = [*FORMS[form], *args.every_variant[variant]]
    if variant != "wide":
        return flags
    if "--decoder-layers" in FORMS[form]:
        raise UserError(f"--variants wide: its width is known for the forms of 2.9 million parameters, not {form}")
    return [*flags, "--decoder-ffn-embed-dim", WIDE[form.partition("_")[0]]]


def user_dir(own: Path | None, variant: str) -> list[str]:
    """Where the code of a variant is that is not the project's. ``own``: the folder of variants of one's own."""
    if variant in ("placebo", "head_scale"):
        return ["--user-dir", str(CONTROLS)]
    return [] if own is None or variant in VARIANTS else ["--user-dir", str(own.resolve())]


def code(args: argparse.Namespace, variant: str) -> str | None:
    """The digest of a variant's own code."""
    where = user_dir(args.user_dir, variant)
    return file_sha256(*sorted(Path(where[1]).rglob("*.py"))) if where else None


def made(args: argparse.Namespace, form: str, variant: str) -> dict[str, object]:
    """What a variant is, as its rows record it."""
    return {"flags": model_flags(args, form, variant), "code": code(args, variant)}


def text_digest(data: Path, split: str) -> str | None:
    """As an evaluation records it; None where there is no such split."""
    files = [data / f"{split}.{end}" for end in ("idx", "bin")]
    return file_sha256(*files) if all(file.exists() for file in files) else None


def check_rows(args: argparse.Namespace, known: dict[tuple, dict], stored: Path) -> None:
    """Raises UserError where a row that is kept is of a variant of the same name that was another one, or of another
    text."""
    texts = {split: text_digest(args.data, split) for split in {row["split"] for row in known.values()}}
    names = {*args.variants, args.against}
    now = {(form, name): made(args, form, name) for form in args.form for name in names}
    for row in known.values():
        fields = now.get((row["form"], row["variant"]), {})
        if {name: row.get(name) for name in fields} != fields:
            raise UserError(
                f"{stored} has {row['variant']} with other flags or code ({' '.join(row.get('flags', []))}): choose "
                "another name, or another --output"
            )
        if row.get("data_sha256", texts[row["split"]]) != texts[row["split"]]:
            raise UserError(f"{stored} has results on another {row['split']} text than DATA's: choose another --output")


def training(args: argparse.Namespace, folder: Path, run: Run) -> Job:
    """One run, which goes on from its last checkpoint where it was interrupted."""
    updates, length = round(args.tokens / TOKENS_PER_UPDATE), args.tokens_per_sample
    model = [*model_flags(args, run.form, run.variant), *user_dir(args.user_dir, run.variant)]
    command = train_command(
        args.data, model, run.seed, updates, lr=run.lr,
        warmup=40, tokens_per_sample=length, batch_size=TOKENS_PER_UPDATE // length, autocast=args.autocast,
    )  # fmt: skip
    command += [*saving(folder, every=500), "--tensorboard-logdir", str(folder / "tensorboard"), "--log-interval", "25"]
    return Job("train", command, folder, args.threads, updates)


def training_losses(log: Path) -> list[float]:
    """Mean loss (nats a token) in each tenth of a training, of fewer parts where less was logged."""
    losses = [line["loss"] * math.log(2) for line in log_lines(log)]  # fairseq logs bits
    return [round(float(part.mean()), 5) for part in np.array_split(losses, min(10, len(losses)) or 1) if part.size]


def evaluation(args: argparse.Namespace, folder: Path, run: Run, split: str) -> Job:
    """Perplexities of one run on one split."""
    command = perplexity_command(args.data, folder, split, args.context_lengths, folder / f"perplexity_{split}")
    return Job(f"perplexity_{split}", [*command, *user_dir(args.user_dir, run.variant)], folder, args.threads)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with locked(args.output):  # of two sweeps at once the later would store its own rows alone
        return carry_out(args)


def carry_out(args: argparse.Namespace) -> int:
    """Trains and evaluates what is missing, stores it and prints the tables. Returns the exit status."""
    base = f"{args.tokens:.3g}"
    label = base + (f"_context{args.tokens_per_sample}" if args.tokens_per_sample != CONTEXT else "")
    sweep = args.output / label
    data = file_sha256(args.data / "train.idx", args.data / "train.bin")[:16]
    settings = {"tokens": args.tokens, "autocast": args.autocast, "data": data}
    stored = args.output / f"results_{label}.json"
    known = results(stored, settings)
    tried = known if args.tokens_per_sample == CONTEXT else results(args.output / f"results_{base}.json", settings)
    rates = {(form, name): learning_rates(args, tried, form, name) for form in args.form for name in args.variants}
    base_rates = {form: baseline_rates(args, tried, form) for form in args.form}
    # seed by seed, so that an interrupted sweep has whole seeds
    runs = [Run(form, name, lr, seed) for seed in args.seeds for (form, name), found in rates.items() for lr in found]
    check_rows(args, known, stored)
    check_rows(args, tried, args.output / f"results_{base}.json")
    open_config(sweep, settings, "a sweep")
    missing = [run for run in runs if any((*run, split, n) not in known for split in args.splits for n in args.lengths)]
    for run in missing:  # what a folder has goes on only if it is of these flags and this code
        open_config(run.folder(sweep), made(args, run.form, run.variant), "a run")
    try:
        train([training(args, run.folder(sweep), run) for run in missing], args.jobs, "training")
        if args.train_only:
            return 0
        pairs = [(run, split) for run in missing for split in args.splits]
        run_all([evaluation(args, run.folder(sweep), run, split) for run, split in pairs], args.jobs, "evaluating")
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for run, split in pairs:
        row = run._asdict() | made(args, run.form, run.variant)
        row["training_loss"] = training_losses(run.folder(sweep) / "train.log")
        for record in read_results(run.folder(sweep) / f"perplexity_{split}")["runs"]:
            known[*run, split, record["context_length"]] = row | record
    write_json(stored, {"settings": settings, "runs": [known[key] for key in sorted(known)]})
    for form, split, length in itertools.product(args.form, args.splits, args.lengths):
        shown = list(dict.fromkeys([*args.variants, args.against]))
        rows = [row for (f, name, lr, seed, s, n), row in known.items()
                if (f, s, n) == (form, split, length) and seed in args.seeds
                and (Run(f, name, lr, seed) in runs or (name == args.against and lr in base_rates[form]))]  # fmt: skip
        title = f"{form}, {split}, context {length}, after {args.tokens:.3g} tokens"
        print(f"\n{title}\n{table(rows, shown, args.against, best=args.lr == 'best')}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--form", default="gpt", help="comma-separated: " + ", ".join(FORMS))
    parser.add_argument("--variants", default="all", help="comma-separated, or all: " + ", ".join(VARIANTS))
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="one more: fairseq-train's flags for it"
    )
    parser.add_argument("--user-dir", type=Path, help="code of the variants that --variant gives")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--tokens", type=float, default=8e5, help="training tokens per run")
    parser.add_argument(
        "--tokens-per-sample", type=int, default=CONTEXT, help=f"context in training; it divides {TOKENS_PER_UPDATE}"
    )
    parser.add_argument(
        "--lr",
        default="6e-3",
        help="peak learning rate; several with commas, or best: of those tried, by --selection-seeds on valid",
    )
    parser.add_argument("--selection-seeds", default="101,102")
    parser.add_argument("--against", default="vanilla", help="the variant that the others are compared with")
    parser.add_argument("--context-lengths", help="default: 64,128,256,... up to --tokens-per-sample")
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
    args.every_variant = VARIANTS | dict(map(own_variant, args.variant))
    every = list(args.every_variant)
    args.variants = every if args.variants == "all" else choices(args.variants, "--variants", every)
    args.form = choices(args.form, "--form", list(FORMS))
    args.against = choices(args.against, "--against", every)[0]
    args.seeds, args.splits = integers(args.seeds, "--seeds", 1, "1,2,3"), args.splits.split(",")
    args.selection_seeds = sorted(set(integers(args.selection_seeds, "--selection-seeds", 1, "101,102")))
    if args.tokens_per_sample < 1 or TOKENS_PER_UPDATE % args.tokens_per_sample:
        raise UserError(f"--tokens-per-sample {args.tokens_per_sample}: must divide {TOKENS_PER_UPDATE}, such as 512")
    usual = [n for n in (64, 128, 256, 512, 1024, 2048) if n <= args.tokens_per_sample] or [args.tokens_per_sample]
    args.context_lengths = args.context_lengths or ",".join(map(str, usual))
    args.lengths = integers(args.context_lengths, "--context-lengths", 1, "64,128")
    if max(args.lengths) > args.tokens_per_sample:
        raise UserError(
            f"--context-lengths {args.context_lengths}: models trained with --tokens-per-sample "
            f"{args.tokens_per_sample} take no more tokens"
        )
    if args.lr != "best":
        args.lr = positives(args.lr, "--lr", "3e-3,6e-3, or best")
    elif both := set(args.seeds) & set(args.selection_seeds):
        raise UserError(f"--seeds {min(both)}: the learning rate is chosen on it; results need other seeds")
    for flag, least in (("jobs", 1), ("threads", 1), ("tokens", TOKENS_PER_UPDATE)):
        if not getattr(args, flag) >= least:
            raise UserError(f"--{flag} {getattr(args, flag):g}: must be at least {least}")
    args.data = args.data.resolve()
    there = sorted(path.stem for path in args.data.glob("*.idx"))
    for flag, split in (("DATA", "train"), *(("--splits", split) for split in args.splits)):
        if split not in there:  # said now, not once hours of training are over
            found = f"there: {', '.join(there)}" if there else "momentum-lm prepare makes such a folder"
            raise UserError(f"{flag}: {args.data} has no split {split!r} ({found})")
    return args


def own_variant(text: str) -> tuple[str, list[str]]:
    """``NAME=FLAGS``."""
    name, equals, flags = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", name) or name in VARIANTS:
        raise UserError(f"--variant {text}: give NAME=FLAGS, such as 'mine=--momentum-kind mine', and a new name")
    words = shlex.split(flags)
    if taken := [word for word in words if word.partition("=")[0] in OF_A_SWEEP]:
        raise UserError(f"--variant {text}: {taken[0]} is the same for all variants of a sweep; leave it out")
    return name, words


def results(stored: Path, settings: dict) -> dict[tuple, dict]:
    """The rows that ``stored`` has. Raises UserError for those of other settings, and for another file."""
    if not stored.exists():
        return {}
    try:
        found = parse_json(stored.read_bytes())
        rows = {
            (*(row[name] for name in Run._fields), row["split"], row["context_length"]): row for row in found["runs"]
        }
        if not all(0 < row["perplexity"] < math.inf for row in rows.values()):
            raise ValueError("a perplexity is not above 0")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{stored} is damaged, or not of a sweep ({error}): choose another --output") from error
    for name, value in settings.items():
        if (there := found.get("settings", {}).get(name)) != value:
            raise UserError(
                f"{stored} is of a sweep that differs in {name} ({json.dumps(there)} there, {json.dumps(value)} now): "
                "choose another --output"
            )
    return rows


def selection(
    known: dict[tuple, dict], form: str, variant: str, seeds: Sequence[int], length: int
) -> dict[float, float]:
    """The mean loss (nats a token) on ``valid`` of each learning rate that was tried with all of these seeds."""
    tried: dict[float, list[float]] = {}
    for (f, v, lr, seed, split, n), row in known.items():
        if (f, v, split, n) == (form, variant, "valid", length) and seed in seeds:
            tried.setdefault(lr, []).append(math.log(row["perplexity"]))
    return {lr: statistics.mean(found) for lr, found in tried.items() if len(found) == len(seeds)}


def chosen_length(args: argparse.Namespace) -> int:
    """The context length at which losses choose learning rates."""
    return min(CONTEXT, max(args.lengths))


def learning_rates(args: argparse.Namespace, known: dict[tuple, dict], form: str, variant: str) -> list[float]:
    """Those given; or the best of those that were tried."""
    if args.lr != "best":
        return args.lr
    whole = selection(known, form, variant, args.selection_seeds, chosen_length(args))
    if not whole:
        raise UserError(
            f"--lr best: no learning rate of {variant} ({form}) was tried on valid with all of the --selection-seeds "
            f"{','.join(map(str, args.selection_seeds))} at context {chosen_length(args)}: run that first, with --lr"
        )
    best = min(whole, key=whole.__getitem__)
    if len(whole) > 2 and best in (min(whole), max(whole)):
        print(f"note: the best learning rate of {variant} ({form}), {best:g}, is at an end of those tried")
    return [best]


def baseline_rates(args: argparse.Namespace, known: dict[tuple, dict], form: str) -> list[float]:
    """The learning rates of the variant that others are compared with: those given; or its best, if it was tried."""
    if args.lr != "best":
        return args.lr
    whole = selection(known, form, args.against, args.selection_seeds, chosen_length(args))
    return [min(whole, key=whole.__getitem__)] if whole else []


def percent(nats: float) -> str:
    """A difference of losses as one of perplexities."""
    return f"{math.expm1(nats):+.1%}"


def change(differences: Sequence[float]) -> tuple[str, str]:
    """Mean of differences of losses (nats a token), and Student's 95% interval ("" for a single one), in percent of
    perplexity."""
    if len(differences) == 1:
        return percent(differences[0]), ""
    found = t_interval(differences)
    return percent(found.estimate), f"{percent(found.low)} to {percent(found.high)}"


def table(rows: list[dict], names: list[str], against: str, best: bool) -> str:
    """Markdown: perplexity (geometric mean over seeds) and its ratio to that of ``against``, with Student's interval
    over paired seeds: at the same learning rate, or at the only one where that of each is the ``best``.
    """
    logs: dict[tuple[str, float], dict[int, float]] = {}
    for row in rows:
        logs.setdefault((row["variant"], row["lr"]), {})[row["seed"]] = math.log(row["perplexity"])
    only = next((lr for name, lr in logs if name == against), None)
    lines = [f"| variant | lr | seeds | perplexity | against {against} | 95% interval |", "|---|---|---|---|---|---|"]
    for name, lr in sorted(logs, key=lambda key: names.index(key[0])):
        found, ratio, interval = logs[name, lr], "", ""
        base = logs.get((against, only if best else lr), {})
        differences = [value - base[seed] for seed, value in found.items() if seed in base]
        if differences and name != against:
            ratio, interval = change(differences)
        mean = math.exp(statistics.mean(found.values()))
        lines.append(f"| {name} | {lr:g} | {len(found)} | {mean:.1f} | {ratio} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
