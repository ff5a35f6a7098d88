"""``--criterion icl_classification``, of the task with that name: which label the model gives the highest log-probability."""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.lm.scoring import target_log_probs


@register_criterion("icl_classification")
class IclClassificationCriterion(FairseqCriterion):
    """Logs the accuracy, and as ``loss`` the bits that the right label takes. Raises UserError with any other task, and in training."""

    def __init__(self, task: Any) -> None:
        super().__init__(task)
        if not getattr(task, "for_any_checkpoint", False):
            raise UserError(
                "--criterion icl_classification evaluates a checkpoint, with fairseq-validate --task icl_classification; "
                "to train, use --criterion chunked_cross_entropy"
            )

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        queries = sample["nsentences"]
        if queries == 0:
            return torch.zeros(()), 0, {"loss": 0.0, "ncorrect": 0, "nsentences": 0, "ntokens": 0, "sample_size": 0}
        decoder = model.decoder
        if decoder.adaptive_softmax is not None:
            raise UserError("the model has an adaptive softmax, for which label scores are not implemented; use another model")
        features = model(**sample["net_input"], features_only=True)[0]

        def logits_at(row: Tensor, position: Tensor) -> Tensor:
            return decoder.output_layer(features[row, position])

        scored = (sample[name].cpu() for name in ("rows", "positions", "targets"))
        log_probs = target_log_probs(logits_at, *scored, vocab=len(self.task.target_dictionary)).double()
        if not log_probs.isfinite().all():
            raise UserError("the model gives probabilities of 0 or NaN: its weights are broken, or too large for --fp16")
        of_query, of_choice, gold = (sample[name].cpu() for name in ("queries", "choices", "gold"))
        weights = sample["weights"].cpu()
        shape = queries, 1 + int(of_choice.max())
        place = of_query * shape[1] + of_choice
        scores = torch.zeros(shape, dtype=torch.float64)
        scores.view(-1).index_add_(0, place, weights * log_probs)
        asked_for = torch.zeros(shape, dtype=torch.bool)
        asked_for.view(-1)[place] = True  # where examples have fewer choices than others, there is nothing
        predicted = scores.masked_fill(~asked_for, -math.inf).numpy().argmax(1)  # of equal ones NumPy takes the first
        loss = -log_probs[of_choice == gold[of_query]].sum()
        output = {
            "loss": float(loss),
            "ncorrect": int((predicted == gold.numpy()).sum()),
            "nsentences": queries,
            "ntokens": sample["ntokens"],
            "sample_size": queries,
        }
        return loss, queries, output

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
