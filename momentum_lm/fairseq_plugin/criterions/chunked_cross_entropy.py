"""``--criterion chunked_cross_entropy``: stock cross entropy, without ever holding all logits."""

from __future__ import annotations

from typing import Any

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.model.sizes import OURS


@register_criterion("chunked_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class ChunkedCrossEntropy(CrossEntropyCriterion):
    """Loss and logging outputs are those of fairseq's ``cross_entropy``. The model computes the loss inside its forward
    pass.
    """

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        from momentum_lm.fairseq_plugin.models import MomentumLanguageModel

        inner = model
        while not isinstance(inner, MomentumLanguageModel) and hasattr(
            inner, "module"
        ):  # one in another: fairseq's wrapper, torch's DDP
            inner = inner.module
        if not isinstance(inner, MomentumLanguageModel):
            raise UserError(
                f"--criterion chunked_cross_entropy works with --arch {OURS}; others: --criterion cross_entropy"
            )
        loss, _ = model(**sample["net_input"], targets=sample["target"])
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        return loss, sample_size, logging_output
