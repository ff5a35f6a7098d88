"""A GPT decoder with momentum attention, in plain torch."""

from .attention import CausalSelfAttention
from .config import DecoderConfig
from .decoder import Decoder
from .filters import MomentumEMA, MomentumFIR, MomentumMultiEMA
from .loss import chunked_cross_entropy
from .state import Cache

__all__ = [
    "Cache",
    "CausalSelfAttention",
    "Decoder",
    "DecoderConfig",
    "MomentumEMA",
    "MomentumFIR",
    "MomentumMultiEMA",
    "chunked_cross_entropy",
]
