"""Perplexity results as tables, figures and pages, alone and side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.statistics import PairedDifference, paired_bootstrap
from momentum_lm.errors import UserError
from momentum_lm.files import NPZ_ERRORS, file_stem, read_arrays
from momentum_lm.results.schema import IclScore, PerplexityRun, PositionLoss

from . import skeleton
from .figures import draw, perplexity_panel, position_panel, to_svg
from .html import Dot, Forest, Paragraph, Part, Picture, Reference, Verdict
from .skeleton import Folder, Report, Sections, differ
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

TASK = "lm_perplexity"
_PROTOCOL = (
    "Perplexity is the exponential of the mean loss per token. The documents of a split, one after another, are cut "
    "into blocks of the context length; each block is scored without what came before it, and every token once. "
    "Intervals: 95%, bootstrap over documents: what other text of the kind would give, not other trainings."
)
_PACKED = "No document of a block sees another, so that a token late in a block may have little context."
_ICL_SCORE = (
    "ICL score: loss around the 500th token of a block less loss around the 50th (nats a token, twenty tokens each; "
    "Olsson et al., arXiv 2209.11895): negative where more context helps. A model that is better at the 50th token "
    "already has less to gain: read it beside the losses. Intervals: 95% over blocks, which count as independent, also "
    "those of one document, so that they may be too narrow."
)


def results_table(runs: Sequence[PerplexityRun]) -> Table:
    """One row for each finished run of a results file."""
    ordered = sorted(runs, key=lambda run: (run["split"], run["context_length"]))
    scores = any(map(_score, ordered))
    return Table.of([_cells(run) | (_score_cell(run) if scores else {}) | _sizes(run) for run in ordered])


def _cells(run: PerplexityRun, **names: str) -> dict[str, str]:
    """A run's numbers by their headings."""
    return {
        "split": run["split"],
        "context": str(run["context_length"]),
        **names,
        "perplexity": f"{run['perplexity']:.2f}",
        "95% interval": "" if run["ci95"] is None else f"{run['ci95'][0]:.2f} to {run['ci95'][1]:.2f}",
        "bits/byte": "" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.4f}",
    }


def _score(run: PerplexityRun) -> IclScore | None:
    """None where blocks are too short, and of runs from before it was measured."""
    return run.get("icl_score")


def _score_cell(run: PerplexityRun) -> dict[str, str]:
    score = _score(run)
    return {"ICL score": "" if score is None else _score_text(score)}


def _score_text(score: IclScore) -> str:
    ends = score["ci95"]
    interval = "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
    return f"{score['score']:+.3f}{interval}"


def _sizes(run: PerplexityRun) -> dict[str, str]:
    return {"tokens": f"{run['num_tokens']:,}", "documents": f"{run['num_documents']:,}"}


def _sections(folder: Path, results: dict[str, Any], save: Callable[[str, Figure], None]) -> Sections:
    runs = results["runs"]
    protocol = [Paragraph(_PROTOCOL), *([Paragraph(_ICL_SCORE)] if any(map(_score, runs)) else [])]
    protocol += [Paragraph(_PACKED)] if results["config"].get("packed_documents") else []
    sections: Sections = {"": [Verdict(_conclusions(runs)), results_table(runs), *protocol]}
    name = Path(results["model"]["path"]).name
    for split, points in _series(results["runs"]).items():
        figure = draw(perplexity_panel({name: points}, split))
        save(f"perplexity-{file_stem(split)}", figure)
        if len(points) > 1:
            sections[f"Perplexity on {split}"] = [_picture(figure, split)]
        measured = [run for run in runs if run["split"] == split and run.get("by_position")]
        longest = max(measured, key=lambda run: run["context_length"], default=None)
        if longest and (parts := _by_position({name: longest})):
            sections[f"Loss by position on {split}"] = parts
    return sections


def _conclusions(runs: Sequence[PerplexityRun]) -> list[str]:
    """A sentence for each split, at its longest context."""
    sentences = []
    for split in sorted({run["split"] for run in runs}):
        run = max((run for run in runs if run["split"] == split), key=lambda run: run["context_length"])
        ends = run["ci95"]
        sure = (
            f"95%: {ends[0]:.2f} to {ends[1]:.2f} over {run['num_documents']:,} documents" if ends else "one document"
        )
        bits = "" if run["bits_per_byte"] is None else f", {run['bits_per_byte']:.3f} bits a byte"
        at = f"in blocks of {run['context_length']:,} tokens"
        sentences.append(f"Perplexity on {split} {at}: {run['perplexity']:.2f} ({sure}){bits}.")
    return sentences


