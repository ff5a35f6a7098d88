"""Results of in-context classification as summary, tables, figures and pages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from momentum_lm.analysis.statistics import t_interval, wilson_interval
from momentum_lm.files import file_stem
from momentum_lm.results.records import SAMPLES, read_samples

from .common import read_runs, replace_events
from .figures import AccuracyPoint, accuracy_panel, confusion_panel, draw, save_png, to_svg
from .html import Code, Folded, Paragraph, Part, Picture, Points, write_page
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "icl_classification"
Run = Mapping[str, Any]
Cell = tuple[str, int, str]  # dataset, shots, calibration

INTERVALS = (
    "Accuracy is the mean over seeds, the orders of one seed's demonstrations averaged first. Its 95% interval is Student's over seeds: "
    "what other demonstrations would give on these examples (with --fresh-queries: on others). Where nothing is drawn "
    "(0 shots), "
    "where there is one seed, and where all seeds agree, it is Wilson's over examples: what other examples would give."
)
_BASELINES = (
    "The baseline is the accuracy of always giving the most frequent label of the evaluated examples, or of guessing where every example "
    "has its own choices. A setting beats it if its whole interval lies above. Macro-F1 is averaged over the classes that occur."
)


def cells(runs: Sequence[Run]) -> dict[Cell, list[Run]]:
    """The runs of each dataset, number of shots and calibration: datasets and calibrations in the order of their first runs."""
    datasets, names = (list(dict.fromkeys(run[key] for run in runs)) for key in ("dataset", "calibration"))
    grouped: dict[Cell, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (datasets.index(r["dataset"]), r["shots"], names.index(r["calibration"]), r["seed"], r["order"])):
        grouped.setdefault((run["dataset"], run["shots"], run["calibration"]), []).append(run)
    return grouped


def by_seed(runs: Sequence[Run]) -> dict[int, float]:
    """Accuracy of each seed, its orders averaged."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run["seed"], []).append(run["accuracy"])
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def summarise_cell(runs: Sequence[Run]) -> dict[str, Any]:
    """``mean``, ``ci95`` and what it is ``over`` (``seeds`` or ``examples``), ``num_seeds``, ``sd``, ``min``, ``max`` of one cell.

    The interval is Student's over seeds, cut to [0, 1]. It is Wilson's over examples for a single seed, without
    demonstrations (unless each seed has other queries), and where all seeds agree: their interval would have no width,
    as if there were no doubt. ``sd`` is null where nothing was drawn twice.
    """
    values = list(by_seed(runs).values())
    mean = float(np.mean(values))
    samples = {run.get("examples_sha256") for run in runs}
    drawn = len(values) > 1 and (runs[0]["shots"] > 0 or len(samples) > 1)
    if drawn and max(values) > min(values):
        interval, over = t_interval(values), "seeds"
    else:
        interval, over = wilson_interval(round(mean * runs[0]["num_examples"]), runs[0]["num_examples"]), "examples"
    return {
        "mean": mean,
        "ci95": [max(0.0, interval.low), min(1.0, interval.high)],
        "over": over,
        "num_seeds": len(values),
        "sd": float(np.std(values, ddof=1)) if drawn else None,
        "min": min(values),
        "max": max(values),
    }


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The ``summary`` of results.json: {dataset: {shots: :func:`summarise_cell` of the first calibration, its name, and all of them}}."""
    found: dict[str, Any] = {}
    for (dataset, shots, calibration), chosen in cells(runs).items():
        entry = found.setdefault(dataset, {}).setdefault(str(shots), {"calibration": calibration, "by_calibration": {}})
        entry["by_calibration"][calibration] = summarise_cell(chosen)
    for of_dataset in found.values():
        for entry in of_dataset.values():
            entry |= entry["by_calibration"][entry["calibration"]]
    return found


def baseline(runs: Sequence[Run]) -> tuple[str, float]:
    """What needs no model: ("majority", share of the most frequent label), or ("chance", accuracy of guessing), of the
    queries of all runs together.
    """
    if runs[0]["majority"] is None:
        return "chance", float(np.mean([run["chance"] for run in runs]))
    if runs[0].get("confusion") is None:
        return "majority", runs[0]["majority"]
    gold = np.sum([np.sum(run["confusion"], axis=1) for run in runs], axis=0)
    return "majority", float(gold.max() / gold.sum())


def results_table(runs: Sequence[Run]) -> Table:
    """One row for each dataset, number of shots and calibration, in percent, and whether it beats the baseline."""
    rows = []
    for (dataset, _, calibration), chosen in cells(runs).items():
        cell, (name, level) = summarise_cell(chosen), baseline(chosen)
        scores = [run["macro_f1"] for run in chosen if run["macro_f1"] is not None]
        rows.append(
            [
                dataset,
                shots_text(chosen),
                calibration,
                percent(cell["mean"]),
                interval_text(cell["ci95"]),
                over_text(cell, chosen[0]),
                f"{percent(level)} {name}",
                "yes" if cell["ci95"][0] > level else "NO",
                percent(float(np.mean(scores))) if scores else "",
                f"{percent(cell['min'])} to {percent(cell['max'])}" if cell["sd"] is not None else "",
            ]
        )
    headings = ["dataset", "shots", "calibration", "accuracy %", "95% interval", "over", "baseline %", "beats it?", "macro-F1 %"]
    headings.append("range of seeds")
    return Table(headings, rows)


def verdicts(runs: Sequence[Run]) -> list[str]:
    """A sentence for every cell that does not beat its baseline, and one for demonstrations that did not fit."""
    sentences = []
    for (dataset, shots, calibration), chosen in cells(runs).items():
        cell, (name, level) = summarise_cell(chosen), baseline(chosen)
        if cell["ci95"][0] <= level:
            what = "the majority class" if name == "majority" else "chance"
            sentences.append(
                f"{dataset}, {shots} shots, calibration {calibration}: {percent(cell['mean'])}% ({interval_text(cell['ci95'])}) does not "
                f"beat {what} ({percent(level)}%)."
            )
    few: dict[tuple[str, int], list[int]] = {}
    for run in runs:
        if run["shots_fitted"] < run["shots"]:
            few.setdefault((run["dataset"], run["shots"]), []).append(run["shots_fitted"])
    for (dataset, shots), fitted in few.items():
        count = f"{min(fitted)}" if min(fitted) == max(fitted) else f"{min(fitted)} to {max(fitted)}"
        sentences.append(f"{dataset}: of {shots} demonstrations only {count} fitted into the model's context.")
    overlaps = {run["dataset"]: run["overlap"] for run in runs if isinstance(run.get("overlap"), dict)}
    for dataset, overlap in overlaps.items():
        for name, what in (
            (
                "not_evaluated",
                "examples are left out, for demonstrations are drawn from the training split's copies of them",
            ),
            ("shown_and_evaluated", "training examples are evaluated too and may be among their own demonstrations"),
        ):
            if overlap.get(name):
                sentences.append(f"{dataset}: {overlap[name]} {what}.")
    return sentences


def write_report(folder: str | os.PathLike[str], replace: bool = False) -> Table:
    """Writes ``report.html``, ``accuracy-<dataset>.png``, ``confusion-<dataset>.png`` and TensorBoard events beside a
    ``results.json``; returns its table.

    Raises UserError for results of other tasks, or without a finished run, and for files of these names that are not
    ours, unless ``replace``.
    """
    folder = Path(folder)
    (results,) = read_runs([folder], [TASK])
    runs, table = results["runs"], results_table(results["runs"])
    sections: dict[str, Sequence[Part]] = {
        "": [Paragraph(f"Model: {results['model']['path']}"), table, *map(Paragraph, (INTERVALS, _BASELINES))],
        "To keep in mind": [Points(verdicts(runs) or ["Every setting beats its baseline."])],
    }
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        chosen = [run for run in runs if run["dataset"] == dataset]
        save_png(_accuracy_figure(chosen), folder / f"accuracy-{file_stem(dataset)}.png", replace)
        parts: list[Part] = [_curves(chosen)]
        panels = _confusions(chosen, results["config"]["datasets"][dataset]["labels"])
        if panels:
            side = max(3.2, 1.6 + 0.42 * len(chosen[0]["confusion"]))
            save_png(
                draw(*panels.values(), size=(side + 1.2, side)), folder / f"confusion-{file_stem(dataset)}.png", replace
            )
            parts += [Picture(to_svg(draw(panel, size=(side + 1.2, side))), text) for text, panel in panels.items()]
        sections[dataset] = parts
    sections["Every run"] = [Folded(f"{len(runs)} runs", [_runs_table(runs)])]
    samples = _samples(folder / SAMPLES)
    if samples:
        sections["Prompts as the model saw them"] = samples
    details = {name: results[name] for name in ("model", "config")}
    sections["What was measured"] = [Folded("Model and configuration", [Code(json.dumps(details, indent=1, ensure_ascii=False))])]
    if results["config"].get("command"):
        sections["How to run it again"] = [Code(results["config"]["command"])]
    write_page(folder / "report.html", "In-context classification", sections, replace)
    _write_events(folder, results)
    return table


def overview(folder: str | os.PathLike[str]) -> list[Part]:
    """Table, caveats and curves of a results folder, for a page that shows other things too. Raises as :func:`write_report`."""
    (results,) = read_runs([folder], [TASK])
    runs = results["runs"]
    parts: list[Part] = [results_table(runs), Points(verdicts(runs) or ["Every setting beats its baseline."]), Paragraph(INTERVALS)]
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        chosen = [run for run in runs if run["dataset"] == dataset]
        parts.append(_curves(chosen))
    return parts


def points(runs: Sequence[Run]) -> dict[str, list[AccuracyPoint]]:
    """{calibration: points of its line} of one dataset."""
    lines: dict[str, list[AccuracyPoint]] = {}
    for (_, shots, calibration), chosen in cells(runs).items():
        cell = summarise_cell(chosen)
        dots = tuple(by_seed(chosen).values()) if cell["sd"] is not None else ()
        lines.setdefault(calibration, []).append(AccuracyPoint(shots, cell["mean"], cell["ci95"][0], cell["ci95"][1], dots))
    return lines


def _accuracy_figure(runs: Sequence[Run]) -> Figure:
    """Of one data set."""
    return draw(accuracy_panel(points(runs), runs[0]["dataset"], baseline(runs), "calibration"), size=(5.8, 4.4))


def _curves(runs: Sequence[Run]) -> Picture:
    caption = f"Accuracy on {runs[0]['dataset']}: mean and 95% interval for each calibration; faint dots are seeds."
    return Picture(to_svg(_accuracy_figure(runs)), caption)


def percent(value: float) -> str:
    """A fraction in percent, such as ``62.5``, without the sign."""
    return f"{100 * value:.1f}"


def interval_text(ci95: Sequence[float]) -> str:
    """The ends of an interval of fractions, in percent."""
    return f"{percent(ci95[0])} to {percent(ci95[1])}"


def over_text(cell: Mapping[str, Any], run: Run) -> str:
    """How many of what an interval is over."""
    return f"{cell['num_seeds']} seeds" if cell["over"] == "seeds" else f"{run['num_examples']:,} examples"


def shots_text(runs: Sequence[Run]) -> str:
    """Demonstrations asked for; where they did not fit, the fewest that did, such as ``12 of 16``."""
    fitted, shots = min(run["shots_fitted"] for run in runs), runs[0]["shots"]
    return str(shots) if fitted == shots else f"{fitted} of {shots}"


def _confusions(runs: Sequence[Run], labels: Sequence[str] | None) -> dict[str, Any]:
    """{caption: panel} at the most shots: the first calibration, and the most accurate of the others if it is better."""
    if labels is None or runs[0]["confusion"] is None:
        return {}
    most = max(run["shots"] for run in runs)
    groups = {cell[2]: chosen for cell, chosen in cells([run for run in runs if run["shots"] == most]).items()}
    first = next(iter(groups))
    best = max(groups, key=lambda name: summarise_cell(groups[name])["mean"])
    panels = {}
    for name in dict.fromkeys((first, best)):
        counts = np.sum([run["confusion"] for run in groups[name]], axis=0).tolist()
        caption = f"Predictions for each gold class of {runs[0]['dataset']}, in percent of its examples; {most} shots, calibration {name}"
        caption += f", {len(groups[name])} runs together." if len(groups[name]) > 1 else "."
        panels[caption] = confusion_panel(counts, [label.strip() for label in labels], f"{runs[0]['dataset']}, {most} shots, {name}")
    return panels


def _runs_table(runs: Sequence[Run]) -> Table:
    headings = ["dataset", "shots", "seed", "order", "calibration", "accuracy %", "95% over examples", "macro-F1 %", "examples"]
    headings += ["tokens of demonstrations", "seconds"]
    rows = [
        [
            *(run["dataset"], shots_text([run]), str(run["seed"]), str(run["order"]), run["calibration"]),
            *(percent(run["accuracy"]), interval_text(run["ci95"]), "" if run["macro_f1"] is None else percent(run["macro_f1"])),
            *(f"{run['num_examples']:,}", f"{run.get('prefix_tokens', 0):,}", f"{run.get('seconds', 0.0):.1f}"),
        ]
        for chosen in cells(runs).values()
        for run in chosen
    ]
    return Table(headings, rows)


def _samples(path: Path) -> list[Part]:
    """The prompts that the study kept, with what was scored after them. Raises UserError for a damaged file."""
    if not path.exists():
        return []
    parts: list[Part] = []
    for sample in read_samples(path):
        choices = "; ".join(json.dumps(text, ensure_ascii=False) for text in sample["continuations"])
        right = json.dumps(sample["continuations"][sample["gold"]], ensure_ascii=False)
        line = f"{sample['dataset']}, {sample['shots']} shots" + (
            f", seed {sample.get('seed')}" if sample["shots"] else ""
        )
        parts.append(Folded(line, [Code(sample["prompt"]), Paragraph(f"Scored after it: {choices}. Right: {right}.")]))
    return parts


def _write_events(folder: Path, results: Mapping[str, Any]) -> None:
    """TensorBoard events: accuracy over shots of each calibration, the mean and every seed's."""

    def write(log: TrainingLog) -> None:
        final = {}
        for (dataset, shots, calibration), chosen in cells(results["runs"]).items():
            tag, mean = f"{dataset}/accuracy/{calibration}", summarise_cell(chosen)["mean"]
            log.scalars({tag: mean} | {f"{tag}/seed{seed}": value for seed, value in by_seed(chosen).items()}, shots)
            final[f"{dataset}/accuracy/{calibration}_at_{shots}"] = mean
        log.hparams_with_metrics(final, 0)

    config = {key: value for key, value in results["config"].items() if key not in ("datasets", "command")}
    replace_events(folder, {"model": results["model"]["path"], **config, **results["model"].get("architecture", {})}, write)
