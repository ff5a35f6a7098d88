"""What the quickstart found: table, figures, ``report.html`` and ``summary.json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired_runs import RunOnText, average, difference

from momentum_lm.analysis.statistics import PairedDifference
from momentum_lm.files import write_json
from momentum_lm.report import classification, icl_vs_finetuning
from momentum_lm.report.classification_comparison import ClassificationComparison, intervals_text, is_clear
from momentum_lm.report.figures import Panel, accuracy_panel, draw, gap_panel, pairs_panel, save_png, to_svg
from momentum_lm.report.finetuning_verdicts import conclusions, verdict
from momentum_lm.report.html import (
    Code,
    Dot,
    Folded,
    Forest,
    Gallery,
    Link,
    Paragraph,
    Part,
    Picture,
    Reference,
    Verdict,
    write_page,
)
from momentum_lm.report.perplexity import difference_cells
from momentum_lm.report.tables import Table, counted
from momentum_lm.results.records import read_results
from momentum_lm.studies import classification_summary
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.indexed import IndexedDataset


@dataclass(frozen=True)
class Chapter:
    """What one part of the quickstart found: a finding for the terminal and the top of the page, its own section of it,
    numbers for summary.json, and panels of the picture.
    """

    finding: str
    heading: str
    parts: Sequence[Part]
    numbers: Mapping[str, Any]
    panels: Sequence[Panel]


def summarise(
    output: Path,
    settings: Any,
    config: Mapping[str, Any],
    curves: Mapping[tuple[str, int], Any] | None,
    studies: Sequence[str],
) -> str:
    """Writes the report; returns what is printed. ``curves``: what each (model, seed) logged of its training, None
    where that was left out; ``studies``: those of "icl" and "finetuning" that there are.
    """
    chapters = [] if curves is None else [_pretraining(output, settings, curves)]
    chapters += [{"icl": _in_context, "finetuning": _finetuning}[name](output) for name in studies]
    save_png(draw(*[panel for chapter in chapters for panel in chapter.panels], columns=2), output / "quickstart.png")
    commands = "\n\n".join(command for some in config["commands"].values() for command in some)
    commands = commands.replace(f"{Path(sys.executable).parent}/", "")
    details = json.dumps({key: config[key] for key in config if key != "commands"}, indent=1)
    findings = [chapter.finding for chapter in chapters]
    write_page(
        output / "report.html",
        "Momentum attention and in-context learning: quickstart",
        {
            "": [Verdict(findings), *([Paragraph(MOMENTUM)] if curves is not None else [])],
            **{chapter.heading: chapter.parts for chapter in chapters},
            "How to run it again": [Folded("Every command", [Code(commands)])],
            "Settings and versions": [Folded("Settings, versions, machine", [Code(details)])],
        },
    )
    write_json(output / "summary.json", {key: value for chapter in chapters for key, value in chapter.numbers.items()})
    return "\n\n".join(findings)


MOMENTUM = (
    "Momentum attention adds to attention's output at each token an exponentially decaying sum of the values of the "
    'tokens before it, MoAttn_t = Attn_t + sum over i < t of 0.3^(t-i) v_i. It is from "Why Can GPT Learn In-Context?" '
    "(Dai et al., arXiv 2212.10559), which this page calls the paper. The models that are trained here are tiny: 3 "
    "layers, 192 wide."
)


def _pretraining(output: Path, settings: Any, curves: Mapping[tuple[str, int], Any]) -> Chapter:
    unigram = unigram_perplexity(output / "data", "train", "valid")
    rows = {
        form: [compare(output, pair, settings.seeds, length) for length in settings.context_lengths]
        for form, pair in settings.forms.items()
    }
    finding = _finding(rows, settings.seeds)
    tokens = settings.updates * settings.tokens_per_sample * settings.batch_size
    per_update = settings.tokens_per_sample * settings.batch_size
    gaps = {
        f"{form} seed {seed}": _gap(curves[momentum, seed], curves[baseline, seed], per_update)
        for form, (baseline, momentum) in settings.forms.items()
        for seed in settings.seeds
    }
    loss = gap_panel(gaps, "Training loss: with momentum minus without")
    by_seed = {
        form: list(zip(*(model["by_seed"] for model in some[-1]["models"].values()), strict=True))
        for form, some in rows.items()
    }
    length = settings.context_lengths[-1]
    perplexity = pairs_panel(
        by_seed, ("without momentum", "with momentum"), "perplexity", f"Perplexity in blocks of {length} tokens"
    )
    reading = (
        f"Each run saw {tokens:,} tokens. Perplexity is the geometric mean over seeds "
        f"{', '.join(map(str, settings.seeds))}. Bars are over the validation text's documents: they say what other "
        "text would give, not what other trainings would; the grey points are the seeds. GPT form: layer norm, GELU, "
        "sinusoidal positions. Llama form: RMSNorm, gated feed-forward, rotary positions. A unigram model, which "
        f"knows only how often each token occurs, has perplexity {unigram:.1f} on the same text. These are small "
        "models on little text: they say nothing of large ones. What would settle it, with eight seeds and rivals of "
        "momentum: examples/momentum_vs_vanilla/PLAN.md."
    )
    parts: list[Part] = [
        *(_forest(rows), Paragraph(reading)),
        Gallery([
            Picture(
                to_svg(draw(loss)),
                "Training loss with momentum minus that without, on the same tokens, a line for each seed. Below the "
                "dashed line momentum is better. The first twentieth of the tokens may lie outside.",
            ),
            Picture(
                to_svg(draw(perplexity)),
                f"Validation perplexity in blocks of {length} tokens: mean over seeds, and single seeds faint. Lower "
                "is better.",
            ),
        ]),
        Folded("As a table", [_table(form, settings.forms[form], some) for form, some in rows.items()]),
        Paragraph(
            "The numbers are in summary.json, those of each run in runs/*/perplexity/results.json, its curve in "
            "runs/*/train.log."
        ),
    ]  # fmt: skip
    numbers = {"verdict": finding, "unigram_perplexity": unigram, "tokens_per_run": tokens, "forms": rows}
    return Chapter(finding, "Momentum attention against plain attention", parts, numbers, [loss, perplexity])


def _in_context(output: Path) -> Chapter:
    folder = output / "icl"
    runs = read_results(folder)["runs"]
    level = classification_summary.baseline(runs)
    cells = {key[1:]: classification_summary.summarise_cell(some) for key, some in
             classification_summary.cells(runs).items()}  # fmt: skip
    most = max(shots for shots, _ in cells)
    told, clear = [], []
    differences = ClassificationComparison([folder], between=("shots", [0, most])).differences
    for ((_, calibration), _), gap in differences.items():
        without, shown = (classification.percent(cells[shots, calibration]["mean"]) for shots in (0, most))
        what = "without calibration" if calibration == "none" else f"with {calibration} calibration"
        told.append(f"{without}% and {shown}% {what} ({100 * gap.difference:+.1f} points, 95%: {intervals_text(gap)})")
        clear.append(is_clear(gap))
    finding = (
        f"Learning from the prompt: without and with {counted(most, 'demonstration')} SmolLM2-135M-Instruct (4-bit "
        f"weights) is right about {', '.join(told)} of sentences of film reviews (MR). Always giving the same answer "
        f"is right for {classification.percent(level[1])}%. A gain counts as shown where no interval of "
        f"it holds 0: here {'each' if all(clear) else 'some' if any(clear) else 'none'}."
    )
    return Chapter(
        finding,
        "In-context classification",
        [
            *classification.overview(folder),
            Link("The whole report, with a prompt as the model saw it", "icl/report.html"),
            Paragraph("The numbers are in icl/results.json, every prediction in icl/predictions.jsonl."),
        ],
        {"in_context": finding},
        [accuracy_panel(classification.points(runs), "Accuracy of SmolLM2-135M-Instruct", level, "calibration")],
    )


def _finetuning(output: Path) -> Chapter:
    folder = output / "finetuning"
    runs = read_results(folder)["runs"]
    examples, draws = counted(runs[0]["num_examples"], "sentence"), counted(len(runs), "draw")
    finding = (
        f"Prompt against finetuning, the same model, uncalibrated, on another sample of {examples}, and {draws} "
        "of demonstrations, fewer than it takes to compare accuracies: "
        f"{conclusions(runs)[0]} {verdict(runs)[0]}"
    )
    title = "SimAOU by layer" + (f" (mean of {draws})" if len(runs) > 1 else "")
    return Chapter(
        finding,
        "In-context learning against finetuning",
        [
            *icl_vs_finetuning.overview(folder),
            Link("The whole report, with layers, heads, single examples and definitions", "finetuning/report.html"),
            Paragraph("The numbers are in finetuning/results.json, every prediction in finetuning/predictions.jsonl."),
        ],
        {"icl_vs_finetuning": finding},
        [icl_vs_finetuning.metric_panel("simaou", icl_vs_finetuning.curves(runs, "simaou"), title)],
    )


def compare(output: Path, pair: Sequence[str], seeds: Sequence[int], length: int) -> dict[str, Any]:
    """The models of a form at one context length: perplexities, and the difference over documents and over seeds."""
    folders = {model: [output / "runs" / f"{model}-seed{seed}" / "perplexity" for seed in seeds] for model in pair}
    runs = {model: [RunOnText.read(folder, "valid", length) for folder in some] for model, some in folders.items()}
    baseline, momentum = runs.values()
    return {
        "context_length": length,
        "models": {model: average(some) for model, some in runs.items()},
        **difference(momentum, baseline),
    }


def _gap(lines: Sequence[dict[str, float]], base: Sequence[dict[str, float]], size: int) -> list[tuple[float, float]]:
    """(tokens seen, difference of training losses in nats) where both runs have logged; fairseq logs bits."""
    other = {line["num_updates"]: line["loss"] for line in base}
    return [
        (line["num_updates"] * size, (line["loss"] - other[line["num_updates"]]) * math.log(2))
        for line in lines
        if line["num_updates"] in other
    ]


def unigram_perplexity(data: Path, train: str, valid: str) -> float:
    """Perplexity of the frequencies of training tokens, one added to each count, on another split."""
    size = len(Dictionary.load(data / "dict.txt"))
    counts = np.ones(size)
    for document in IndexedDataset(data / train):
        counts += np.bincount(document, minlength=size)
    log_probability = np.log(counts / counts.sum())
    measured = IndexedDataset(data / valid)
    return math.exp(-sum(float(log_probability[document].sum()) for document in measured) / measured.num_tokens)


def _forest(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Forest:
    """Differences that momentum makes, by form and context length."""
    dots = []
    for form, some in rows.items():
        for row in some:
            gap = PairedDifference(**row["difference"])
            ends = gap.ratio_low - 1, gap.ratio_high - 1
            seeds = [ratio - 1 for ratio in row["ratio_by_seed"]]
            over = f"{row['documents']:,} documents"
            dots.append(Dot(f"{form}, context {row['context_length']}", gap.ratio - 1, ends, over, seeds))
    return Forest(
        "Perplexity with momentum against without,", dots, "at equal tokens, in percent; negative is better.",
        Reference("no difference", 0.0), percent=(1, "%"), signed=True, unit="%", single="training",
    )  # fmt: skip


def _table(form: str, pair: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        models = [row["models"][name] for name in pair]
        bits = ", ".join("" if m["bits_per_byte"] is None else f"{m['bits_per_byte']:.3f}" for m in models)
        difference, interval, _ = difference_cells(PairedDifference(**row["difference"]))
        seeds = ", ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in row["ratio_by_seed"])
        cells.append(
            [str(row["context_length"]), *(f"{m['perplexity']:.1f}" for m in models), bits, difference, interval, seeds]
        )
    columns = ["context", *pair, "bits/byte, without and with", "difference", "95% interval", "by seed"]
    return Table(columns, cells, f"Validation perplexity, {form}")


def _finding(rows: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> str:
    """What momentum does to perplexity at the longest context, and whether the seeds settle it."""
    told, settled = [], []
    for form, some in rows.items():
        row = some[-1]
        baseline, momentum = (model["perplexity"] for model in row["models"].values())
        by_seed = " and ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in row["ratio_by_seed"])
        over_seeds = row["ratio_ci95_over_seeds"]
        told.append(
            f"from {baseline:.1f} to {momentum:.1f} in the {form} ({100 * (momentum / baseline - 1):+.1f}%; by seed "
            f"{by_seed})"
        )
        settled.append(over_seeds is not None and not over_seeds[0] <= 1 <= over_seeds[1])
    length = next(iter(rows.values()))[-1]["context_length"]
    sure = "do not settle" if not any(settled) else "settle" if all(settled) else "settle for one of the forms"
    count = "one seed does not settle" if len(seeds) == 1 else f"{len(seeds)} seeds {sure}"
    return (
        f"Momentum: perplexity in blocks of {length} tokens (lower is better) goes {' and '.join(told)}; {count} "
        "whether momentum lowers it."
    )
