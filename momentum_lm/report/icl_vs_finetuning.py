"""Results of ICL against finetuning as tables, figures, one page and TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from momentum_lm.files import file_stem
from momentum_lm.studies import finetuning_summary as numbers
from momentum_lm.studies.controls import CONTROLS, FINETUNED
from momentum_lm.studies.finetuning_summary import EVIDENCE, METRICS, SETTINGS, Estimate, Run

from .figures import Panel, draw, to_svg
from .finetuning_verdicts import headlines, number, signed, three, verdict
from .html import Folded, Gallery, Paragraph, Part, Picture, Points
from .layer_figures import Curve, heads_panel, layer_panel, overlap_panel
from .published import DATASETS as PUBLISHED_DATASETS
from .published import IN_PERCENT, MODELS, QUANTITIES, SOURCE, published
from .skeleton import Folder, Report, Sections, read_runs
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "icl_finetune_analysis"
UNITS = {  # of the metrics' axes; the rest are cosines
    **dict.fromkeys(("kendall", "kendall_example"), "rank correlation (tau)"),
    **dict.fromkeys(("recall_at_k", "recall_at_k_example"), "recall (share)"),
    "relaxation_ratio": "ratio of lengths",
}
HEADS = ("simam_delta_centred", "simam_delta", "kendall", "dw_similarity")
_HEADS_ARE = {"dw_similarity": "key/value head"}
_OF_RUN = [name for name, control in CONTROLS.items() if control.of_run]  # of which a metric has one
_INTERVALS = (
    "Numbers are means over layers, then over seeds, which draw the demonstrations. Their 95% intervals are Student's "
    "over seeds: what "
    "other demonstrations would give on these examples. For one seed, and where all seeds agree, they are over "
    "examples: Wilson's for "
    "shares, bootstrap for the rest."
)
_MEASURED = (
    "ZSL is the model without demonstrations, ICL with them in the prompt, FT without them after it was "
    "finetuned on them: as the "
    "configuration says, by default key and value projections by plain SGD, one demonstration a step, in order, once. "
    "The weights are "
    "restored afterwards.",
    "The authors' form follows the code of arXiv 2212.10559: it looks at the first token of the first choice, "
    "normalises attention "
    "outputs first (which makes unrelated updates look alike), and compares attention summed over heads. The corrected "
    "form looks at the "
    "token that predicts the choice, compares updates as they are, ranks attention head by head, and takes chance out "
    "of recall.",
    "Rec2FTP: of the errors that FT repairs, the share that ICL repairs too. Chance: the share of all zero-shot errors "
    "that ICL repairs, "
    "which is what Rec2FTP would be if the two had nothing to do with each other. Both are of all seeds' examples "
    "together.",
    "SimAOU: cosine of what ICL and what FT change in a layer's attention output. SimAM: cosine of attention logits "
    "over the query's own "
    "tokens; SimAM-delta: of what ICL and FT change in them (Deutch et al., arXiv 2311.07772); centred: without each "
    "row's mean, on which "
    "no attention depends.",
    "Kendall and recall: agreement of ICL's attention to the demonstrations' tokens with the inner products of FT's "
    "training queries and "
    "the test query. Recall, corrected, is 0 by chance and 1 at best.",
    "cos(dW_ICL, dW_FT): of the two implicit updates of relaxed linear attention (no softmax), per head. Relaxed vs "
    "softmax: cosine, and "
    "ratio of lengths, of what a head puts out in context without and with softmax.",
    "Controls. Random: a random zero-mean update, a random order of tokens, or keys dealt out anew among tokens (in "
    "the authors' form "
    "updates and weights are from 0 to 1). Before finetuning: the model as it was, in FT's place. Untrained: the same "
    "architecture with "
    "fresh weights. Shuffled labels: finetuned on demonstrations whose labels were dealt out anew: "
    "some fall to where they were, of two balanced labels about half. LCGD: finetuned with a loss for every "
    "layer that stays in the layer. All parameters: all are finetuned. Only what exceeds the first four speaks for ICL "
    "as finetuning; "
    "the last two are other ways of learning.",
)


def results_table(runs: Sequence[Run]) -> Table:
    """One row for each dataset, number of shots and metric: both forms with intervals, and the controls of the
    corrected one."""
    controls = _controls(runs)
    rows = []
    for (dataset, shots), chosen in numbers.settings(runs).items():
        rows += [[dataset, str(shots), *row] for row in _metric_rows(chosen, controls)]
    return Table(["dataset", "shots", *_metric_headings(controls)], rows)


def accuracy_table(runs: Sequence[Run]) -> Table:
    """One row for each dataset and number of shots: accuracies and Rec2FTP, in percent."""
    rows = []
    for (dataset, shots), chosen in numbers.settings(runs).items():
        counts, level = numbers.cells(chosen), numbers.chance(chosen)["mean"]
        rows.append(
            {
                "dataset": dataset,
                "shots": str(shots),
                "seeds": str(len(chosen)),
                "examples": f"{chosen[0]['num_examples']:,}",
                **accuracies(chosen),
                "Rec2FTP": number(numbers.rec2ftp(chosen), percent=True) or "nothing to recover",
                "chance": "" if level is None else f"{100 * level:.1f}%",
                "recovered": f"{counts[0, 1, 1]:,} of {counts[0, :, 1].sum():,}",
                "learning rates": ", ".join(f"{run['finetune_lr']:g}" for run in chosen),
            }
        )
    return Table.of(rows)


def accuracies(runs: Sequence[Run]) -> dict[str, str]:
    """Cells of a table, by their headings."""
    return {title: number(numbers.accuracy(runs, name), percent=True) for name, title in SETTINGS.items()}


def paper_table(runs: Sequence[Run]) -> Table | None:
    """Our numbers in the authors' form beside the paper's, for its data sets; None if there are none."""
    rows = []
    for (dataset, shots), chosen in numbers.settings(runs).items():
        for quantity in QUANTITIES if dataset in PUBLISHED_DATASETS else ():
            title, ours = published_quantity(chosen, quantity)
            percent = quantity in IN_PERCENT
            theirs = {f"paper, {model}": published(quantity, model, dataset) for model in MODELS}
            row = {"dataset": dataset, "shots": str(shots), "": title, "here, authors' form": number(ours, percent)}
            rows.append(row | {name: f"{value:.1f}%" if percent else f"{value:.3f}" for name, value in theirs.items()})
    return Table.of(rows) if rows else None


def difference_table(runs: Sequence[Run]) -> Table:
    """Corrected metric minus each control, paired by seed, for one setting."""
    controls = _controls(runs)
    rows = []
    for name, title in METRICS.items():
        gaps = [numbers.difference(runs, name, control) for control in controls]
        if any(gap["num"] for gap in gaps):
            rows.append([title, *map(signed, gaps)])
    return Table(["corrected, minus", *(CONTROLS[control].title for control in controls)], rows)


def _sections(folder: Path, results: dict[str, Any], save: Callable[[str, Figure], None]) -> Sections:
    runs = results["runs"]
    sections: Sections = {
        "What this says": [Points(headlines(runs)), Paragraph(_INTERVALS)],
        "Predictions": [accuracy_table(runs)],
    }
    for (dataset, shots), chosen in numbers.settings(runs).items():
        for name, figure in _pictures(chosen, f"{file_stem(dataset)}-{shots}shot").items():
            save(name, figure)
        sections[f"{dataset}, {shots} shots"] = _section(chosen)
    if (beside := paper_table(runs)) is not None:
        note = f"Source: {SOURCE}: models of 1.3B and 2.7B parameters, one seed a cell, seed and learning "
        note += "rate chosen on these examples."
        sections["Beside the paper"] = [Folded("The paper's numbers", [beside, Paragraph(note)])]
    sections["How it was measured"] = [Points(_MEASURED)]
    sections["Every run"] = [Folded(f"{len(runs)} runs", [_runs_table(runs)])]
    return sections


def _log(log: TrainingLog, results: dict[str, Any]) -> dict[str, float]:
    """Scalars over layers: <dataset>-<shots>shot/<part>/<metric>, with the control's name after it."""
    final: dict[str, float] = {}
    for (dataset, shots), chosen in numbers.settings(results["runs"]).items():
        stem = f"{dataset}-{shots}shot"
        for part in numbers.PARTS:
            for name in METRICS:
                for control in (None, *CONTROLS):
                    band = numbers.bands(chosen, name, part, control)
                    if band is None:
                        continue
                    tag = f"{stem}/{part}/{name}" + (f"/{control}" if control else "")
                    for layer, value in enumerate(band[0], 1):
                        if np.isfinite(value):
                            log.scalars({tag: value}, layer)
                    if control is None:
                        final[tag] = numbers.metric(chosen, name, part)["mean"]
        values = {name: numbers.accuracy(chosen, name)["mean"] for name in SETTINGS} | {
            "rec2ftp": numbers.rec2ftp(chosen)["mean"]
        }
        final |= {f"{stem}/{name}": value for name, value in values.items() if value is not None}
    return final


