"""Perplexities of several trainings of each model on the same text, compared over its documents and over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentum_lm.analysis.statistics import paired_bootstrap, t_interval
from momentum_lm.report.perplexity import document_sums
from momentum_lm.results.records import read_results
from momentum_lm.results.schema import PerplexityRun


@dataclass(frozen=True)
class RunOnText:
    """One trained model on one split at one context length: its record, and of each document the negative
    log-likelihood (nats) and the tokens, (n,) each."""

    record: PerplexityRun
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path, split: str, length: int) -> RunOnText:
        """Out of what ``fairseq-eval --task lm_perplexity`` left in a folder. Raises UserError for damaged files."""
        records = read_results(folder)["runs"]
        record = next(r for r in records if (r["split"], r["context_length"]) == (split, length))
        return cls(record, *document_sums(folder, record))


def average(runs: Sequence[RunOnText]) -> dict[str, Any]:
    """Perplexity of a model: the geometric mean over its runs, and that of each."""
    values = [run.record["perplexity"] for run in runs]
    bits = [run.record["bits_per_byte"] for run in runs]
    known = [value for value in bits if value is not None]
    return {
        "perplexity": math.exp(float(np.mean(np.log(values)))),
        "by_seed": values,
        "bits_per_byte": float(np.mean(known)) if len(known) == len(bits) else None,
    }


def difference(runs: Sequence[RunOnText], baseline: Sequence[RunOnText]) -> dict[str, Any]:
    """How much more (positive) or less (negative) surprised ``runs`` are than ``baseline``, seed by seed.

    ``difference``: :class:`PairedDifference` of the means over seeds, over documents; ``ratio_by_seed``: of the
    perplexities; ``ratio_ci95_over_seeds``: Student's interval, None for one seed.
    """
    tokens = runs[0].tokens
    ours, theirs = (np.mean([run.nll for run in some], axis=0) for some in (runs, baseline))
    by_seed = [float((a.nll - b.nll).sum() / tokens.sum()) for a, b in zip(runs, baseline, strict=True)]
    over_seeds = t_interval(by_seed) if len(by_seed) > 1 else None
    return {
        "difference": vars(paired_bootstrap(ours, theirs, tokens)),
        "ratio_by_seed": [math.exp(gap) for gap in by_seed],
        "ratio_ci95_over_seeds": None if over_seeds is None else [math.exp(over_seeds.low), math.exp(over_seeds.high)],
        "documents": int(tokens.size),
    }
