"""Results of in-context classification as tables, figures, page and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from momentum_lm.files import file_stem
from momentum_lm.results.records import SAMPLES, read_samples
from momentum_lm.studies.classification_summary import Run, baseline, by_seed, cells, summarise_cell
from momentum_lm.studies.tasks import CHOICE

from .figures import AccuracyPoint, accuracy_panel, confusion_panel, draw, to_svg
from .html import Code, Folded, Paragraph, Part, Picture, Points
from .skeleton import Folder, Report, Sections, read_runs
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "icl_classification"
INTERVALS = (
    "Accuracy is the mean over seeds, the orders of one seed's demonstrations averaged first. Its 95% interval is "
    "Student's over seeds: "
    "what other demonstrations would give on these examples (with --fresh-queries: on others). Where nothing is drawn "
    "(0 shots), "
    "where there is one seed, and where all seeds agree, it is Wilson's over examples: what other examples would give."
)
_BASELINES = (
    "The baseline is the accuracy of always giving the most frequent label of the evaluated examples, or of guessing "
    "where every example "
    "has its own choices. A setting beats it if its whole interval lies above. Macro-F1 is averaged over the classes "
    "that occur."
)


_OVERLAPS = {
    "not_evaluated": "examples are left out, for demonstrations are drawn from the training split's copies of them",
    "shown_and_evaluated": "training examples are evaluated too and may be among their own demonstrations",
}


def results_table(runs: Sequence[Run]) -> Table:
    """One row for each dataset, number of shots and calibration, in percent, and whether it beats the baseline."""
    rows = []
    for (dataset, _, calibration), chosen in cells(runs).items():
        cell, (name, level) = summarise_cell(chosen), baseline(chosen)
        rows.append(
            {
                "dataset": dataset,
                "shots": shots_text(chosen),
                "calibration": calibration,
                CHOICE.title: percent(cell["mean"]),
                "95% interval": interval_text(cell["ci95"]),
                "over": over_text(cell, chosen[0]),
                "baseline %": f"{percent(level)} {name}",
                "beats it?": "yes" if cell["ci95"][0] > level else "NO",
                **{title: _mean([run[metric] for run in chosen]) for metric, title in CHOICE.others.items()},
                "range of seeds": f"{percent(cell['min'])} to {percent(cell['max'])}" if cell["sd"] is not None else "",
            }
        )
    return Table.of(rows)


def _mean(values: Sequence[float | None]) -> str:
    """In percent, of what there is."""
    known = [value for value in values if value is not None]
    return percent(float(np.mean(known))) if known else ""


def verdicts(runs: Sequence[Run]) -> list[str]:
    """A sentence for every cell that does not beat its baseline, and one for demonstrations that did not fit."""
    sentences = []
    for (dataset, shots, calibration), chosen in cells(runs).items():
        cell, (name, level) = summarise_cell(chosen), baseline(chosen)
        if cell["ci95"][0] <= level:
            what = "the majority class" if name == "majority" else "chance"
            sentences.append(
                f"{dataset}, {shots} shots, calibration {calibration}: {percent(cell['mean'])}% "
                f"({interval_text(cell['ci95'])}) does not "
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
        sentences += [f"{dataset}: {overlap[name]} {what}." for name, what in _OVERLAPS.items() if overlap.get(name)]
    return sentences


def _sections(folder: Path, results: dict[str, Any], save: Callable[[str, Figure], None]) -> Sections:
    runs = results["runs"]
    sections: Sections = {
        "": [results_table(runs), *map(Paragraph, (INTERVALS, _BASELINES))],
        "To keep in mind": [_caveats(runs)],
    }
    for dataset, chosen in _by_dataset(runs).items():
        save(f"accuracy-{file_stem(dataset)}", _accuracy_figure(chosen))
        parts: list[Part] = [_curves(chosen)]
        panels = _confusions(chosen, results["config"]["datasets"][dataset]["labels"])
        if panels:
            side = max(3.2, 1.6 + 0.42 * len(chosen[0]["confusion"]))
            size = (side + 1.2, side)
            save(f"confusion-{file_stem(dataset)}", draw(*panels.values(), size=size))
            parts += [Picture(to_svg(draw(panel, size=size)), text) for text, panel in panels.items()]
        sections[dataset] = parts
    sections["Every run"] = [Folded(f"{len(runs)} runs", [_runs_table(runs)])]
    if samples := _samples(folder / SAMPLES):
        sections["Prompts as the model saw them"] = samples
    return sections


def _log(log: TrainingLog, results: dict[str, Any]) -> dict[str, float]:
    """Accuracy over shots of each calibration, the mean and every seed's."""
    final = {}
    for (dataset, shots, calibration), chosen in cells(results["runs"]).items():
        tag, mean = f"{dataset}/{CHOICE.metric}/{calibration}", summarise_cell(chosen)["mean"]
        log.scalars({tag: mean} | {f"{tag}/seed{seed}": value for seed, value in by_seed(chosen).items()}, shots)
        final[f"{tag}_at_{shots}"] = mean
    return final


