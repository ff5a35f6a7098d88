"""A language model with momentum attention for Hugging Face ``transformers``. A copy of this file lies in every folder
with such a model.

Attention gains a moving average of the values, ``MoAttn_t = Attn_t + sum_{i<t} eta^(t-i) v_i`` (arXiv 2212.10559,
section 5), or such a causal filter is elsewhere. A cache holds all values, so the average of a new token is computed
from there, and beams, cropping and copies of a cache need no care. What a filter elsewhere takes is in layers of the
cache that come after the model's own.
"""

import math
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_momentum_lm import MomentumLMConfig

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"this model needs transformers 5 or later, not {transformers.__version__}: pip install --upgrade transformers"
    )

OWN_KINDS: dict[str, Any] = {}
CHUNK = 32
_LONGEST = 2**22  # tokens in a row of an exported model, whose rows may be of any length
ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Seen(NamedTuple):
    """What each new token (T of them) sees of the values, or of what else is filtered (S of them, those of a cache
    included). All None: all before it, and itself.

    ``order`` (B, S): the values in the order in which the average takes them, those that no token sees first;
    ``hidden`` (B, S): which these are, in that order; ``where`` (B, T): each new token's place among the last T of the
    average. ``documents`` (B, S): the document of each value, in that order, of rows that hold several. ``lag`` (B, 1
    or H, T, S), which makes all others needless: how many tokens before the new one a value is, negative if it is not
    seen.
    """

    order: Tensor | None = None
    hidden: Tensor | None = None
    where: Tensor | None = None
    documents: Tensor | None = None
    lag: Tensor | None = None


class Momentum(nn.Module):
    """A causal filter at one of ``config.places``: of the values for the heads' output, or of what it is added to.

    Its channels are in G groups: heads, or as many parts of what has none. Query heads that share a head of values
    share its average. Parameters and sums are in fp32 in a model in half precision. ``index``: the layer of a cache
    that holds what is filtered, where the model's own do not.
    """

    gate: nn.Parameter | None

    def __init__(self, config: MomentumLMConfig, place: str, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.heads, self.size = groups_at(config, place)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        def keep_precision(tensor: Tensor) -> Tensor:  # bf16 rounds a decay of 0.999 to 1
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_precision, *args, **kwargs)

    def reset_parameters(self) -> None:
        """As at the start of training."""
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def kernel(self, values: Tensor) -> Tensor:
        """values (B, G, S, D) -> each channel's weight by distance (G, N, D), up to S - 1, or to where all are 0."""
        raise NotImplementedError

    def average(self, values: Tensor, length: int, documents: Tensor | None = None) -> Tensor:
        """values (B, G, S, D) -> (B, G, length, D), of the last tokens, where each sees all before it.

        documents (B, S), one number a document, whose averages begin anew; ``length`` is S then.
        """
        raise NotImplementedError

    def groups(self) -> int:
        """Into how many groups the filter divides channels without heads."""
        return self.heads

    def forward(self, values: Tensor, length: int, seen: Seen) -> Tensor:
        """values (B, G, S, D) -> the averages at the ``length`` new tokens, in fp32 at least: (B, G, length, D), or (B,
        H, length, D) where the H query heads do not see the same.

        What is not seen is no time to the average either, wherever it stands.
        """
        groups = values.shape[1]
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if seen.lag is not None:
                lag = seen.lag
                if lag.shape[1] > 1:  # a group's query heads one after another, as so many more queries
                    lag = lag.unflatten(1, (groups, -1)).flatten(2, 3)
                return self.summed(values, lag).unflatten(2, (-1, length)).flatten(1, 2)
            if seen.order is not None and seen.hidden is not None:
                index = seen.order[:, None, :, None].expand_as(values)
                values = values.gather(2, index).masked_fill(seen.hidden[:, None, :, None], 0.0)
            out = self.average(values, length, seen.documents)
            return out if seen.where is None else out.gather(2, seen.where[:, None, :, None].expand_as(out))

    def summed(self, values: Tensor, lag: Tensor) -> Tensor:
        """values (B, G, S, D), lag (B, 1 or G, T, S) -> (B, G, T, D), by the equation: each value times its weight."""
        kernel = self.kernel(values).expand(len(values), -1, -1, -1)
        out = []
        # one query at a time: these are weights for each channel
        for row in lag.expand(*values.shape[:2], -1, -1).unbind(2):
            index = row.clamp(0, kernel.shape[2] - 1)[..., None].expand_as(values)
            weights = kernel.gather(2, index).masked_fill((row < 0)[..., None], 0.0)
            out.append((weights * values).sum(2))
        return torch.stack(out, 2)


