"""fairseq tasks: importing this package registers them, and the tokenizer, criterions and optimizers: --user-dir does
not look for them.
"""

from momentum_lm.fairseq_plugin import criterions, optim

from .icl_classification import IclClassificationTask
from .momentum_language_modeling import MomentumLanguageModelingTask
from .text import ModelTokenizer

__all__ = ["IclClassificationTask", "ModelTokenizer", "MomentumLanguageModelingTask", "criterions", "optim"]
