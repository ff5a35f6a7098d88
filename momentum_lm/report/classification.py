"""Results of in-context classification as tables, figures, page and TensorBoard events."""

from __future__ import annotations

import os
import shlex
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
from .tables import Table, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "icl_classification"
INTERVALS = (
    "Accuracy is the mean over draws, the orders of one draw's demonstrations averaged first. Its 95% interval is "
    "Student's over draws: what other draws would give. For one draw, where all draws agree, and with 0 shots unless "
    "each draw has examples of its own, it is Wilson's over examples: what other examples would give."
)
_TERMS = {
    "Shots": "demonstrations (solved examples) in the prompt, before the example to be classified.",
    "Draw": "one random choice of demonstrations, and with --fresh-queries of the examples to be classified: a seed.",
    "Accuracy": "share of examples whose right answer got the highest score.",
    "Macro-F1": "F1 of each class, averaged over the classes that occur: it counts rare classes as much as common "
    "ones.",
    "Baseline": "what needs no model: always giving the most frequent label of the evaluated examples (majority), or "
    "guessing where every example has its own choices (chance). A setting beats it if its whole interval lies above.",
    "Calibration": "what is subtracted from the log-probabilities before they are compared. none: nothing. "
    "contextual: those after inputs without content (arXiv 2102.09690). domain_pmi: those after a premise alone "
    "(arXiv 2104.08315). batch: the logarithm of the mean prediction over the evaluated examples, whose labels it "
    "does not need (arXiv 2309.17249).",
    "Interval": INTERVALS,
}
_MANY = 3  # data sets, from whose number on each one's sentences stand under its own heading


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


def conclusions(runs: Sequence[Run], folder: Folder = "RESULTS") -> list[str]:
    """What came out of the results in ``folder``, how sure it is and what could be done next, in sentences."""
    groups = _by_dataset(runs)
    sentences = []
    for dataset, chosen in groups.items():
        sentences += _conclusions_on(dataset, chosen, folder)
    return [*sentences, *_remarks(runs)]


def _headline(runs: Sequence[Run], folder: Folder) -> list[str]:
    """:func:`conclusions`; for many data sets how many of them beat their baselines."""
    groups = _by_dataset(runs)
    if len(groups) <= _MANY:
        return conclusions(runs, folder)
    better = 0
    for chosen in groups.values():
        some = next(iter(_settings(chosen, max(run["shots"] for run in chosen)).values()))
        better += summarise_cell(some)["ci95"][0] > baseline(some)[1]
    return [
        f"With the most shots, the first calibration beats the baseline on {better} of {len(groups)} data sets; each "
        "data set's own conclusions stand under its name.",
        *_remarks(runs),
    ]


def _settings(runs: Sequence[Run], shots: int | None = None) -> dict[tuple[int, str], list[Run]]:
    """The runs of one data set by shots and calibration."""
    return {key[1:]: some for key, some in cells(runs).items() if shots in (None, key[1])}


def _conclusions_on(dataset: str, runs: Sequence[Run], folder: Folder) -> list[str]:
    """Of one data set."""
    settings = _settings(runs)
    summaries = {setting: summarise_cell(some) for setting, some in settings.items()}
    most, fewest = (end(shots for shots, _ in settings) for end in (max, min))
    first = next(setting for setting in settings if setting[0] == most)
    cell, (name, level) = summaries[first], baseline(settings[first])
    simple = "Always giving the most frequent label" if name == "majority" else "Guessing"
    word = "better" if cell["ci95"][0] > level else "worse" if cell["ci95"][1] < level else "not shown to be better"
    sentences = [
        f"{dataset}: with {_setting_text(settings[first])} {_share_text(cell, settings[first][0])}. {simple} is right "
        f"about {percent(level)}%: this is {word}."
    ]
    best = max(settings, key=lambda setting: summaries[setting]["mean"])
    if summaries[best]["mean"] > cell["mean"]:
        sentences.append(
            f"{dataset}: in the best of {len(settings)} settings, {_setting_text(settings[best])}, "
            f"{_share_text(summaries[best], settings[best][0])}. The best of several is partly luck."
        )
    if len(settings) > 1:
        lost = [_setting_text(some) for setting, some in settings.items()
                if summaries[setting]["ci95"][0] <= baseline(some)[1]]  # fmt: skip
        rest = f"; not shown for {', '.join(lost)}" if lost and len(lost) <= 6 else ""
        sentences.append(f"{dataset}: {len(settings) - len(lost)} of {len(settings)} settings beat the baseline{rest}.")
    draws = [summaries[setting]["num_seeds"] for setting in settings if setting[0]]
    if draws and min(draws) == 1:
        sentences.append(
            f"{dataset}: one draw cannot show how much accuracy depends on the demonstrations; --seeds 1,2,...,10 can."
        )
    if fewest == 0 < most:
        command = f"momentum-lm report {shlex.quote(os.fspath(folder))} --between shots=0,{most}"
        sentences.append(f"Do demonstrations help on {dataset}? `{command}` pairs the answers and says.")
    return sentences


