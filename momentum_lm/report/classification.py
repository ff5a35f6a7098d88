"""Results of in-context classification as tables, figures, page and TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from momentum_lm.files import file_stem
from momentum_lm.results.records import SAMPLES, read_samples
from momentum_lm.studies.classification_summary import Run, baseline, by_seed, cells, summarise_cell
from momentum_lm.studies.tasks import CHOICE

from .figures import AccuracyPoint, accuracy_panel, confusion_panel, draw, to_svg
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
    Prompt,
    Reference,
    Verdict,
)  # fmt: skip
from .skeleton import Folder, Report, Sections, read_runs
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "icl_classification"
INTERVALS = (
    "Accuracy is the mean over draws of demonstrations (seeds), the orders of one draw averaged first. Its 95% "
    "interval is Student's over draws: what other demonstrations would give on these examples (with --fresh-queries: "
    "on others). Where nothing is drawn (0 shots), where there is one draw, and where all draws agree, it is Wilson's "
    "over examples: what other examples would give."
)
_TERMS = {
    "Shots": "demonstrations (solved examples) in the prompt, before the example that is asked about.",
    "Accuracy": "share of examples whose right answer got the highest score.",
    "Macro-F1": "F1 of each class, averaged over the classes that occur: unlike accuracy it counts rare classes as "
    "much.",
    "Baseline": "what needs no model: always giving the most frequent label of the evaluated examples, or guessing "
    "where every example has its own choices. A setting beats it if its whole interval lies above.",
    "Calibration": "what is taken off the scores before they are compared. none: nothing. contextual: those after "
    "inputs without content (arXiv 2102.09690). domain_pmi: those after a premise alone (arXiv 2104.08315). batch: "
    "the mean over the evaluated examples, whose labels it does not need (arXiv 2309.17249).",
    "Interval": INTERVALS,
}


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
                "range of draws": f"{percent(cell['min'])} to {percent(cell['max'])}" if cell["sd"] is not None else "",
            }
        )
    return Table.of(rows)


def _mean(values: Sequence[float | None]) -> str:
    """In percent, of what there is."""
    known = [value for value in values if value is not None]
    return percent(float(np.mean(known))) if known else ""


def conclusions(runs: Sequence[Run]) -> list[str]:
    """What came out, how sure it is and what could be done next, in sentences."""
    sentences, draws = [], []
    for dataset, chosen in _by_dataset(runs).items():
        settings = {key[1:]: summarise_cell(some) for key, some in cells(chosen).items()}
        name, level = baseline(chosen)
        simple = "always giving the most frequent label" if name == "majority" else "guessing"
        most = max(shots for shots, _ in settings)
        first = most, chosen[0]["calibration"]
        sentences.append(
            f"{dataset}: {_cell_text(first, settings[first])}. {simple.capitalize()} is right in {percent(level)}%, "
            f"so this is {'better' if settings[first]['ci95'][0] > level else 'not shown to be better'}."
        )
        best = max(settings, key=lambda setting: settings[setting]["mean"])
        if best != first:
            sentences.append(
                f"{dataset}: the best of {len(settings)} settings is {_cell_text(best, settings[best])}; the best of "
                "several is partly luck."
            )
        beaten = [setting for setting, cell in settings.items() if cell["ci95"][0] > level]
        if len(settings) > 1:
            lost = [_setting_text(setting) for setting in settings if setting not in beaten]
            rest = f"; not shown for {', '.join(lost)}" if lost else ""
            sentences.append(f"{dataset}: {len(beaten)} of {len(settings)} settings beat the baseline{rest}.")
        draws += [cell["num_seeds"] for (shots, _), cell in settings.items() if shots]
    if draws and min(draws) < 5:
        sentences.append(
            f"Only {_count(min(draws), 'draw')} of demonstrations: accuracy differs much between draws; --seeds "
            "1,2,...,10 would say more."
        )
    if len({run["shots"] for run in runs}) > 1:
        shots = f"{min(run['shots'] for run in runs)},{max(run['shots'] for run in runs)}"
        sentences.append(
            f"Do demonstrations help? momentum-lm report RESULTS --between shots={shots} pairs the answers."
        )
    return [*sentences, *_remarks(runs)]


def _cell_text(setting: tuple[int, str], cell: Run) -> str:
    """Such as ``with 4 shots (calibration none) 70.0% are right (60.1 to 79.9 over 10 draws)``."""
    over = _count(cell["num_seeds"], "draw") if cell["over"] == "seeds" else "examples"
    return (
        f"with {_setting_text(setting)} {percent(cell['mean'])}% are right ({interval_text(cell['ci95'])} over {over})"
    )


def _setting_text(setting: tuple[int, str]) -> str:
    return f"{_count(setting[0], 'shot')} (calibration {setting[1]})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _remarks(runs: Sequence[Run]) -> list[str]:
    """Demonstrations that did not fit, and examples that both splits have."""
    sentences = []
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
    samples = _samples(folder / SAMPLES)
    sections: Sections = {"": [Verdict(conclusions(runs))]}
    for dataset, chosen in _by_dataset(runs).items():
        save(f"accuracy-{file_stem(dataset)}", _accuracy_figure(chosen))
        parts: list[Part] = [_forest(chosen), _curves(chosen)]
        panels = _confusions(chosen, results["config"]["datasets"][dataset]["labels"])
        if panels:
            side = max(3.2, 1.6 + 0.42 * len(chosen[0]["confusion"]))
            size = (side + 1.1, side)
            save(f"confusion-{file_stem(dataset)}", draw(*panels.values(), size=size))
            pictures = [Picture(to_svg(draw(panel, size=size)), text) for text, panel in panels.items()]
            parts.append(Folded("Which labels are taken for which", [Gallery(pictures)]))
        sections[dataset] = parts
    if samples:
        shown = next((i for i, (shots, _, _) in enumerate(samples) if shots), 0)
        _, line, prompt = samples.pop(shown)
        rest = [Folded(other, [part]) for _, other, part in samples]
        sections["A prompt as the model saw it"] = [
            Paragraph(f"{line}. The answers that were scored after it are marked, the right one ticked."), prompt, *rest
        ]  # fmt: skip
    sections["What the words mean"] = [Definitions(_TERMS)]
    sections["All numbers"] = [
        Folded(f"{len(cells(runs))} settings", [results_table(runs)]),
        Folded(f"{len(runs)} runs", [_runs_table(runs)]),
    ]
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
    """Conclusions, numbers and curves of a results folder, for a page that shows other things too. Raises as
    ``write_report``."""
    (results,) = read_runs([folder], [TASK])
    runs = results["runs"]
    parts: list[Part] = [Points(conclusions(runs))]
    for chosen in _by_dataset(runs).values():
        parts += [_forest(chosen), _curves(chosen)]
    return [*parts, Folded("As a table", [results_table(runs)]), Folded("What the words mean", [Definitions(_TERMS)])]


def _by_dataset(runs: Sequence[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run["dataset"] for run in runs)
    return {name: [run for run in runs if run["dataset"] == name] for name in names}


def _forest(runs: Sequence[Run]) -> Forest:
    """Accuracy of each setting of one data set, and what needs no model."""
    name, level = baseline(runs)
    dots = []
    for (_, _, calibration), chosen in cells(runs).items():
        cell = summarise_cell(chosen)
        singles = tuple(by_seed(chosen).values()) if cell["sd"] is not None else ()
        label = f"{shots_text(chosen)} shots, {calibration}"
        dots.append(Dot(label, cell["mean"], cell["ci95"], over_text(cell, chosen[0]), singles))
    what = "always the most frequent label" if name == "majority" else "guessing"
    return Forest(
        f"Accuracy on {runs[0]['dataset']}", dots, "by number of shots and calibration.",
        Reference(f"{what}, {percent(level)}%", level), percent=(1, "%"), unit="accuracy (%)",
    )  # fmt: skip


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
    return draw(accuracy_panel(points(runs), runs[0]["dataset"], baseline(runs), "calibration"), size=(4.3, 4.0))


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
    return f"{cell['num_seeds']} draws" if cell["over"] == "seeds" else f"{run['num_examples']:,} examples"


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


def _samples(path: Path) -> list[tuple[int, str, Prompt]]:
    """The prompts that the study kept: number of shots, what it is a prompt of, and itself with what was scored after
    it. Raises UserError for a damaged file."""
    if not path.exists():
        return []
    found = []
    for sample in read_samples(path):
        shots = sample["shots"]
        line = f"{sample['dataset']}, {_count(shots, 'shot')}" + (f", seed {sample.get('seed')}" if shots else "")
        found.append((shots, line, Prompt(sample["prompt"], sample["continuations"], sample["gold"])))
    return found
