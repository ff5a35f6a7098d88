"""The studies: what ``fairseq-eval --task NAME`` measures and ``momentum-lm report`` shows and compares.

A new study is an entry here, its modules, and the types of what it records in ``results/schema.py``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Study:
    """One study. Its modules and functions (``module:name``) are named here and imported when they are used: so
    ``--help`` needs no torch, and pages may be made in a room that comes after this one.

    ``text`` and ``example`` are for ``fairseq-eval --help``. ``flags``: a module with ``add_arguments(parser)`` and
    ``run(args, command)``, which measures and returns whether this process is the one that writes. ``summary``: makes
    the ``summary`` of results.json of the runs; empty for none. ``report``: writes page, pictures and TensorBoard
    events beside results.json and returns the table. ``comparison``: a :class:`momentum_lm.report.skeleton.Comparison`;
    with ``between`` it compares settings of one folder too.
    """

    name: str
    text: str
    example: str
    flags: str
    report: str
    comparison: str
    summary: str = ""
    between: bool = False

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the study's flags."""
        resolve_name(self.flags).add_arguments(parser)

    def run(self, args: argparse.Namespace, command: str) -> bool:
        """Measures what the flags say; whether this process is the one that writes. Raises UserError for impossible
        ones."""
        return bool(resolve_name(self.flags).run(args, command))

    def summarise(self, runs: Sequence[Any]) -> Any:
        """The ``summary`` of the runs; None where the study has none."""
        return resolve_name(self.summary)(runs) if self.summary else None

    def write_report(self, folder: str | os.PathLike[str], replace: bool = False) -> Any:
        """Page, pictures, events, and the table. Raises UserError for other results, or files that are not ours."""
        return resolve_name(self.report)(folder, replace)

    def compare(self, folders: Sequence[str | os.PathLike[str]], **settings: Any) -> Any:
        """Results folders side by side. Raises UserError for what does not compare."""
        return resolve_name(self.comparison)(folders, **settings)


_STUDIES = (
    Study(
        "lm_perplexity",
        "perplexity on binarised text at several context lengths",
        "data/reviews --path checkpoints/checkpoint_best.pt \\\n      --context-lengths 256,512,1024 --results-dir "
        "results/perplexity",
        flags="momentum_lm.cli.eval_perplexity",
        report="momentum_lm.report.perplexity:write_report",
        comparison="momentum_lm.report.perplexity:Comparison",
    ),
    Study(
        "icl_classification",
        "in-context classification of labelled data",
        "--hf-model gpt2 --datasets mr,trec --shots 0,4,16 \\\n      --seeds 1,2,3 --calibration none,batch "
        "--results-dir results/icl",
        flags="momentum_lm.cli.eval_classification",
        report="momentum_lm.report.classification:write_report",
        comparison="momentum_lm.report.classification_comparison:ClassificationComparison",
        between=True,
        summary="momentum_lm.studies.classification_summary:summary",
    ),
    Study(
        "icl_finetune_analysis",
        "whether in-context learning does what finetuning does",
        "--hf-model gpt2 --datasets mr --shots 16 --seeds 1,2,3 \\\n      --sampling balanced --results-dir "
        "results/analysis",
        flags="momentum_lm.cli.eval_finetune_analysis",
        report="momentum_lm.report.icl_vs_finetuning:write_report",
        comparison="momentum_lm.report.finetuning_comparison:FinetuningComparison",
        summary="momentum_lm.studies.finetuning_summary:summary",
    ),
)
STUDIES = {study.name: study for study in _STUDIES}