write_report = Report(TASK, "In-context classification", results_table, _sections, _log).write


def overview(folder: Folder) -> list[Part]:
    """Table, caveats and curves of a results folder, for a page that shows other things too. Raises as
    ``write_report``."""
    (results,) = read_runs([folder], [TASK])
    runs = results["runs"]
    return [results_table(runs), _caveats(runs), Paragraph(INTERVALS), *map(_curves, _by_dataset(runs).values())]


def _by_dataset(runs: Sequence[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run["dataset"] for run in runs)
    return {name: [run for run in runs if run["dataset"] == name] for name in names}


def _caveats(runs: Sequence[Run]) -> Points:
    return Points(verdicts(runs) or ["Every setting beats its baseline."])


def points(runs: Sequence[Run]) -> dict[str, list[AccuracyPoint]]:
    """{calibration: points of its line} of one dataset."""
    lines: dict[str, list[AccuracyPoint]] = {}
    for (_, shots, calibration), chosen in cells(runs).items():
        cell = summarise_cell(chosen)
        dots = tuple(by_seed(chosen).values()) if cell["sd"] is not None else ()
        lines.setdefault(calibration, []).append(
            AccuracyPoint(shots, cell["mean"], cell["ci95"][0], cell["ci95"][1], dots)
        )
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


def over_text(cell: Run, run: Run) -> str:
    """How many of what an interval is over."""
    return f"{cell['num_seeds']} seeds" if cell["over"] == "seeds" else f"{run['num_examples']:,} examples"


def shots_text(runs: Sequence[Run]) -> str:
    """The requested number of demonstrations; where they did not fit, the fewest that did, such as ``12 of 16``."""
    fitted, shots = min(run["shots_fitted"] for run in runs), runs[0]["shots"]
    return str(shots) if fitted == shots else f"{fitted} of {shots}"


def _confusions(runs: Sequence[Run], labels: Sequence[str] | None) -> dict[str, Any]:
    """{caption: panel} at the most shots: the first calibration, and the most accurate of the others if it is
    better."""
    if labels is None or runs[0]["confusion"] is None:
        return {}
    most = max(run["shots"] for run in runs)
    groups = {cell[2]: chosen for cell, chosen in cells([run for run in runs if run["shots"] == most]).items()}
    first = next(iter(groups))
    best = max(groups, key=lambda name: summarise_cell(groups[name])["mean"])
    panels = {}
    for name in dict.fromkeys((first, best)):
        counts = np.sum([run["confusion"] for run in groups[name]], axis=0).tolist()
        caption = f"Predictions for each gold class of {runs[0]['dataset']}, in percent of its examples; "
        caption += f"{most} shots, calibration {name}"
        caption += f", {len(groups[name])} runs together." if len(groups[name]) > 1 else "."
        panels[caption] = confusion_panel(
            counts, [label.strip() for label in labels], f"{runs[0]['dataset']}, {most} shots, {name}"
        )
    return panels


def _runs_table(runs: Sequence[Run]) -> Table:
    return Table.of(
        [
            {
                "dataset": run["dataset"],
                "shots": shots_text([run]),
                "seed": str(run["seed"]),
                "order": str(run["order"]),
                "calibration": run["calibration"],
                CHOICE.title: percent(run[CHOICE.metric]),
                "95% over examples": interval_text(run["ci95"]),
                **{title: _mean([run[metric]]) for metric, title in CHOICE.others.items()},
                "examples": f"{run['num_examples']:,}",
                "tokens of demonstrations": f"{run.get('prefix_tokens', 0):,}",
                "seconds": f"{run.get('seconds', 0.0):.1f}",
            }
            for chosen in cells(runs).values()
            for run in chosen
        ]
    )


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
