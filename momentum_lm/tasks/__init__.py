"""fairseq tasks: importing this package registers them, and the criterions and optimizers, which fairseq's --user-dir does not look for."""

from momentum_lm import criterions, optim

from .icl_classification import IclClassificationTask
from .momentum_language_modeling import MomentumLanguageModelingTask

__all__ = ["IclClassificationTask", "MomentumLanguageModelingTask", "criterions", "optim"]
