"""A GPT decoder with momentum attention, in plain torch."""

from .attention import Cache, CausalSelfAttention
from .decoder import Decoder, DecoderConfig
from .filters import MomentumEMA, MomentumMultiEMA
from .loss import chunked_cross_entropy

__all__ = [
    "Cache",
    "CausalSelfAttention",
    "Decoder",
    "DecoderConfig",
    "MomentumEMA",
    "MomentumMultiEMA",
    "chunked_cross_entropy",
]
