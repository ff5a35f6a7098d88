"""fairseq optimizers: importing this package registers them."""

from .fused_adamw import FusedAdamW
from .muon import Muon

__all__ = ["FusedAdamW", "Muon"]
