"""fairseq criterions: importing this package registers them."""

from .chunked_cross_entropy import ChunkedCrossEntropy
from .icl_classification import IclClassificationCriterion

__all__ = ["ChunkedCrossEntropy", "IclClassificationCriterion"]