class MomentumFIR(Momentum):
    """A learned weight a channel for each of the last ``momentum_taps`` tokens, and with ``momentum_current`` one for
    the token itself (``fir``).
    """

    def __init__(self, config: MomentumLMConfig, place: str, index: int) -> None:
        super().__init__(config, place, index)
        self.weights = nn.Parameter(torch.empty(config.momentum_taps, self.heads, self.size))
        self.current = nn.Parameter(torch.empty(self.heads, self.size)) if config.momentum_current else None
        self.gate = nn.Parameter(torch.empty(self.heads)) if config.momentum_gate == "zero" else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        lag = torch.arange(1, len(self.weights) + 1, dtype=torch.float64)
        self.weights.copy_((self.config.momentum_eta**lag)[:, None, None].expand_as(self.weights))
        if self.current is not None:
            nn.init.zeros_(self.current)

    def by_lag(self, dtype: torch.dtype) -> Tensor:
        """(K + 1, G, D): the weights of the token itself, and of each before it."""
        current = torch.zeros_like(self.weights[0]) if self.current is None else self.current
        weights = torch.cat([current[None], self.weights])
        return (weights if self.gate is None else weights * self.gate[:, None]).to(dtype)

    def kernel(self, values: Tensor) -> Tensor:
        return F.pad(self.by_lag(values.dtype), (0, 0, 0, 0, 0, 1)).transpose(0, 1)

    def average(self, values: Tensor, length: int, documents: Tensor | None = None) -> Tensor:
        taps, first = len(self.weights), values.shape[2] - length
        padded = F.pad(values, (0, 0, taps, 0))[:, :, first:]  # the new tokens, and as many as they look back to
        numbers = None if documents is None else F.pad(documents, (taps, 0), value=-1)
        out = torch.zeros_like(padded[:, :, taps:])
        for lag, weight in enumerate(self.by_lag(values.dtype).unbind(0)):
            if lag == 0 and self.current is None:
                continue
            before = slice(taps - lag, taps - lag + length)
            earlier = padded[:, :, before]
            if documents is not None and numbers is not None:
                earlier = earlier * (numbers[:, before] == documents)[:, None, :, None]
            out = out + weight[:, None] * earlier
        return out