write_report = Report(TASK, "In-context learning against finetuning", results_table, _sections, _log, images=True).write


def overview(folder: Folder) -> list[Part]:
    """Findings, tables and curves of a results folder, for a page that shows other things too. Raises as
    ``write_report``."""
    (results,) = read_runs([folder], [TASK])
    runs = results["runs"]
    parts: list[Part] = [Points(headlines(runs)), accuracy_table(runs), results_table(runs), Paragraph(_INTERVALS)]
    for chosen in numbers.settings(runs).values():
        parts.append(
            Gallery([_layer_picture(panel, METRICS[name], "corrected") for name, panel in panels(chosen).items()])
        )
    return parts


def curves(runs: Sequence[Run], name: str, part: str = "corrected") -> dict[str, Curve]:
    """The lines of a metric's panel: itself and the controls that there are."""
    lines = {}
    for control in (None, *CONTROLS):
        band = numbers.bands(runs, name, part, control)
        if band is not None:
            line = FINETUNED if control is None else CONTROLS[control]
            lines[line.title] = Curve(band[0], band[1], band[2], line.look)
    return lines


def panels(runs: Sequence[Run], part: str = "corrected") -> dict[str, Panel]:
    """{metric: panel of its lines over layers}, of the metrics that the runs have."""
    found = {name: curves(runs, name, part) for name in METRICS}
    return {name: metric_panel(name, lines) for name, lines in found.items() if FINETUNED.title in lines}


