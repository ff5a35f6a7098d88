"""fairseq models: importing this package registers them."""

from .language_model import ARCHITECTURES, MomentumLanguageModel

__all__ = ["ARCHITECTURES", "MomentumLanguageModel"]