def _log(log: TrainingLog, results: dict[str, Any]) -> dict[str, float]:
    """Perplexity over context length."""
    for run in sorted(results["runs"], key=lambda run: run["context_length"]):
        log.scalars({f"{run['split']}/perplexity": run["perplexity"]}, run["context_length"])
        if (score := _score(run)) is not None:
            log.scalars({f"{run['split']}/icl_score": score["score"]}, run["context_length"])
        if run["bits_per_byte"] is not None:
            log.scalars({f"{run['split']}/bits_per_byte": run["bits_per_byte"]}, run["context_length"])
    return {f"{run['split']}/perplexity_at_{run['context_length']}": run["perplexity"] for run in results["runs"]}


write_report = Report(TASK, "Perplexity", results_table, _sections, _log).write


class Comparison(skeleton.Comparison):
    """Perplexities of several results folders.

    A difference comes with its paired bootstrap over documents where both runs scored the same data; where they did
    not, it has none, and perplexities over different tokens must not be compared at all. Raises UserError as its base.
    """

    task, title = TASK, "Perplexity, side by side"

    def __init__(self, folders: Sequence[Folder], names: Sequence[str] | None = None, seed: int = 0) -> None:
        super().__init__(folders, names, seed)
        self.differences: dict[tuple[str, int, str], PairedDifference] = {}  # by split, context length and name
        for index in range(1, len(self.folders)):
            self._compare(index)
        splits = sorted({run["split"] for run in self.results[0]["runs"]})
        self.by_position = {split: self._longest(split) for split in splits}

    def table(self) -> Table:
        """A row for each split, context length and model."""
        runs = [(name, run) for name, results in zip(self.names, self.results, strict=True) for run in results["runs"]]
        runs.sort(key=lambda pair: (pair[1]["split"], pair[1]["context_length"]))
        scores = any(_score(run) for _, run in runs)
        cells = [_cells(run, model=name) | (_score_cell(run) if scores else {}) for name, run in runs]
        differences = [self.differences.get((run["split"], run["context_length"], name)) for name, run in runs]
        rows = [[*row.values(), *difference_cells(gap)] for row, gap in zip(cells, differences, strict=True)]
        return Table([*cells[0], f"vs {self.names[0]}", "95% interval", "p"], rows)

    def reading(self) -> str:
        scores = any(_score(run) for results in self.results for run in results["runs"])
        packed = any(results["config"].get("packed_documents") for results in self.results)
        said = [_PROTOCOL, f"Differences are from {self.names[0]}.", _ICL_SCORE * scores, _PACKED * packed]
        return " ".join(filter(None, said))

    def sections(self) -> Sections:
        series = {name: _series(results["runs"]) for name, results in zip(self.names, self.results, strict=True)}
        found: Sections = {}
        for split in sorted({split for lines in series.values() for split in lines}):
            lines = {name: points[split] for name, points in series.items() if split in points}
            parts: list[Part] = [forest] if (forest := self._forest(split)) else []
            if any(len(points) > 1 for points in lines.values()):
                parts.append(_picture(draw(perplexity_panel(lines, split)), split))
            found[f"Perplexity on {split}"] = parts
            if parts := _by_position(self.by_position.get(split, {})):
                found[f"Loss by position on {split}"] = parts
        return found

    def _longest(self, split: str) -> dict[str, PerplexityRun | None]:
        """By name, the runs at the longest context at which the first folder and most of the others have losses by
        position; None for those that have none there, or scored other data."""
        measured = [
            {run["context_length"]: run for run in results["runs"] if run["split"] == split and run.get("by_position")}
            for results in self.results
        ]
        lengths = [length for runs in measured[1:] for length in runs if length in measured[0]]
        if not lengths:
            return {}
        length = max(lengths, key=lambda length: (lengths.count(length), length))
        first, found = measured[0][length], dict[str, PerplexityRun | None]()
        for name, results, runs in zip(self.names, self.results, measured, strict=True):
            run = runs.get(length)
            alike = run is not None and run["data_sha256"] == first["data_sha256"]
            alike = alike and len(_dictionaries(self.results[0], results)) < 2
            alike = alike and not differ(self.results[0]["config"], results["config"], "packed_documents")
            found[name] = run if alike else None
            if not alike:
                self.notes.append(
                    f"{split}: {name} has no losses by position in blocks of {length:,} tokens of the same data; "
                    "`fairseq-eval --force` measures what an older version did not."
                )
        return found

    def conclusions(self) -> list[str]:
        """A sentence for each folder and split, at the longest context."""
        sentences = []
        for split, name in dict.fromkeys((split, name) for split, _, name in self.differences):
            length = max(at for of, at, who in self.differences if (of, who) == (split, name))
            gap = self.differences[split, length, name]
            change, interval, _ = difference_cells(gap)
            word = "lower" if gap.ratio_high < 1 else "higher" if gap.ratio_low > 1 else "not shown to differ"
            than = f"than that of {self.names[0]}" if word != "not shown to differ" else f"from that of {self.names[0]}"
            sentences.append(
                f"{split}, blocks of {length:,} tokens: the perplexity of {name} is {word} {than}: {change} "
                f"(95%: {interval} over documents; other trainings may differ by more)."
            )
        return sentences

    def _forest(self, split: str) -> Forest | None:
        """Differences from the first folder by context length; None where nothing compares."""
        dots = [
            Dot(f"{name}, {length:,} tokens", gap.ratio - 1, (gap.ratio_low - 1, gap.ratio_high - 1), "documents")
            for (of, length, name), gap in sorted(self.differences.items(), key=lambda item: item[0][1])
            if of == split
        ]
        same = Reference("no difference", 0.0)
        title = f"Perplexity against {self.names[0]}:"
        what = "difference in percent; negative is better."
        return Forest(title, dots, what, same, percent=(2, "%"), signed=True, unit="%") if dots else None

    def _compare(self, index: int) -> None:
        for run in self.results[index]["runs"]:
            key = run["split"], run["context_length"]
            first = next((r for r in self.results[0]["runs"] if (r["split"], r["context_length"]) == key), None)
            if first is None:
                continue
            other = len(_dictionaries(self.results[0], self.results[index])) > 1
            if first["data_sha256"] != run["data_sha256"] or other:
                self.notes.append(
                    f"{run['split']}, context {run['context_length']}: {self.names[0]} and {self.names[index]} scored "
                    f"other data or by another "
                    "dictionary; their perplexities must not be compared."
                )
                continue
            if run["num_documents"] < 2:
                continue
            nll, tokens = document_sums(self.folders[index], run)
            baseline, _ = document_sums(self.folders[0], first)
            self.differences[(*key, self.names[index])] = paired_bootstrap(nll, baseline, tokens, seed=self.seed)


