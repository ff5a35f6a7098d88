"""fairseq optimizers: importing this package registers them."""

from .fused_adamw import FusedAdamW

__all__ = ["FusedAdamW"]
