"""A GPT decoder with momentum attention, in plain torch."""

from .attention import CausalSelfAttention
from .config import DecoderConfig
from .decoder import Decoder
from .filters import MomentumFilter, WindowFilter, register_filter
from .loss import chunked_cross_entropy
from .momentum import MomentumEMA, MomentumFIR, MomentumMultiEMA
from .state import Cache

__all__ = [
    "Cache",
    "CausalSelfAttention",
    "Decoder",
    "DecoderConfig",
    "MomentumEMA",
    "MomentumFIR",
    "MomentumFilter",
    "MomentumMultiEMA",
    "WindowFilter",
    "chunked_cross_entropy",
    "register_filter",
]
