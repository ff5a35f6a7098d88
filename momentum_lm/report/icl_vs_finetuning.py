"""Results of ICL against finetuning as tables, figures, one page and TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from momentum_lm.files import file_stem
from momentum_lm.studies import finetuning_summary as numbers
from momentum_lm.studies.controls import CONTROLS, FINETUNED
from momentum_lm.studies.finetuning_summary import AUTHORS, EVIDENCE, MEANINGS, METRICS, SETTINGS, Estimate, Run
from momentum_lm.untrusted import legible

from .figures import SIZE, Panel, draw, to_svg
from .finetuning_verdicts import conclusions, number, signed, three, verdict
from .html import (
    Definitions,
    Dot,
    Folded,
    Forest,
    Gallery,
    Paragraph,
    Part,
    Picture,
    Points,
    Reference,
    Verdict,
)  # fmt: skip
from .layer_figures import Curve, heads_panel, layer_panel, overlap_panel
from .published import DATASETS as PUBLISHED_DATASETS
from .published import IN_PERCENT, MODELS, QUANTITIES, SHOTS, SOURCE, published
from .skeleton import Folder, Report, Sections, read_runs
from .tables import Table, counted

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
_TUNED = {"kv": "key and value projections", "all": "all parameters"}
_INTERVALS = (
    "Numbers are means over layers, then over draws of demonstrations (seeds). Their 95% intervals are Student's over "
    "draws: what other demonstrations would give on these examples. Those over two or three draws are wide, and may "
    "reach beyond what a metric can be. For one draw, and where all draws agree, they are over examples: Wilson's for "
    "shares, bootstrap for the rest."
)
_REC2FTP = (
    "of the errors that FT repairs, the share that ICL repairs too. Chance: the share of all zero-shot errors that ICL "
    "repairs, which is what it would be if the two had nothing to do with each other. Both are of all draws' examples "
    "together."
)
_FORMS = (
    "The authors' form follows the code of arXiv 2212.10559: it looks at the first token of the first choice, "
    "normalises attention outputs first (which makes unrelated updates look alike), and compares attention summed over "
    "heads. The corrected form looks at the token that predicts the choice, compares updates as they are, ranks "
    "attention head by head, and takes chance out of recall."
)


_WORDS = {
    "Tested similarities": f"{'; '.join(METRICS[name] for name in EVIDENCE)}: one for each way in which the paper says "
    "that ICL and finetuning are alike. The other metrics are variants of these. Those of relaxed attention are of the "
    "paper's algebra, without softmax, and not of the model that answers.",
    "Intervals": _INTERVALS,
    "Authors' and corrected form": _FORMS,
}


def _compared(results: Mapping[str, Any]) -> str:
    """What the three settings are, and how the model was finetuned."""
    config = results["config"]
    which = str(config.get("finetune_parameters", "kv"))
    tuned = _TUNED.get(which, f"parameters whose names match {legible(which, 60)}")
    loss = "their labels" if config.get("finetune_loss") == "label" else "all of their tokens"
    found = list(dict.fromkeys(f"{run['finetune_lr']:g}" for run in results["runs"]))
    rates = f"rate {found[0]}" if len(found) == 1 else f"rates {', '.join(found[:-1])} and {found[-1]}"
    grid, chosen = config.get("finetune_lr"), ""
    if isinstance(grid, list) and len(grid) > 1:
        paper = config.get("protocol") == "paper"
        where = "the evaluated examples, as the paper did" if paper else "training examples that are not demonstrations"
        chosen = f", for each draw the best of {len(grid)} by accuracy on {where}"
    return (
        "Zero-shot (ZSL) is the model without demonstrations. In context (ICL) it has them in its prompt. Finetuned "
        f"(FT) it has learned them instead: {tuned}, on {loss}, by plain SGD, one demonstration a step, in order, "
        f"once, with learning {rates}{chosen}."
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
        "": [Verdict(conclusions(runs))],
        "What is compared": [Paragraph(_compared(results)), Definitions(_rows_are(runs))],
    }
    for (dataset, shots), chosen in numbers.settings(runs).items():
        for name, figure in _pictures(chosen, f"{file_stem(dataset)}-{shots}shot").items():
            save(name, figure)
        sections[f"{dataset}, {counted(shots, 'shot')}"] = _section(chosen)
    sections["What the words mean"] = [Definitions({**_WORDS, "Rec2FTP": _REC2FTP})]
    tables: list[Part] = [
        Folded("Accuracies and predictions", [accuracy_table(runs)]),
        Folded("Every metric and control", [results_table(runs)]),
    ]
    if (beside := paper_table(runs)) is not None:
        tables.append(Folded("Beside the paper's numbers", [beside, Paragraph(_THE_PAPER)]))
    sections["All numbers"] = [*tables, Folded(counted(len(runs), "run"), [_runs_table(runs)])]
    return sections


_THE_PAPER = (
    f"Paper: {SOURCE}, models of 1.3B and 2.7B parameters, one draw; draw and learning rate were chosen on the "
    "reported examples."
)


def _rows_are(runs: Sequence[Run]) -> dict[str, str]:
    """What the rows of the similarities' plots compare."""
    return {control.title: control.meaning for control in (FINETUNED, *(CONTROLS[name] for name in _controls(runs)))}


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
    """Conclusions and numbers of a results folder, for a page that shows other things too. Raises as
    ``write_report``."""
    (results,) = read_runs([folder], [TASK])
    runs = results["runs"]
    parts: list[Part] = [Paragraph(_compared(results)), Points(conclusions(runs))]
    for (dataset, _), chosen in numbers.settings(runs).items():
        parts += [_accuracy_forest(dataset, chosen), _rec2ftp_forest(chosen)]
        parts += [forest for name in EVIDENCE if (forest := _forest(chosen, name))]
    parts.append(Folded("What the words mean", [Definitions(_rows_are(runs) | _WORDS)]))
    meanings = Definitions({METRICS[name]: MEANINGS[name] for name in METRICS})
    return [*parts, Folded("As tables", [accuracy_table(runs), results_table(runs), meanings])]


