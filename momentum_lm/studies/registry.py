"""The studies: what ``fairseq-eval --task NAME`` measures and ``momentum-lm report`` shows and compares.

A new study is an entry here, its modules, and the types of what it records in ``results/schema.py``.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momentum_lm.results.schema import RECORDS


@dataclass(frozen=True)
class Study:
    """One study. Its modules are named here and imported when they are used: so ``--help`` needs no torch, and pages may
    be made of what this room does not import.

    ``text`` and ``example`` are for ``fairseq-eval --help``. ``flags``: a module with ``add_arguments(parser)`` and
    ``run(args, command)``, which measures and returns whether this process is the one that writes. ``summary``: a
    function of the runs that gives the ``summary`` of results.json, as ``module:function``; empty for none. ``report``: a
    module with ``write_report(folder, replace)``, for table, page, pictures and TensorBoard events. ``comparison``: a
    :class:`momentum_lm.report.skeleton.Comparison`, as ``module:class``; with ``between`` it compares settings of one
    folder too.
    """

    name: str
    text: str
    example: str
    flags: str
    report: str
    comparison: str
    summary: str = ""
    between: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """The entries of a run that tell it from the others in a folder."""
        return RECORDS[self.name].key

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the study's flags."""
        importlib.import_module(self.flags).add_arguments(parser)

    def run(self, args: argparse.Namespace, command: str) -> bool:
        """Measures what the flags say; whether this process is the one that writes. Raises UserError for impossible ones."""
        return bool(importlib.import_module(self.flags).run(args, command))

    def summarise(self, runs: Sequence[Any]) -> Any:
        """The ``summary`` of the runs; None where the study has none."""
        module, _, function = self.summary.partition(":")
        return getattr(importlib.import_module(module), function)(runs) if module else None

    def write_report(self, folder: str | os.PathLike[str], replace: bool = False) -> Any:
        """Writes page, pictures and events beside results.json; returns the table. Raises UserError for other results."""
        return importlib.import_module(self.report).write_report(folder, replace)

    def compare(self, folders: Sequence[str | os.PathLike[str]], seed: int = 0, between: str | None = None) -> Any:
        """Results folders, or settings ``between`` which there is a difference, side by side. Raises UserError for what does
        not compare."""
        module, _, name = self.comparison.partition(":")
        varied = {} if between is None else {"between": between}
        return getattr(importlib.import_module(module), name)(folders, seed=seed, **varied)


_STUDIES = (
    Study(
        "lm_perplexity",
        "perplexity on binarised text at several context lengths",
        "data/reviews --path checkpoints/checkpoint_best.pt \\\n      --context-lengths 256,512,1024 --results-dir results/perplexity",
        flags="momentum_lm.cli.eval_perplexity",
        report="momentum_lm.report.perplexity",
        comparison="momentum_lm.report.perplexity:Comparison",
    ),
    Study(
        "icl_classification",
        "in-context classification of labelled data",
        "--hf-model gpt2 --datasets mr,trec --shots 0,4,16 \\\n      --seeds 1,2,3 --calibration none,batch --results-dir results/icl",
        flags="momentum_lm.cli.eval_classification",
        report="momentum_lm.report.classification",
        comparison="momentum_lm.report.classification_comparison:ClassificationComparison",
        between=True,
        summary="momentum_lm.studies.classification_summary:summary",
    ),
    Study(
        "icl_finetune_analysis",
        "whether in-context learning does what finetuning does",
        "--hf-model gpt2 --datasets mr --shots 16 --seeds 1,2,3 \\\n      --sampling balanced --results-dir results/analysis",
        flags="momentum_lm.cli.eval_finetune_analysis",
        report="momentum_lm.report.icl_vs_finetuning",
        comparison="momentum_lm.report.finetuning_comparison:FinetuningComparison",
        summary="momentum_lm.studies.finetuning_summary:summary",
    ),
)
STUDIES = {study.name: study for study in _STUDIES}