def metric_panel(name: str, lines: Mapping[str, Curve]) -> Panel:
    """A metric's lines over layers, with its name and unit."""
    return layer_panel(lines, METRICS[name], name == "relaxation_ratio", UNITS.get(name, "cosine"))


def _pictures(runs: Sequence[Run], stem: str) -> dict[str, Figure]:
    drawn = {
        f"layers-{stem}": (panels(runs), (4.6, 3.9), 3),
        f"layers-paper-{stem}": (panels(runs, "paper"), (4.6, 3.9), 3),
        f"heads-{stem}": (_head_panels(runs), (4.2, 3.6), 3),
        f"attention-{stem}": (attention_panels(runs[0]), (4.2, 3.6), 2),
    }
    figures = {
        name: draw(*found.values(), size=size, columns=columns)
        for name, (found, size, columns) in drawn.items()
        if found
    }
    return figures | {
        f"overlap-{stem}": draw(overlap_panel(numbers.cells(runs), f"Zero-shot's errors, {stem}"), size=(5.4, 4.4))
    }


def _section(runs: Sequence[Run]) -> list[Part]:
    controls = _controls(runs)
    counts = numbers.cells(runs)
    right, by_icl, by_ft = counts[1].sum(), counts[1, 0].sum(), counts[1, :, 0].sum()
    spoiled = f"Of {right:,} that were right zero-shot ICL spoils {by_icl:,} and finetuning {by_ft:,}."
    together = f" {len(runs)} seeds together." if len(runs) > 1 else ""
    overlap = Picture(
        to_svg(draw(overlap_panel(counts), size=(5.4, 4.4))),
        "Zero-shot's errors: by column whether finetuning repairs them, in strong colour what ICL repairs; areas are "
        "numbers of "
        f"examples. The height of the strong blue is Rec2FTP. {spoiled}{together}",
    )
    parts: list[Part] = [
        Points(verdict(runs)),
        Table(_metric_headings(controls), _metric_rows(runs, controls)),
        Folded("Corrected metrics minus controls, paired by seed, with 95% intervals", [difference_table(runs)]),
        overlap,
        Gallery([_layer_picture(panel, METRICS[name], "corrected") for name, panel in panels(runs).items()]),
    ]
    paper = [_layer_picture(panel, METRICS[name], "authors' form") for name, panel in panels(runs, "paper").items()]
    if paper:
        parts.append(Folded("By layer in the authors' form", [Gallery(paper)]))
    heads = [
        Picture(
            to_svg(draw(panel, size=(4.2, 3.6))),
            f"{METRICS[name]}, corrected; blue positive, orange negative, × undefined.",
        )
        for name, panel in _head_panels(runs).items()
    ]
    if heads:
        parts.append(Gallery(heads))
    return [*parts, *_attention(runs[0])]


