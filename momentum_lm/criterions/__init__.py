"""fairseq criterions: importing this package registers them."""

from .chunked_cross_entropy import ChunkedCrossEntropy

__all__ = ["ChunkedCrossEntropy"]
