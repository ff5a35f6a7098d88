"""What the quickstart found: table, figures, ``report.html`` and ``summary.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paired_runs import RunOnText, average, difference

from momentum_lm.analysis.statistics import PairedDifference
from momentum_lm.files import write_json
from momentum_lm.report import classification, icl_vs_finetuning
from momentum_lm.report.figures import Panel, accuracy_panel, draw, loss_panel, perplexity_panel, save_png, to_svg
from momentum_lm.report.finetuning_verdicts import headlines, verdict
from momentum_lm.report.html import Code, Folded, Link, Paragraph, Part, Picture, Points, write_page
from momentum_lm.report.perplexity import difference_cells
from momentum_lm.report.tables import Table
from momentum_lm.results.records import read_results
from momentum_lm.studies import classification_summary
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.indexed import IndexedDataset


@dataclass(frozen=True)
class Chapter:
    """What one part of the quickstart found: text for the terminal, findings for the top of the page, its own section
    of it, numbers for summary.json, and panels of the picture.
    """

    text: str
    findings: Sequence[str]
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
    details = json.dumps({key: config[key] for key in config if key != "commands"}, indent=1)
    write_page(
        output / "report.html",
        "Momentum attention and in-context learning: quickstart",
        {
            "": [Points([finding for chapter in chapters for finding in chapter.findings])],
            **{chapter.heading: chapter.parts for chapter in chapters},
            "How to run it again": [Folded("Every command that was run", [Code(commands)])],
            "Settings and versions": [Folded("Settings, versions, machine", [Code(details)])],
        },
    )
    write_json(output / "summary.json", {key: value for chapter in chapters for key, value in chapter.numbers.items()})
    return "\n\n".join(chapter.text for chapter in chapters)


def _pretraining(output: Path, settings: Any, curves: Mapping[tuple[str, int], Any]) -> Chapter:
    unigram = unigram_perplexity(output / "data", "train", "valid")
    rows = [compare(output, settings, length) for length in settings.context_lengths]
    table, verdict = _table(settings, rows), _verdict(settings, rows[-1])
    tokens = settings.updates * settings.tokens_per_sample * settings.batch_size
    facts = (
        f"Each run saw {tokens:,} tokens. A unigram model, which knows only how often each token occurs, has "
        f"perplexity {unigram:.1f} "
        f"on the same validation text."
    )
    per_update = settings.tokens_per_sample * settings.batch_size
    losses = {  # fairseq logs bits
        f"{model} seed {seed}": [(line["num_updates"] * per_update, line["loss"] * math.log(2)) for line in lines]
        for (model, seed), lines in curves.items()
    }
    loss = loss_panel(losses, {"unigram": math.log(unigram)})
    perplexity = perplexity_panel(
        {
            model: [(row["context_length"], row["models"][model]["perplexity"]) for row in rows]
            for model in settings.models
        }
    )
    reading = (
        f"Perplexity is the geometric mean over seeds {', '.join(map(str, settings.seeds))}. Difference: "
        f"{_names(settings)[1]} "
        f"against {_names(settings)[0]}, at equal tokens; negative: lower with momentum. Its interval "
        "is a paired "
        f"bootstrap over {rows[-1]['documents']:,} documents of the validation text, and the last column gives the "
        "difference of each "
        "seed. These are small models on little text: they say nothing of large ones."
    )
    parts: list[Part] = [
        *(table, Paragraph(reading), Paragraph(facts)),
        Picture(
            to_svg(draw(loss)),
            "Training loss; one line for each seed. Dashed grey: the unigram model on validation text.",
        ),
        Picture(to_svg(draw(perplexity)), "Validation perplexity at each context length."),
        Paragraph(
            "The numbers are in summary.json, those of each run in runs/*/perplexity/results.json, its curve in "
            "runs/*/train.log."
        ),
    ]
    return Chapter(
        "\n".join([table.text(), "", verdict, facts]),
        [verdict],
        "Momentum attention against plain attention",
        parts,
        {"verdict": verdict, "unigram_perplexity": unigram, "tokens_per_run": tokens, "contexts": rows},
        [loss, perplexity],
    )


def _in_context(output: Path) -> Chapter:
    folder = output / "icl"
    runs = read_results(folder)["runs"]
    level = classification_summary.baseline(runs)
    settings = []
    for (_, shots, calibration), chosen in classification_summary.cells(runs).items():
        if calibration == runs[0]["calibration"]:
            cell = classification_summary.summarise_cell(chosen)
            settings.append(
                f"{classification.percent(cell['mean'])}% ({classification.interval_text(cell['ci95'])}) with {shots} "
                "shots"
            )
    finding = (
        f"SmolLM2-135M on sentences of film reviews (MR): {', '.join(settings)}; always the same answer is right in "
        f"{classification.percent(level[1])}%."
    )
    return Chapter(
        f"{classification.results_table(runs).text()}\n\n{finding}",
        [finding],
        "In-context classification",
        [
            *classification.overview(folder),
            Link("The whole report, with prompts as the model saw them", "icl/report.html"),
            Paragraph("The numbers are in icl/results.json, every prediction in icl/predictions.jsonl."),
        ],
        {"in_context": finding},
        [accuracy_panel(classification.points(runs), "SmolLM2-135M on MR", level, "calibration")],
    )


def _finetuning(output: Path) -> Chapter:
    folder = output / "finetuning"
    runs = read_results(folder)["runs"]
    findings = verdict(runs)[:2]  # accuracies and Rec2FTP
    return Chapter(
        f"{icl_vs_finetuning.accuracy_table(runs).text()}\n\n" + "\n".join([*findings, *headlines(runs)]),
        [f"The same model finetuned on its demonstrations. {finding}" for finding in findings],
        "In-context learning against finetuning",
        [
            *icl_vs_finetuning.overview(folder),
            Link("The whole report, with heads, single examples and definitions", "finetuning/report.html"),
            Paragraph("The numbers are in finetuning/results.json, every prediction in finetuning/predictions.jsonl."),
        ],
        {"icl_vs_finetuning": findings},
        [icl_vs_finetuning.panels(runs)["simaou"]],
    )


def compare(output: Path, settings: Any, length: int) -> dict[str, Any]:
    """Both models at one context length: perplexities, and the difference over documents and over seeds."""
    folders = {
        model: [output / "runs" / f"{model}-seed{seed}" / "perplexity" for seed in settings.seeds]
        for model in _names(settings)
    }
    runs = {model: [RunOnText.read(folder, "valid", length) for folder in some] for model, some in folders.items()}
    baseline, momentum = runs.values()
    return {
        "context_length": length,
        "models": {model: average(some) for model, some in runs.items()},
        **difference(momentum, baseline),
    }


def unigram_perplexity(data: Path, train: str, valid: str) -> float:
    """Perplexity of the frequencies of training tokens, one added to each count, on another split."""
    size = len(Dictionary.load(data / "dict.txt"))
    counts = np.ones(size)
    for document in IndexedDataset(data / train):
        counts += np.bincount(document, minlength=size)
    log_probability = np.log(counts / counts.sum())
    measured = IndexedDataset(data / valid)
    return math.exp(-sum(float(log_probability[document].sum()) for document in measured) / measured.num_tokens)


def _names(settings: Any) -> tuple[str, str]:
    baseline, momentum = settings.models
    return baseline, momentum


def _table(settings: Any, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        models = [row["models"][name] for name in _names(settings)]
        bits = ", ".join("" if m["bits_per_byte"] is None else f"{m['bits_per_byte']:.3f}" for m in models)
        difference, interval, _ = difference_cells(PairedDifference(**row["difference"]))
        seeds = ", ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in row["ratio_by_seed"])
        cells.append(
            [str(row["context_length"]), *(f"{m['perplexity']:.1f}" for m in models), bits, difference, interval, seeds]
        )
    first, second = _names(settings)
    columns = ["context", first, second, "bits/byte", "difference", "95% interval", "by seed"]
    return Table(columns, cells, "Validation perplexity")


def _verdict(settings: Any, row: Mapping[str, Any]) -> str:
    difference, (first, second) = PairedDifference(**row["difference"]), _names(settings)
    at = f"at context {row['context_length']}"
    if difference.low <= 0 <= difference.high or len({ratio > 1 for ratio in row["ratio_by_seed"]}) > 1:
        return f"No clear difference between {second} and {first} {at}: the interval includes 0, or the seeds disagree."
    word = "lower" if difference.difference < 0 else "higher"
    change, interval, _ = difference_cells(difference)
    over = f"{interval} over documents; seeds may differ by more"
    seeds = f"{len(settings.seeds)} seeds are too few to settle it"
    return f"Perplexity of {second} is {word} than that of {first} {at}: {change} ({over}; {seeds})."