def _dictionaries(*results: Mapping[str, Any]) -> set[str]:
    """Digests of the dictionaries, where they are told."""
    return {r["config"].get("data", {}).get("dictionary_sha256") for r in results} - {None}


def document_sums(folder: Folder, run: PerplexityRun) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(nll, tokens) per document of one run of a results folder, empty documents left out. Raises UserError if the file
    is damaged."""
    path = Path(folder) / str(run["documents"])
    try:
        arrays = read_arrays(path)
        nll, tokens = arrays["nll"], arrays["tokens"]
    except UserError:
        raise
    except NPZ_ERRORS as error:
        raise UserError(f"cannot read {path} ({error}); delete it and run the evaluation again") from error
    plain = nll.ndim == 1 and nll.shape == tokens.shape and nll.dtype.kind == "f" and tokens.dtype.kind in "iu"
    if not plain or not np.isfinite(nll).all() or (tokens < 0).any() or tokens.sum() != run["num_tokens"]:
        raise UserError(
            f"{path} is damaged: it is not a log-likelihood and a number of tokens for each document, "
            f"{run['num_tokens']:,} tokens in all; "
            "delete it and run the evaluation again"
        )
    return nll[tokens > 0], tokens[tokens > 0]


def difference_cells(difference: PairedDifference | None) -> list[str]:
    """Relative difference of perplexity, its interval, and p: three cells, empty without a difference."""
    if difference is None:
        return ["", "", ""]
    low, high = (f"{100 * (ratio - 1):+.2f}%" for ratio in (difference.ratio_low, difference.ratio_high))
    return [f"{100 * (difference.ratio - 1):+.2f}%", f"{low} to {high}", f"{difference.p_value:.2g}"]


def _series(runs: Sequence[PerplexityRun]) -> dict[str, list[tuple[int, float]]]:
    """{split: [(context length, perplexity), ...]}"""
    series: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        series.setdefault(run["split"], []).append((run["context_length"], run["perplexity"]))
    return series


def _by_position(runs: Mapping[str, PerplexityRun | None]) -> list[Part]:
    """A curve and a column for each model's run at one context length; nothing where blocks are so short that there is
    no curve to see, or of runs from before it was measured."""
    some = {name: run.get("by_position", []) if run else [] for name, run in runs.items()}
    parts = {name: found for name, found in some.items() if found}
    if not any(len(found) > 4 for found in parts.values()):
        return []
    length = next(run["context_length"] for run in runs.values() if run)
    title = f"blocks of {length:,} tokens"
    picture = Picture(to_svg(draw(position_panel(some, title))), f"Loss by position in {title}: lower is better.")
    names: dict[int, str] = {}
    for start, end in itertools.pairwise([0, *sorted({part["end"] for some in parts.values() for part in some})]):
        names[end] = str(end) if end - start == 1 else f"{start + 1:,} to {end:,}"
    cells = {name: {part["end"]: _loss_text(part) for part in some} for name, some in parts.items()}
    table = Table(
        ["tokens of a block", *parts],
        [[names[end], *(column.get(end, "") for column in cells.values())] for end in names],
        "Mean loss, nats a token (95% over blocks)",
    )
    return [picture, table]


def _loss_text(part: PositionLoss) -> str:
    ends = part["ci95"]
    return f"{part['loss']:.3f}" + ("" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})")


def _picture(figure: Figure, split: str) -> Picture:
    return Picture(to_svg(figure), f"Perplexity on {split} at each context length.")
