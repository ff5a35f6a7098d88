"""ICL against finetuning side by side: the summaries of several results folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from momentum_lm.studies import finetuning_summary as numbers
from momentum_lm.studies.finetuning_summary import EVIDENCE, MEANINGS, METRICS, SETTINGS, Estimate, Run

from .figures import draw, to_svg
from .finetuning_verdicts import number, place, signed
from .html import Forest, Gallery, Picture, Reference
from .icl_vs_finetuning import TASK, UNITS, accuracies, estimate_dot, metric_panel
from .layer_figures import Curve
from .skeleton import Comparison, Folder, Sections, differ
from .tables import Table, counted

_READING = (
    "Numbers are means over layers, then over seeds, with Student's 95% intervals over seeds; for one seed, and where "
    "all seeds agree, "
    "over examples. Metrics are in the corrected form unless the heading says otherwise. Differences are paired by "
    "seed where both "
    "results have the same demonstrations and examples under it; one whose interval leaves out 0 would be rare if "
    "there were none."
)

_THE_SAME = ("demonstrations", "num_examples")  # what two runs of a seed must have in common to be a pair


class FinetuningComparison(Comparison):
    """The summaries of ``folders`` beside each other. Raises UserError as its base."""

    task, title = TASK, "In-context learning against finetuning, side by side"

    def __init__(self, folders: Sequence[Folder], names: Sequence[str] | None = None, seed: int = 0) -> None:
        super().__init__(folders, names, seed)
        self.sides = [numbers.settings(results["runs"]) for results in self.results]
        self.settings = list(dict.fromkeys(setting for side in self.sides for setting in side))
        self.notes = list(self._notes())

    def table(self) -> Table:
        """A row for each dataset, number of shots and folder."""
        return Table.of(
            [
                {
                    "dataset": dataset,
                    "shots": str(shots),
                    "results": name,
                    "seeds": str(len(runs)),
                    "examples": f"{runs[0]['num_examples']:,}",
                    **accuracies(runs),
                    "Rec2FTP": number(numbers.rec2ftp(runs), percent=True) or "nothing to recover",
                    "SimAOU, authors' form": number(numbers.metric(runs, "simaou", "paper")),
                    **{METRICS[metric]: number(numbers.metric(runs, metric)) for metric in EVIDENCE},
                }
                for dataset, shots in self.settings
                for name, side in zip(self.names, self.sides, strict=True)
                if (runs := side.get((dataset, shots)))
            ]
        )

    def differences(self) -> Table | None:
        """Each folder minus the first, paired by seed, with Student's 95% intervals; None where no two runs pair."""
        rows = []
        for (dataset, shots, name), (pairs, gaps) in self._gaps().items():
            row = {"dataset": dataset, "shots": str(shots), "difference": f"{name} minus {self.names[0]}"}
            row["seeds"] = str(pairs)
            rows.append(row | {title: signed(gap, title in SETTINGS.values()) for title, gap in gaps.items()})
        return Table.of(rows) if rows else None

    def conclusions(self) -> list[str]:
        """A sentence for each setting and folder: which differences leave out 0."""
        sentences = []
        for (dataset, shots, name), (pairs, gaps) in self._gaps().items():
            known = {title: gap for title, gap in gaps.items() if gap["num"]}
            clear = {title: gap for title, gap in known.items() if place(gap) in ("above", "below")}
            told = [f"{title} {signed(gap, title in SETTINGS.values())}" for title, gap in clear.items()]
            others = f". Not shown to differ: {', '.join(title for title in known if title not in clear)}"
            sentences.append(
                f"{dataset}, {counted(shots, 'shot')}, {name} minus {self.names[0]} ({counted(pairs, 'draw')}): "
                f"{'; '.join(told) or 'nothing is shown to differ'}"
                f"{others if told and len(clear) < len(known) else ''}."
            )
        return sentences

    def _gaps(self) -> dict[tuple[str, int, str], tuple[int, dict[str, Estimate]]]:
        """By setting and folder the number of pairs of seeds, and what accuracies and metrics differ from the first
        folder's by."""
        found = {}
        for dataset, shots in self.settings:
            first = {run["seed"]: run for run in self.sides[0].get((dataset, shots), [])}
            for name, side in zip(self.names[1:], self.sides[1:], strict=True):
                pairs = [(first[run["seed"]], run) for run in side.get((dataset, shots), []) if run["seed"] in first]
                pairs = [pair for pair in pairs if _alike(*pair)]
                if not pairs:
                    continue
                gaps = {
                    title: numbers.estimate([b["accuracy"][key] - a["accuracy"][key] for a, b in pairs])
                    for key, title in SETTINGS.items()
                }
                gaps |= {METRICS[key]: numbers.estimate([_gap(a, b, key) for a, b in pairs]) for key in EVIDENCE}
                found[dataset, shots, name] = len(pairs), gaps
        return found

    def tables(self) -> list[Table]:
        differences = self.differences()
        return [self.table(), *([differences] if differences else [])]

    def reading(self) -> str:
        return _READING

    def sections(self) -> Sections:
        found: Sections = {}
        for dataset, shots in self.settings:
            runs = {
                n: side[dataset, shots]
                for n, side in zip(self.names, self.sides, strict=True)
                if (dataset, shots) in side
            }
            forests = [forest for name in EVIDENCE if (forest := _forest(name, runs))]
            pictures = [self._picture(dataset, shots, name) for name in EVIDENCE]
            found[f"{dataset}, {counted(shots, 'shot')}"] = [
                *forests,
                Gallery([picture for picture in pictures if picture]),
            ]
        return found

    def _picture(self, dataset: str, shots: int, name: str) -> Picture | None:
        lines = {}
        for look, (title, side) in enumerate(zip(self.names, self.sides, strict=True)):
            band = numbers.bands(side[dataset, shots], name, "corrected") if (dataset, shots) in side else None
            if band is not None:
                lines[title] = Curve(band[0], band[1], band[2], look)
        if not lines:
            return None
        return Picture(
            to_svg(draw(metric_panel(name, lines))),
            f"{METRICS[name]}, corrected, by layer; band: 95% interval of {next(iter(lines))}.",
        )

    def _notes(self) -> list[str]:
        """Settings that not every folder has, and those of other seeds or numbers of examples."""
        notes = []
        for setting in self.settings:
            where = f"{setting[0]}, {setting[1]} shots"
            found = {name: side[setting] for name, side in zip(self.names, self.sides, strict=True) if setting in side}
            missing = [name for name in self.names if name not in found]
            if missing:
                notes.append(f"{where}: not in {' and '.join(missing)}.")
            for name, runs in found.items():
                first = {run["seed"]: run for run in self.sides[0].get(setting, [])}
                other = sum(run["seed"] in first and not _alike(first[run["seed"]], run) for run in runs)
                if other:
                    notes.append(
                        f"{where}: {other} of the seeds of {self.names[0]} and {name} have other demonstrations or "
                        f"examples and are not paired."
                    )
            if len({tuple((run["seed"], run["num_examples"]) for run in runs) for runs in found.values()}) > 1:
                notes.append(f"{where}: not all of the same seeds and numbers of examples.")
        return notes


def _forest(name: str, runs: Mapping[str, Sequence[Run]]) -> Forest | None:
    """A metric of each folder; None where no folder has it."""
    values = {title: numbers.metric(chosen, name) for title, chosen in runs.items()}
    dots = [estimate_dot(title, value) for title, value in values.items() if value["num"]]
    unit = UNITS.get(name, "cosine")
    return Forest(f"{METRICS[name]}:", dots, MEANINGS[name], Reference("0", 0.0), unit=unit) if dots else None


def _alike(first: Run, second: Run) -> bool:
    """Whether two runs of a seed are a pair: of the same demonstrations and examples, by their texts where both records
    say them."""
    same = all(json.dumps(first.get(key)) == json.dumps(second.get(key)) for key in _THE_SAME)
    return same and not any(differ(first, second, key) for key in ("examples_sha256", "demonstrations_sha256"))


def _gap(first: Run, second: Run, name: str) -> float | None:
    """What a corrected metric is higher in the second run; None where one has no value."""
    a, b = numbers.over_layers(first, name), numbers.over_layers(second, name)
    return None if a is None or b is None else b - a
