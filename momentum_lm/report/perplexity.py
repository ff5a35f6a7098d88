"""Perplexity results as tables, figures and pages, alone and side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.statistics import PairedDifference, paired_bootstrap
from momentum_lm.errors import UserError
from momentum_lm.files import NPZ_ERRORS, file_stem, read_arrays

from .common import read_runs, replace_events, short_names
from .figures import draw, perplexity_panel, save_png, to_svg
from .html import Code, Paragraph, Part, Picture, Points, write_page
from .tables import Table

if TYPE_CHECKING:
    from .tensorboard import TrainingLog

TASK = "lm_perplexity"
_PROTOCOL = (
    "The documents of a split, one after another, are cut into blocks of the context length; each block is scored without what came "
    "before it, and every token once. Intervals: 95%, bootstrap over documents."
)


def results_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each finished run of a results file."""
    rows = [
        [
            run["split"],
            str(run["context_length"]),
            f"{run['perplexity']:.2f}",
            _interval(run["ci95"]),
            "" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.4f}",
            f"{run['num_tokens']:,}",
            f"{run['num_documents']:,}",
        ]
        for run in sorted(runs, key=lambda run: (run["split"], run["context_length"]))
    ]
    return Table(["split", "context", "perplexity", "95% interval", "bits/byte", "tokens", "documents"], rows)


def write_report(folder: str | os.PathLike[str], replace: bool = False) -> Table:
    """Writes ``report.html``, ``perplexity-<split>.png`` and TensorBoard events beside a ``results.json``; returns its
    table. Raises UserError for results of other tasks or without a finished run, and for files of these names that are
    not ours, unless ``replace``."""
    folder = Path(folder)
    (results,) = read_runs([folder], [TASK])
    table = results_table(results["runs"])
    sections: dict[str, Sequence[Part]] = {"": [Paragraph(f"Model: {results['model']['path']}"), table, Paragraph(_PROTOCOL)]}
    for split, points in _series(results["runs"]).items():
        figure = draw(perplexity_panel({Path(results["model"]["path"]).name: points}, split))
        save_png(figure, folder / f"perplexity-{file_stem(split)}.png", replace)
        sections[f"Perplexity on {split}"] = [Picture(to_svg(figure), f"Perplexity on {split} at each context length.")]
    details = {name: results[name] for name in ("model", "config")}
    sections["What was measured"] = [Code(json.dumps(details, indent=1, ensure_ascii=False))]
    write_page(folder / "report.html", "Perplexity", sections, replace)
    _write_events(folder, results)
    return table


class Comparison:
    """Several results folders side by side; differences are from the first.

    A difference comes with its paired bootstrap over documents where both runs scored the same data; where they did
    not, it has none, and perplexities over different tokens must not be compared at all. Raises UserError for folders
    of other tasks, and for those without a finished run.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]], names: Sequence[str] | None = None, seed: int = 0) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.results = read_runs(self.folders, [TASK])
        self.names = list(names) if names else short_names(self.folders)
        self.seed = seed
        self.differences: dict[tuple[str, int, str], PairedDifference] = {}  # by split, context length and name
        self.notes: list[str] = []
        for index in range(1, len(self.folders)):
            self._compare(index)

    def table(self) -> Table:
        """A row for each split, context length and model."""
        rows = []
        keys = sorted({(run["split"], run["context_length"]) for results in self.results for run in results["runs"]})
        for split, length in keys:
            for name, results in zip(self.names, self.results, strict=True):
                run = next((r for r in results["runs"] if (r["split"], r["context_length"]) == (split, length)), None)
                if run is None:
                    continue
                byte = "" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.4f}"
                cells = [split, str(length), name, f"{run['perplexity']:.2f}", _interval(run["ci95"]), byte]
                rows.append(cells + difference_cells(self.differences.get((split, length, name))))
        headings = ["split", "context", "model", "perplexity", "95% interval", "bits/byte", f"vs {self.names[0]}", "95% interval", "p"]
        return Table(headings, rows)

    def write_page(self, path: str | os.PathLike[str]) -> None:
        """One HTML page with the table and a figure for each split."""
        top: list[Part] = [self.table(), Paragraph(_PROTOCOL + f" Differences are from {self.names[0]}.")]
        sections: dict[str, Sequence[Part]] = {"": top + ([Points(self.notes)] if self.notes else [])}
        for split in sorted({run["split"] for results in self.results for run in results["runs"]}):
            series = {n: s[split] for n, r in zip(self.names, self.results, strict=True) if split in (s := _series(r["runs"]))}
            sections[f"Perplexity on {split}"] = [
                Picture(to_svg(draw(perplexity_panel(series, split))), f"Perplexity on {split} at each context length.")
            ]
        sections["Models"] = [Code("\n".join(f"{n}: {r['model']['path']}" for n, r in zip(self.names, self.results, strict=True)))]
        write_page(path, "Perplexity, side by side", sections)

    def _compare(self, index: int) -> None:
        for run in self.results[index]["runs"]:
            key = run["split"], run["context_length"]
            first = next((r for r in self.results[0]["runs"] if (r["split"], r["context_length"]) == key), None)
            if first is None:
                continue
            dictionaries = {
                r["config"].get("data", {}).get("dictionary_sha256") for r in (self.results[0], self.results[index])
            } - {None}
            if first["data_sha256"] != run["data_sha256"] or len(dictionaries) > 1:
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


def document_sums(folder: str | os.PathLike[str], run: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
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


def _interval(ci95: Sequence[float] | None) -> str:
    return "" if ci95 is None else f"{ci95[0]:.2f} to {ci95[1]:.2f}"


def _series(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{split: [(context length, perplexity), ...]}"""
    series: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        series.setdefault(run["split"], []).append((run["context_length"], run["perplexity"]))
    return series


def _write_events(folder: Path, results: Mapping[str, Any]) -> None:
    """TensorBoard events of all runs: perplexity over context length."""

    def write(log: TrainingLog) -> None:
        for run in sorted(results["runs"], key=lambda run: run["context_length"]):
            log.scalars({f"{run['split']}/perplexity": run["perplexity"]}, run["context_length"])
            if run["bits_per_byte"] is not None:
                log.scalars({f"{run['split']}/bits_per_byte": run["bits_per_byte"]}, run["context_length"])
        log.hparams_with_metrics({f"{r['split']}/perplexity_at_{r['context_length']}": r["perplexity"] for r in results["runs"]}, 0)

    replace_events(
        folder,
        {
            "model": results["model"]["path"],
            "dtype": results["config"].get("dtype"),
            **results["model"].get("architecture", {}),
        },
        write,
    )