def _share_text(cell: Run, run: Run) -> str:
    """Such as ``70.0% of the examples are classified right (95%: 60.1 to 79.9 over 10 draws)``."""
    ends = f"95%: {interval_text(cell['ci95'])} over {over_text(cell, run)}"
    return f"{percent(cell['mean'])}% of the examples are classified right ({ends})"


def _setting_text(runs: Sequence[Run]) -> str:
    """Such as ``4 shots (calibration batch)``."""
    return f"{_with_noun(runs)} (calibration {runs[0]['calibration']})"


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
    sections: Sections = {"": [Verdict(_headline(runs, folder))]}
    groups = _by_dataset(runs)
    for dataset, chosen in groups.items():
        save(f"accuracy-{file_stem(dataset)}", _accuracy_figure(chosen))
        parts: list[Part] = [Points(_conclusions_on(dataset, chosen, folder))] if len(groups) > _MANY else []
        parts += [_forest(chosen), _curves(chosen)]
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
        Folded(counted(len(cells(runs)), "setting"), [results_table(runs)]),
        Folded(counted(len(runs), "run"), [_runs_table(runs)]),
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
    parts: list[Part] = [Points(conclusions(runs, folder))]
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
        label = f"{_with_noun(chosen)}, {calibration}"
        dots.append(Dot(label, cell["mean"], cell["ci95"], over_text(cell, chosen[0]), singles))
    what = "always the most frequent label (majority)" if name == "majority" else "guessing (chance)"
    return Forest(
        f"Accuracy on {runs[0]['dataset']}", dots, "by shots and calibration.",
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
    caption = f"Accuracy on {runs[0]['dataset']}: mean and 95% interval for each calibration; faint dots are draws."
    return Picture(to_svg(_accuracy_figure(runs)), caption)


def percent(value: float) -> str:
    """A fraction in percent, such as ``62.5``, without the sign."""
    return f"{100 * value:.1f}"


def interval_text(ci95: Sequence[float]) -> str:
    """The ends of an interval of fractions, in percent."""
    return f"{percent(ci95[0])} to {percent(ci95[1])}"


def over_text(cell: Run, run: Run) -> str:
    """How many of what an interval is over."""
    return counted(cell["num_seeds"], "draw") if cell["over"] == "seeds" else counted(run["num_examples"], "example")


def shots_text(runs: Sequence[Run]) -> str:
    """The requested number of demonstrations; where they did not fit, the fewest that did, such as ``12 of 16``."""
    fitted, shots = min(run["shots_fitted"] for run in runs), runs[0]["shots"]
    return str(shots) if fitted == shots else f"{fitted} of {shots}"


def _with_noun(runs: Sequence[Run]) -> str:
    """Such as ``1 shot`` or ``12 of 16 shots``."""
    return f"{shots_text(runs)} shot{'' if runs[0]['shots'] == 1 else 's'}"


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
        line = f"{sample['dataset']}, {counted(shots, 'shot')}" + (f", seed {sample.get('seed')}" if shots else "")
        found.append((shots, line, Prompt(sample["prompt"], sample["continuations"], sample["gold"])))
    return found