def estimate_dot(
    label: str, value: Estimate, singles: Sequence[float | None] = (), role: str = "main", examples: int = 0
) -> Dot:
    """A row of a forest plot; the single draws stand beside an interval that is over them."""
    known = [single for single in singles if single is not None] if value["over"] == "seeds" else []
    of_examples = counted(examples, "example") if examples else "examples"
    over = {"seeds": counted(value["num"], "draw"), "examples": of_examples, None: ""}[value["over"]]
    return Dot(label, value["mean"], value["ci95"], over, known, role)


def _published(quantity: str, dataset: str, label: str = "") -> list[Dot]:
    """The paper's numbers as rows, for its data sets."""
    if dataset not in PUBLISHED_DATASETS:
        return []
    scale = 0.01 if quantity in IN_PERCENT else 1.0
    return [Dot(f"{label}paper, {m}", published(quantity, m, dataset) * scale, role="other") for m in MODELS]


def _of_paper(dataset: str) -> str:
    """Where the paper's rows are from, and with how many demonstrations, for its data sets."""
    return f" {_THE_PAPER} It had {SHOTS[dataset]} demonstrations." if dataset in PUBLISHED_DATASETS else ""


def _accuracy_forest(dataset: str, runs: Sequence[Run]) -> Forest:
    dots = []
    for name, title in SETTINGS.items():
        singles = [run["accuracy"][name] for run in runs]
        dots.append(estimate_dot(title, numbers.accuracy(runs, name), singles, examples=runs[0]["num_examples"]))
        dots += _published(name, dataset, f"{title}, ")
    what = f"without demonstrations, finetuned on them, and in context.{_of_paper(dataset)}"
    return Forest(f"Accuracy on {dataset}", dots, what,
                  percent=(1, "%"), unit="accuracy (%)")  # fmt: skip


def _rec2ftp_forest(runs: Sequence[Run]) -> Forest:
    share = replace(estimate_dot("Rec2FTP", numbers.rec2ftp(runs)), absent="nothing to recover")
    dots = [share, *_published("rec2ftp", runs[0]["dataset"])]
    dots.append(replace(estimate_dot("chance", numbers.chance(runs), role="control"), absent="no zero-shot error"))
    return Forest("Rec2FTP:", dots, _REC2FTP + _of_paper(runs[0]["dataset"]), percent=(1, "%"), unit="share (%)")


def _forest(runs: Sequence[Run], name: str, part: str = "corrected") -> Forest | None:
    """A metric with its controls; None where the runs have neither. In the authors' form with the paper's numbers."""
    dots = []
    for control in (None, *CONTROLS):
        value = numbers.metric(runs, name, part, control)
        if value["num"]:
            what = FINETUNED if control is None else CONTROLS[control]
            role = "main" if control is None else "control" if what.null else "other"
            dots.append(
                estimate_dot(what.title, value, [numbers.over_layers(run, name, part, control) for run in runs], role)
            )
            quantity = name if control is None else f"{name}_{control}"
            if part == "paper" and quantity in QUANTITIES:
                dots += _published(quantity, runs[0]["dataset"], "" if control is None else f"{what.title}, ")
    if not dots:
        return None
    form = "" if part == "corrected" else ", authors' form"
    unit = UNITS.get(name, "cosine")
    level = float(name == "relaxation_ratio")
    meaning = MEANINGS[name]
    if part == "paper":
        meaning += AUTHORS.get(name, "") + (_of_paper(runs[0]["dataset"]) if name in QUANTITIES else "")
    return Forest(f"{METRICS[name]}{form}:", dots, meaning, Reference(f"{level:g}", level), unit=unit)