def _attention(run: Run) -> list[Part]:
    """Single examples: which demonstrations they attend to, in context and by finetuning."""
    pictures = [
        Picture(to_svg(draw(panel, size=(4.2, 3.6))), title + ": blue more than an equal share, orange less.")
        for title, panel in attention_panels(run).items()
    ]
    if not pictures:
        return []
    labels = ", ".join(f"{number} {label}" for number, label in enumerate(run.get("demonstration_labels", ()), 1))
    return [
        Folded(
            "Attention of single examples to the demonstrations",
            [Gallery(pictures), Paragraph(f"Demonstrations: {labels}.")],
        )
    ]


def attention_panels(run: Run) -> dict[str, Panel]:
    """{title: panel} of the attention that single examples give to each demonstration by layer, mean over heads, less
    an equal share."""
    found = {}
    for example in run.get("attention", []):
        for setting in ("in_context", "finetuned"):
            shares = np.array(example[setting])
            title = f"Example {example['index']}, {SETTINGS[setting]}"
            found[title] = heads_panel(shares - 1 / shares.shape[1], title, "demonstration")
    return found


def _layer_picture(panel: Panel, title: str, form: str) -> Picture:
    return Picture(to_svg(draw(panel, size=(4.6, 3.9))), f"{title}, {form}, by layer, with 95% intervals.")


def _head_panels(runs: Sequence[Run]) -> dict[str, Panel]:
    tables = {name: numbers.mean_heads(runs, name) for name in HEADS}
    return {
        name: heads_panel(table, METRICS[name], _HEADS_ARE.get(name, "head"))
        for name, table in tables.items()
        if table is not None
    }


def _controls(runs: Sequence[Run]) -> list[str]:
    """The controls that any metric of the runs has."""
    return [
        control
        for control in CONTROLS
        if any(numbers.bands(runs, name, "corrected", control) is not None for name in METRICS)
    ]


def _metric_headings(controls: Sequence[str]) -> list[str]:
    rest = [CONTROLS[control].title for control in controls if control not in _OF_RUN]
    return [
        "metric",
        "authors' form",
        "its control",
        "corrected",
        *["its control"] * (len(rest) < len(controls)),
        *rest,
    ]


def _metric_rows(runs: Sequence[Run], controls: Sequence[str]) -> list[list[str]]:
    """A row a metric that the runs have."""
    rows = []
    rest = [control for control in controls if control not in _OF_RUN]
    for name, title in METRICS.items():
        paper, corrected = numbers.metric(runs, name, "paper"), numbers.metric(runs, name)
        if paper["num"] or corrected["num"]:
            levels = [_plain(numbers.metric(runs, name, control=control)) for control in rest]
            own = [_own_control(runs, name, "corrected")] * (len(rest) < len(controls))
            rows.append([title, number(paper), _own_control(runs, name, "paper"), number(corrected), *own, *levels])
    return rows


def _own_control(runs: Sequence[Run], name: str, part: str) -> str:
    """A metric's value for a random update, or before finetuning, whichever it has."""
    values = {control: numbers.metric(runs, name, part, control)["mean"] for control in _OF_RUN}
    return next((f"{three(value)} {control}" for control, value in values.items() if value is not None), "")


def _plain(value: Estimate) -> str:
    return "" if value["mean"] is None else three(value["mean"])


def published_quantity(runs: Sequence[Run], quantity: str) -> tuple[str, Estimate]:
    """Title and our number for a row of the paper's tables, in the authors' form. ``quantity``: one of
    ``published.QUANTITIES``."""
    if quantity in SETTINGS:
        return f"accuracy, {SETTINGS[quantity]}", numbers.accuracy(runs, quantity)
    if quantity == "rec2ftp":
        return "Rec2FTP", numbers.rec2ftp(runs)
    name, _, control = quantity.partition("_")
    return METRICS[name] + (f", {CONTROLS[control].title}" if control else ""), numbers.metric(
        runs, name, "paper", control or None
    )


def _runs_table(runs: Sequence[Run]) -> Table:
    return Table.of(
        [
            {
                "dataset": dataset,
                "shots": str(shots),
                "seed": str(run["seed"]),
                "learning rate": f"{run['finetune_lr']:g}",
                **accuracies([run]),
                "Rec2FTP": number(numbers.rec2ftp([run]), percent=True),
                **{METRICS[name]: _plain(numbers.metric([run], name)) for name in EVIDENCE},
            }
            for (dataset, shots), chosen in numbers.settings(runs).items()
            for run in chosen
        ]
    )
