"""Controls of the study, as filters of its own: what momentum would be without momentum's order, or without a past."""

import torch

from momentum_lm.model import MomentumFilter, WindowFilter, register_filter

LAGS = (5, 2, 7, 1, 8, 4, 6, 3)  # in this order lags 1 to 8 get eta^1 to eta^8: drawn once


@register_filter("placebo")
class Placebo(WindowFilter):
    """Momentum's weights for the wrong tokens: ``sum_k eta^k v_{t - LAGS[k]}``, learned decays."""

    def __init__(self, heads, size, config):
        super().__init__(heads, size, config)
        self.decay_logit = torch.nn.Parameter(torch.logit(torch.full((heads,), config.momentum_eta)))

    def taps(self):
        return len(LAGS)

    def window(self, x):
        order = torch.arange(1, len(LAGS) + 1, device=x.device)
        weights = torch.sigmoid(self.decay_logit)[:, None] ** order  # (heads, lags)
        past = x[..., [len(LAGS) - lag for lag in LAGS], :]
        return torch.einsum("hk,bhtkd->bhtd", weights.to(x.dtype), past)


@register_filter("head_scale")
class HeadScale(MomentumFilter):
    """A learned factor per head of attention's output, which begins at 1: no other token is seen."""

    additive = False

    def __init__(self, heads):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.zeros(heads))

    @classmethod
    def make(cls, config, place, heads, size):
        return cls(heads)

    def groups(self):
        return len(self.factor)

    def forward(self, values, state=None, segment_ids=None, padding=None, addend=None):
        state = values[:, :, 0] if state is None else state  # nothing to remember
        if addend is None:
            return values * 0, state
        factor = 1 + self.factor.repeat_interleave(addend.shape[1] // len(self.factor))
        return addend * factor.to(addend.dtype)[:, None, None], state