class MomentumEMA(Momentum):
    """The moving average: one decay a group (``ema``, without the current token), or eight learned decays a channel
    with signed weights (``multi_ema``, with it).
    """

    def __init__(self, config: MomentumLMConfig, place: str, index: int) -> None:
        super().__init__(config, place, index)
        self.several = config.momentum_kind == "multi_ema"
        rows = self.heads * (self.size if self.several else 1)
        self.delta = nn.Parameter(torch.empty(rows, 8)) if self.several else None
        self.gamma = nn.Parameter(torch.empty(rows, 8)) if self.several else None
        self.decay_logit = nn.Parameter(torch.empty(rows)) if config.momentum_learned else None
        self.gate = nn.Parameter(torch.empty(rows)) if config.momentum_gate == "zero" else None

    def reset_parameters(self) -> None:
        eta = self.config.momentum_eta
        if self.delta is not None and self.gamma is not None:
            nn.init.normal_(self.delta, std=0.2)
            nn.init.normal_(self.gamma)
        if self.decay_logit is not None:
            nn.init.constant_(self.decay_logit, math.log(eta) - math.log1p(-eta))
        super().reset_parameters()

    def terms(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logarithms of the decays, and weights: (R, N) each, for R groups or channels of N decays."""
        if self.delta is not None and self.gamma is not None:
            log_decay, weight = F.logsigmoid(self.delta), self.gamma / math.sqrt(self.gamma.shape[0])
        else:
            log_decay = torch.full((self.heads, 1), math.log(self.config.momentum_eta), device=device)
            if self.decay_logit is not None:
                log_decay = F.logsigmoid(self.decay_logit)[:, None]
            weight = torch.expm1(-log_decay) if self.config.momentum_normalize else torch.ones_like(log_decay)
        return log_decay, weight if self.gate is None else weight * self.gate[:, None]

    def across(self, out: Tensor, below: Tensor) -> Tensor:
        """out, below (B, T, H, D), of this layer and of the one below, which holds its average already -> the average
        over layers, (B, T, H, D)."""
        log_decay, weight = self.terms(out.device)
        return (out + weight * log_decay.exp() * below).to(out.dtype)

    def kernel(self, values: Tensor) -> Tensor:
        log_decay, weight = (x.to(values.dtype) for x in self.terms(values.device))
        distance = torch.arange(values.shape[2], device=values.device)
        kernel = (weight[..., None] * torch.exp(distance * log_decay[..., None])).sum(1)
        return kernel.unflatten(0, (self.heads, -1)).transpose(1, 2)

    def summed(self, values: Tensor, lag: Tensor) -> Tensor:
        if self.several:
            return super().summed(values, lag)
        log_decay, weight = (x.to(values.dtype) for x in self.terms(values.device))
        weights = weight[..., None] * torch.exp(lag.clamp(min=0) * log_decay[..., None])  # (B, G, T, S)
        return weights.masked_fill(lag < 1, 0.0) @ values

    def average(self, values: Tensor, length: int, documents: Tensor | None = None) -> Tensor:
        if not self.several:
            return self.in_chunks(values, length, documents)
        channels = values.transpose(2, 3).flatten(1, 2)[..., None]  # (B, G * D, S, 1)
        return self.in_chunks(channels, length, documents)[..., 0].unflatten(1, (self.heads, -1)).transpose(2, 3)

    def in_chunks(self, values: Tensor, length: int, documents: Tensor | None) -> Tensor:
        """:meth:`average` for values (B, R, S, D), of R rows of :meth:`terms`: within chunks by the matrix of all
        decays, and over them by their sums."""
        log_decay, weight = (x.to(values.dtype) for x in self.terms(values.device))
        # Of several documents the matrices are each row's own, and with several decays each channel's.
        size = CHUNK if documents is None or not self.several else 8
        if _unknown(values.shape[2]):
            size = 1  # then neither is how many chunks there are, which is arithmetic that an exporter does not follow
        count = (values.shape[2] + size - 1) // size
        front = count * size - values.shape[2]  # zeros before the first change nothing
        chunks = F.pad(values, (0, 0, front, 0)).unflatten(2, (count, size))
        place = torch.arange(size, device=values.device)
        to_end = torch.exp((size - 1 - place) * log_decay[..., None])  # (R, N, size)
        if documents is None:
            ends = None
            sums = torch.einsum("rnc,brkcd->bnrkd", to_end, chunks)
        else:
            documents = F.pad(documents, (front, 0), value=-1).unflatten(1, (count, size))
            ends = documents[..., -1]  # (B, K): the document that a chunk ends in, which alone it hands on
            handed = (documents == ends[..., None])[:, None, ..., None]
            sums = torch.einsum("rnc,brkcd->bnrkd", to_end, chunks * handed)
        sums = self.carried_over(sums, log_decay * size, ends)
        before = F.pad(sums, (0, 0, 1, 0))[:, :, :, :-1]  # (B, N, R, K, D)

        used = (length + size - 1) // size  # of the new tokens
        kernel = (weight[..., None] * torch.exp(place * log_decay[..., None])).sum(1)  # (R, size), by distance
        lag = place[:, None] - place
        inside = kernel[:, lag.clamp(min=0)].masked_fill(lag < (0 if self.several else 1), 0.0)  # (R, size, size)
        carried = weight[..., None] * torch.exp((place + 1) * log_decay[..., None])
        if documents is None or ends is None:
            out = torch.einsum("rqc,brkcd->brkqd", inside, chunks[:, :, count - used :])
            out = out + torch.einsum("rnq,bnrkd->brkqd", carried, before[:, :, :, count - used :])
        else:
            same = documents[..., None] == documents[:, :, None]  # (B, K, size, size)
            out = (inside[:, None] * same[:, None]) @ chunks
            going_on = documents == ends.roll(1, 1)[..., None]  # before the first chunk there is nothing
            out = out + torch.einsum("rnq,bnrkd->brkqd", carried, before) * going_on[:, None, ..., None]
        return out.flatten(2, 3)[:, :, used * size - length :]

    def carried_over(self, sums: Tensor, log_decay: Tensor, ends: Tensor | None) -> Tensor:
        """sums (B, N, R, K, D) of K chunks alone -> of each and all chunks before it, in log2(K) steps. log_decay (R,
        N): over a chunk.

        ends (B, K): only chunks that end in the same document belong together.
        """
        count = sums.shape[3]
        unknown = _unknown(count)
        index = torch.arange(count, device=sums.device)
        shift = 1
        while shift < (_LONGEST if unknown else count):
            if unknown:  # how many chunks there are, and so whether any lie so far apart
                source = (index - shift).clamp(min=0)
                earlier = sums[:, :, :, source].masked_fill((index < shift)[:, None], 0.0)
                same = None if ends is None else ends[:, source] == ends
            else:
                earlier = F.pad(sums[:, :, :, : count - shift], (0, 0, shift, 0))
                same = None if ends is None else F.pad(ends[:, : count - shift], (shift, 0), value=-1) == ends
            if same is not None:
                earlier = earlier * same[:, None, None, :, None]
            sums = sums + torch.exp(shift * log_decay).t()[..., None, None] * earlier
            shift *= 2
        return sums


def groups_at(config: MomentumLMConfig, place: str) -> tuple[int, int]:
    """Into how many groups what is filtered at a place is divided, and the channels of each."""
    if place in ("output", "values", "keys"):
        return config.num_key_value_heads, config.head_dim
    if place in ("queries", "depth"):
        return config.num_attention_heads, config.head_dim
    width = config.intermediate_size if place == "ffn_hidden" else config.hidden_size
    groups = config.num_attention_heads if width % config.num_attention_heads == 0 else 1
    return groups, width // groups


def make_filter(config: MomentumLMConfig, place: str, layer: int = 0) -> Any:
    """The filter at one of ``config.places``, of one layer; None where the configuration has none there."""
    if place not in config.places:
        return None
    index, within = config.num_hidden_layers, [p for p in config.places if p not in ("output", "embedding", "depth")]
    if place in within:
        index += layer * len(within) + within.index(place)
    elif place == "embedding":
        index += config.num_hidden_layers * len(within)
    kinds = {"ema": MomentumEMA, "multi_ema": MomentumEMA, "fir": MomentumFIR}
    if config.momentum_kind in kinds:
        return kinds[config.momentum_kind](config, place, index)
    own = OWN_KINDS[config.momentum_kind].make(config, place, *groups_at(config, place))
    own.place, own.index = place, index
    return own


def averaged(module: Any, values: Tensor, length: int, seen: Seen) -> Tensor:
    """values (B, G, S, D) -> the filter's averages at the ``length`` new tokens, as :meth:`Momentum.forward`.

    A kind of somebody's own, which momentum_lm calls with a state, sees all tokens again at each step. Raises
    ValueError for a mask (B, 1 or H, T, S), which such a kind does not know.
    """
    if isinstance(module, Momentum):
        return module(values, length, seen)
    if seen.lag is not None:
        raise ValueError(f"{type(module).__name__} takes an attention_mask (B, T) alone, 0 at padding")
    padding = None
    if seen.order is not None and seen.hidden is not None:
        values, padding = values.gather(2, seen.order[:, None, :, None].expand_as(values)), seen.hidden
    out = module(values, None, seen.documents, padding)[0][:, :, values.shape[2] - length :]
    return out if seen.where is None else out.gather(2, seen.where[:, None, :, None].expand_as(out))


def added(module: Any, x: Tensor, seen: Seen, past_key_values: Any) -> Tensor:
    """x (B, G, T, D) plus the filter's average, of what the cache has of earlier tokens too."""
    history = x if past_key_values is None else remembered(past_key_values, module.index, x)
    return (x + averaged(module, history, x.shape[2], seen)).to(x.dtype)


def remembered(past_key_values: Any, index: int, x: Tensor) -> Tensor:
    """x (B, G, T, D) of new tokens -> (B, G, S, D), those of a cache before them: its layer ``index``, which is made
    if need be, has them as its keys, and values without channels.
    """
    layers = past_key_values.layers
    while len(layers) <= index:
        fixed = past_key_values.is_compileable
        layers.append(StaticLayer(max_cache_len=layers[0].max_cache_len) if fixed else DynamicLayer())
    return past_key_values.update(x, x[..., :0], index)[0]


def with_filter(module: Any, x: Tensor, seen: Seen, past_key_values: Any) -> Tensor:
    """x (B, T, C) plus its filter, if there is one, in groups of channels."""
    if module is None:
        return x
    grouped = x.unflatten(-1, (module.groups(), -1)).transpose(1, 2)
    return added(module, grouped, seen, past_key_values).transpose(1, 2).flatten(2)


def _unknown(count: Any) -> bool:
    """Whether a size may be any number in the graph that is being made: ``torch.export`` fixes what a program
    compares."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
    return isinstance(count, torch.SymInt) or (exporting and torch.compiler.is_dynamo_compiling())


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D), key and value (B, G, S, D) -> softmax attention (B, T, H, D), one operation after another,
    and its weights (B, H, T, S).
    """
    share = query.shape[1] // key.shape[1]
    key, value = repeated(key, share), repeated(value, share)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def repeated(x: Tensor, share: int) -> Tensor:
    """x (B, G, S, D) -> (B, G * share, S, D): each head once for every query head that shares it."""
    return x if share == 1 else x.repeat_interleave(share, dim=1)


def make_norm(config: MomentumLMConfig, size: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last dimension, of ``size``."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


def normalized(x: Tensor, norm: Any) -> Tensor:
    """x (..., D) -> its norm, in the dtype of x. In that of the norm's weight, as autocast does for LayerNorm alone."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class MomentumLMAttention(nn.Module):
    """Multi-head causal self-attention, plus momentum: H query heads in G groups, which share a head of keys and
    values each.
    """

    def __init__(self, config: MomentumLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # for transformers
        width, size = config.hidden_size, config.head_dim
        queries, shared = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = nn.Linear(width, queries, bias=config.bias != "none")
        self.k_proj = nn.Linear(width, shared, bias=config.bias != "none")
        self.v_proj = nn.Linear(width, shared, bias=config.bias != "none")
        self.out_proj = nn.Linear(queries, width, bias=config.bias == "all")
        self.q_norm = make_norm(config, size) if config.qk_norm else None
        self.k_norm = make_norm(config, size) if config.qk_norm else None
        self.momentum = make_filter(config, "output")
        self.momentum_values = make_filter(config, "values", layer_idx)
        self.momentum_keys = make_filter(config, "keys", layer_idx)
        self.momentum_queries = make_filter(config, "queries", layer_idx)
        self.momentum_depth = make_filter(config, "depth") if layer_idx > 0 else None

    def forward(
        self,
        hidden_states: Tensor,
        below: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        rotation: tuple[Tensor, Tensor] | None,
        seen: Seen,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """hidden_states (B, T, C), and what the heads of the layer below gave, (B, T, H, D), if there is one -> the
        same shape, the weights of eager attention, and what its own heads give.
        """
        shape = (*hidden_states.shape[:2], -1, self.config.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key, value = (
            x if module is None else added(module, x, seen, past_key_values)
            for module, x in ((self.momentum_queries, query), (self.momentum_keys, key), (self.momentum_values, value))
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = normalized(query, self.q_norm), normalized(key, self.k_norm)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = query.shape[-1] ** -0.5
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        if self.momentum is not None:
            average = averaged(self.momentum, value, query.shape[2], seen)  # (B, G or H, T, D)
            average = repeated(average, query.shape[1] // average.shape[1])
            out = (out + average.transpose(1, 2)).to(out.dtype)
        if self.momentum_depth is not None:
            out = self.momentum_depth.across(out, below)
        return self.out_proj(out.flatten(2)), weights, out


class MomentumLMBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); or, with a parallel residual, x + attention(norm(x)) +
    feed-forward(norm(x)).
    """

    def __init__(self, config: MomentumLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        width, inner, bias = config.hidden_size, config.intermediate_size, config.bias == "all"
        self.self_attn = MomentumLMAttention(config, layer_idx)
        self.self_attn_layer_norm = make_norm(config, width)
        self.fc1 = nn.Linear(width, inner, bias)
        self.fc_gate = nn.Linear(width, inner, bias) if config.ffn == "gated" else None
        self.fc2 = nn.Linear(inner, width, bias)
        self.final_layer_norm = make_norm(config, width)
        self.momentum_input = make_filter(config, "input", layer_idx)
        self.momentum_ffn = make_filter(config, "ffn", layer_idx)
        self.momentum_ffn_hidden = make_filter(config, "ffn_hidden", layer_idx)

    def forward(
        self, hidden_states: Tensor, below: Tensor | None, *, past_key_values: Any, seen: Seen, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states (B, T, C) -> the same shape, the weights of eager attention, and what the layer above takes as
        ``below``, (B, T, H, D), if that looks at it.
        """
        config, memory = self.config, {"past_key_values": past_key_values, "seen": seen}
        x = with_filter(self.momentum_input, self.self_attn_layer_norm(hidden_states), **memory)
        attended, weights, heads = self.self_attn(x, below, **memory, **kwargs)
        after = hidden_states + F.dropout(attended, config.dropout, self.training)
        x = self.final_layer_norm(hidden_states if config.parallel_residual else after)
        x = with_filter(self.momentum_ffn, x, **memory)
        activated = self.fc1(x) if self.fc_gate is None else self.fc_gate(x)
        inner = ACTIVATIONS[config.activation](with_filter(self.momentum_ffn_hidden, activated, **memory))
        inner = inner if self.fc_gate is None else inner * self.fc1(x)
        inner = self.fc2(F.dropout(inner, config.activation_dropout, self.training))
        x = after + F.dropout(inner, config.dropout, self.training)
        return x, weights, heads if "depth" in config.places else None


class MomentumLMPreTrainedModel(PreTrainedModel):
    """What both classes below share."""

    config_class = MomentumLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MomentumLMBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: MomentumLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = {
            "momentum" if place == "output" else f"momentum_{place}" for place in config.places
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Momentum):
            module.reset_parameters()
        elif isinstance(module, tuple(OWN_KINDS.values())):  # what was not loaded is as its class makes it
            own: Any = module
            fresh = type(own).make(self.config, own.place, *groups_at(self.config, own.place))
            made = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if not getattr(tensor, "_is_hf_initialized", False):
                    tensor.copy_(made[name])


class MomentumLMModel(MomentumLMPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: MomentumLMConfig) -> None:
        super().__init__(config)
        padding, width = config.padding_idx, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, padding)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings + padding + 1, width, padding)
        self.layers = nn.ModuleList(MomentumLMBlock(config, i) for i in range(config.num_hidden_layers))
        self.momentum_embedding = make_filter(config, "embedding")
        self.layer_norm = make_norm(config, width)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPast:
        """As other models of transformers: input_ids (B, T) or inputs_embeds (B, T, C) -> hidden states (B, T, C).
        ``attention_mask`` is (B, tokens seen so far, and these), 0 at padding; or (B, 1 or H, T, S), True or 0 where a
        token sees another.

        Where ``position_ids`` begin anew, another document begins, which sees nothing of the one before: in a row
        without ``attention_mask``, as padding-free training has it, wherever a position is not the next one; with it,
        where they do not grow. Raises ValueError for a mask of another width, for more tokens than there are learned
        positions, and for a mask of each head's own in a model with a filter elsewhere than at the heads' output.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if config.over_tokens and config._attn_implementation.startswith("paged"):
            raise ValueError("momentum needs a row's values, which continuous batching does not keep: use generate")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = config.use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        x, prepared = self._prepare(x, attention_mask, position_ids, past_key_values)
        hidden, attentions, below = [x], [], None
        for layer in self.layers:
            x, weights, below = layer(
                x, below, past_key_values=past_key_values, use_cache=use_cache, **prepared, **kwargs
            )
            hidden.append(x)
            attentions.append(weights)
        x = self.layer_norm(x)
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attentions = config.output_attentions if output_attentions is None else output_attentions
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden[:-1], x) if keep_hidden else None,
            attentions=tuple(attentions) if keep_attentions else None,
        )

    def _prepare(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (B, T, C) and the arguments of :meth:`forward` -> the embeddings with what their positions add,
        and what all layers take besides: the mask of attention, the rotation, and what momentum sees.
        """
        config, length = self.config, x.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        # of fixed size: ``past`` may be a tensor then
        fixed = getattr(past_key_values, "is_compileable", False)
        total = past_key_values.layers[0].max_cache_len if fixed else past + length
        columns = torch.arange(length, device=x.device) + past

        given, visible = _visible(attention_mask, past, length, total, fixed, x.device)
        documents = None
        if position_ids is None:
            count = columns[None] + 1 if visible is None else visible.cumsum(1)[:, columns]
            position_ids = (count - 1).clamp(min=0)
        elif length > 1 and not fixed and past == 0 and (given is None or given.dim() == 2):
            documents = _documents(position_ids.expand(x.shape[0], -1), given)

        if config.position == "learned" and not fixed and past + length > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"{past + length} tokens exceed the {most} learned positions of the model")
        seen = _seen(config, given, visible, documents, columns, total) if config.over_tokens else Seen()
        x = x * math.sqrt(config.hidden_size) if config.scale_embeddings else x
        x = self._at_positions(with_filter(self.momentum_embedding, x, seen, past_key_values), position_ids)
        rotation = rotations(position_ids, config) if config.position == "rotary" else None
        if documents is not None:
            mask = _own_mask(documents, visible)
        elif length == 1 and visible is not None and config._attn_implementation in ("eager", "sdpa"):
            # transformers looks whether all is visible, which waits for a GPU at each token
            mask = visible[:, None, None]
        else:
            mask = create_causal_mask(
                config=config, inputs_embeds=x, attention_mask=given, past_key_values=past_key_values
            )
        return x, {"attention_mask": mask, "rotation": rotation, "seen": seen}

    def _at_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Embeddings (B, T, C) of tokens at positions (B or 1, T), with what the positions add to them."""
        config = self.config
        rows = position_ids + config.padding_idx + 1
        if config.position == "learned":
            x = x + self.embed_positions(rows)
        elif config.position == "sinusoidal":
            x = x + sinusoids(rows, config.hidden_size).to(x.dtype)
        return F.dropout(x, config.dropout, self.training)


def _visible(
    attention_mask: Tensor | None, past: Any, length: int, total: Any, fixed: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The mask that attention is to see, and what is no padding, (B or 1, total), None where there is none.

    Raises ValueError for a mask (B, T) of another width than ``total``.
    """
    if attention_mask is not None and attention_mask.dim() == 2:
        missing = total - attention_mask.shape[1]
        if missing and not (fixed and missing > 0):
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {past} tokens seen and {length} new ones"
            )
        visible = F.pad(attention_mask.bool(), (0, missing)) if missing else attention_mask.bool()
        return visible, visible
    if attention_mask is None and fixed:
        return None, torch.arange(total, device=device)[None] < past + length
    return attention_mask, None


class MomentumLMForCausalLM(MomentumLMPreTrainedModel, GenerationMixin):
    """Tokens to logits of each next token."""

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, past_key_values: Any, **unused: Any) -> Tensor | None:
        """What ``generate`` hands on with a cache of fixed size: attention_mask (B, tokens so far) -> (B, tokens of the
        cache), from which the model makes the masks of attention and momentum. Of one width, so that a compiled model
        stays the same."""
        if attention_mask is None or attention_mask.dim() != 2:
            return attention_mask
        return F.pad(attention_mask, (0, past_key_values.layers[0].max_cache_len - attention_mask.shape[1]))

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MomentumLMConfig) -> None:
        super().__init__(config)
        self.model = MomentumLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> CausalLMOutputWithPast:
        """As other models of transformers, with the errors of :class:`MomentumLMModel`: input_ids (B, T) or
        inputs_embeds (B, T, C) -> logits (B, T, V), or of the last ``logits_to_keep`` tokens. ``labels`` (B, T) are the
        same tokens, which the loss shifts by one;
        -100 counts for nothing."""
        found = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        if self.config.absent_tokens:
            logits[..., list(self.config.absent_tokens)] = -math.inf
        loss = (
            None
            if labels is None
            else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        )
        return CausalLMOutputWithPast(loss, logits, found.past_key_values, found.hidden_states, found.attentions)


def _documents(position_ids: Tensor, visible: Tensor | None) -> Tensor | None:
    """position_ids (B, T), visible (B, T) or None -> the number of each token's document in its row; None if all rows
    are of one.

    While a graph is made nothing is looked at, and there always are numbers.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    if visible is None:
        begins = (position_ids - position_ids.roll(1, 1) != 1) & (index > 0)
    else:  # padding may stand anywhere, so what counts is the position of the last token before that is none
        last = torch.where(visible, index, -1).cummax(1).values.roll(1, 1)
        before = position_ids.gather(1, last.clamp(min=0))
        begins = visible & (index > 0) & (last >= 0) & (position_ids <= before)
    looked_at = not (torch.compiler.is_compiling() or torch.jit.is_tracing() or begins.is_meta)
    return None if looked_at and not bool(begins.any()) else begins.cumsum(1)


def _own_mask(documents: Tensor, visible: Tensor | None) -> Tensor:
    """documents (B, T) -> (B, 1, T, T), True where a token (row) sees another: itself, and what is before it in its
    document."""
    length = documents.shape[1]
    index = torch.arange(length, device=documents.device)
    allowed = (documents[:, :, None] == documents[:, None]) & (index[:, None] >= index)
    if visible is not None:
        allowed = allowed & (visible[:, None] | (index[:, None] == index))
    return allowed[:, None]


def _seen(
    config: MomentumLMConfig,
    mask: Tensor | None,
    visible: Tensor | None,
    documents: Tensor | None,
    columns: Tensor,
    total: int,
) -> Seen:
    """What momentum is to know of a row: mask (B, 1 or H, T, S) or what ``visible`` (B or 1, S) says, columns (T,) of
    the new tokens. Raises ValueError for a mask of each head's own where a filter is not one of heads."""
    if mask is not None and mask.dim() == 4:
        if mask.shape[1] > 1 and (elsewhere := [place for place in config.over_tokens if place != "output"]):
            raise ValueError(
                f"attention_mask says what each of {mask.shape[1]} heads sees, and momentum_at={elsewhere[0]} filters "
                "for all of them: give a mask (B, 1, T, S)"
            )
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        after = sees.flip(-1).cumsum(-1).flip(-1) - sees.long()  # how many of those that a token sees come later
        return Seen(lag=after.masked_fill(~sees, -1))
    length = columns.shape[0]
    if length == 1 and config.momentum_kind == "ema":
        count = torch.arange(total, device=columns.device)[None] if visible is None else visible.cumsum(1)
        lag = count[:, -1:] - count
        return Seen(lag=(lag if visible is None else lag.masked_fill(~visible, -1))[:, None, None])
    if visible is None:
        return Seen(documents=documents)
    # what is seen goes to the end, in its order, and the averages back to where their tokens are
    order = visible.long().argsort(dim=1, stable=True)
    count = visible.cumsum(1)
    where = (count[:, columns] - count[:, -1:] + length - 1).clamp(min=0)
    moved = None if documents is None else documents.gather(1, order)
    return Seen(order, ~visible.gather(1, order), where, moved)


def sinusoids(rows: Tensor, dim: int) -> Tensor:
    """fairseq's sinusoidal embedding of table rows (B, T) -> (B, T, dim) fp32: sines, then cosines, 10000^(-k / (dim/2
    - 1)).
    """
    half = dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float, device=rows.device) * -(math.log(10000) / (half - 1)))
    angle = rows[..., None].float() * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, dim % 2))


def rotations(positions: Tensor, config: MomentumLMConfig) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, R/2), fp32, of position * base^(-2i/R), for the first R of a head's
    dimensions.
    """
    size = int(config.head_dim * config.rotary_fraction)
    frequency = config.rotary_base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if config.rotary_scaling != "none":
        frequency = stretched(frequency, config.rotary_scaling)
    angle = positions[:, None, :, None].float() * frequency.float().to(positions.device)
    return angle.cos(), angle.sin()


def stretched(frequency: Tensor, scaling: str) -> Tensor:
    """frequency (R/2,), ``llama3:FACTOR,LOW,HIGH,ORIGINAL`` -> the same: wavelengths above ORIGINAL / LOW tokens become
    FACTOR times as long, those below ORIGINAL / HIGH stay, and frequencies between are mixed.
    """
    factor, low, high, original = (float(number) for number in scaling.removeprefix("llama3:").split(","))
    unchanged = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequency / factor, frequency, unchanged)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), of whose first R dimensions the pairs (i, i + R/2) are turned, in fp32."""
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], -1)
