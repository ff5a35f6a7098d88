"""``--criterion icl_classification``, of the task with that name: which label the model gives the highest
log-probability.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.icl import engine


@register_criterion("icl_classification")
class IclClassificationCriterion(FairseqCriterion):
    """Logs the accuracy, and as ``loss`` the bits that the right label takes. Raises UserError with any other task, and
    in training.
    """

    def __init__(self, task: Any) -> None:
        super().__init__(task)
        if not getattr(task, "for_any_checkpoint", False):
            raise UserError(
                "--criterion icl_classification evaluates a checkpoint, with fairseq-validate --task "
                "icl_classification; "
                "to train, use --criterion chunked_cross_entropy"
            )

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        count = sample["nsentences"]
        if count == 0:
            return torch.zeros(()), 0, {"loss": 0.0, "ncorrect": 0, "nsentences": 0, "ntokens": 0, "sample_size": 0}
        queries, lm, kind = sample["queries"], replace(self.task.lm, model=model), self.task.settings.score
        loss, correct = 0.0, 0
        for _, answers in engine.score_batches(lm, queries, [engine.Batch(range(count), 0)]):
            for query, gold in enumerate(sample["gold"]):
                loss -= answers[query][gold].log_prob
                correct += engine.best(queries[query], answers[query], kind) == gold
        output = {
            "loss": loss,
            "ncorrect": correct,
            "nsentences": count,
            "ntokens": sample["ntokens"],
            "sample_size": count,
        }
        return torch.tensor(loss), count, output

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Sums over batches and processes; each query counts once."""
        loss, right, count = (
            sum(output[name] for output in logging_outputs) for name in ("loss", "ncorrect", "nsentences")
        )
        metrics.log_scalar("loss", loss / count / math.log(2), count, round=4)
        metrics.log_scalar("accuracy", right / count, count, round=6)
        metrics.log_scalar("num_examples", count)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