def curves(runs: Sequence[Run], name: str, part: str = "corrected") -> dict[str, Curve]:
    """The lines of a metric's panel: itself and the controls that there are."""
    lines = {}
    for control in (None, *CONTROLS):
        band = numbers.bands(runs, name, part, control)
        if band is not None:
            line = FINETUNED if control is None else CONTROLS[control]
            if len(runs) == 2:  # whose intervals are wider than what can be drawn, and say so in the plots above
                band[1:] = np.nan
            lines[line.title] = Curve(band[0], band[1], band[2], line.look)
    return lines


def panels(runs: Sequence[Run], part: str = "corrected") -> dict[str, Panel]:
    """{metric: panel of its lines over layers}, of the metrics that the runs have."""
    found = {name: curves(runs, name, part) for name in METRICS}
    return {name: metric_panel(name, lines) for name, lines in found.items() if FINETUNED.title in lines}


def metric_panel(name: str, lines: Mapping[str, Curve], title: str = "") -> Panel:
    """A metric's lines over layers, with its name or another title, and its unit."""
    return layer_panel(lines, title or METRICS[name], name == "relaxation_ratio", UNITS.get(name, "cosine"))


def _pictures(runs: Sequence[Run], stem: str) -> dict[str, Figure]:
    drawn = {
        f"layers-{stem}": (panels(runs), SIZE, 3),
        f"layers-paper-{stem}": (panels(runs, "paper"), SIZE, 3),
        f"heads-{stem}": (_head_panels(runs), (4.0, 3.6), 3),
        f"attention-{stem}": (attention_panels(runs[0]), (4.0, 3.6), 2),
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
    dataset = runs[0]["dataset"]
    counts = numbers.cells(runs)
    right, by_icl, by_ft = counts[1].sum(), counts[1, 0].sum(), counts[1, :, 0].sum()
    spoiled = f"Of {right:,} that were right zero-shot ICL spoils {by_icl:,} and finetuning {by_ft:,}."
    together = f" {len(runs)} draws together: an example counts once a draw." if len(runs) > 1 else ""
    overlap = Picture(
        to_svg(draw(overlap_panel(counts), size=(4.3, 4.0))),
        "Zero-shot's errors: by column whether finetuning repairs them, in strong colour what ICL repairs; areas are "
        f"numbers of examples. The height of the strong blue is Rec2FTP. {spoiled}{together}",
    )
    drawn, rest = panels(runs), [name for name in METRICS if name not in EVIDENCE]
    paper = panels(runs, "paper")
    parts: list[Part] = [
        Points(verdict(runs)),
        _accuracy_forest(dataset, runs),
        _rec2ftp_forest(runs),
        Folded("Which errors both repair", [overlap]),
        *_forests(runs, EVIDENCE),
        Gallery([_layer_picture(drawn[name], name, "corrected") for name in EVIDENCE if name in drawn]),
    ]
    if _controls(runs):
        over = "paired by draw" if len(runs) > 1 else "intervals over examples"
        parts.append(Folded(f"Corrected metrics minus controls, {over}, with 95% intervals", [difference_table(runs)]))
    if others := _forests(runs, rest):
        pictures = [_layer_picture(drawn[name], name, "corrected") for name in rest if name in drawn]
        parts.append(Folded("Other metrics", [*others, Gallery(pictures)]))
    if authors := _forests(runs, tuple(METRICS), "paper"):
        pictures = [_layer_picture(panel, name, "authors' form") for name, panel in paper.items()]
        parts.append(Folded("In the authors' form", [Paragraph(_FORMS), *authors, Gallery(pictures)]))
    heads = [
        Picture(
            to_svg(draw(panel, size=(4.0, 3.6))),
            f"{METRICS[name]}, corrected; blue positive, orange negative, × undefined.",
        )
        for name, panel in _head_panels(runs).items()
    ]
    if heads:
        parts.append(Folded("By head", [Gallery(heads)]))
    return [*parts, *_attention(runs[0])]


def _forests(runs: Sequence[Run], names: Sequence[str], part: str = "corrected") -> list[Forest]:
    """Those of the metrics that the runs have."""
    return [forest for name in names if (forest := _forest(runs, name, part))]


def _attention(run: Run) -> list[Part]:
    """Single examples: which demonstrations they attend to, in context and by finetuning."""
    pictures = [
        Picture(to_svg(draw(panel, size=(4.0, 3.6))), title + ": blue more than an equal share, orange less.")
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


def _layer_picture(panel: Panel, name: str, form: str) -> Picture:
    return Picture(
        to_svg(draw(panel)),
        f"{METRICS[name]}, {form}, by layer; band: 95% interval of {FINETUNED.title} (of two draws none).",
    )


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
