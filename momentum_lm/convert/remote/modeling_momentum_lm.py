"""A language model with momentum attention for Hugging Face ``transformers``. A copy of this file lies in every folder with such a model.

Attention gains a moving average of the values, ``MoAttn_t = Attn_t + sum_{i<t} eta^(t-i) v_i`` (arXiv 2212.10559, section 5). A cache
holds all values, so the average of a new token is computed from there, and beams, cropping and copies of a cache need no care.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_momentum_lm import MomentumLMConfig

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"this model needs transformers 5 or later, not {transformers.__version__}: pip install --upgrade transformers")

CHUNK = 32
ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Momentum(nn.Module):
    """The moving average of the values: one decay a head (``ema``, without the current token), or eight learned decays a channel with
    signed weights (``multi_ema``, with it). Its parameters and sums are in fp32 in a model in half precision."""

    def __init__(self, config: MomentumLMConfig) -> None:
        super().__init__()
        self.config = config
        self.several = config.momentum_kind == "multi_ema"
        rows = config.dim if self.several else config.heads
        self.delta = nn.Parameter(torch.empty(rows, 8)) if self.several else None
        self.gamma = nn.Parameter(torch.empty(rows, 8)) if self.several else None
        self.decay_logit = nn.Parameter(torch.empty(rows)) if config.momentum_learned else None
        self.gate = nn.Parameter(torch.empty(rows)) if config.momentum_gate == "zero" else None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        def keep_precision(tensor: Tensor) -> Tensor:  # bf16 rounds a decay of 0.999 to 1
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_precision, *args, **kwargs)

    def reset_parameters(self) -> None:
        """As at the start of training."""
        eta = self.config.momentum_eta
        if self.delta is not None and self.gamma is not None:
            nn.init.normal_(self.delta, std=0.2)
            nn.init.normal_(self.gamma)
        if self.decay_logit is not None:
            nn.init.constant_(self.decay_logit, math.log(eta) - math.log1p(-eta))
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def terms(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Logarithms of the decays, and weights: (R, N) each, for R heads or channels of N decays."""
        if self.delta is not None and self.gamma is not None:
            log_decay, weight = F.logsigmoid(self.delta), self.gamma / math.sqrt(self.gamma.shape[0])
        else:
            log_decay = torch.full((self.config.heads, 1), math.log(self.config.momentum_eta), device=device)
            if self.decay_logit is not None:
                log_decay = F.logsigmoid(self.decay_logit)[:, None]
            weight = torch.expm1(-log_decay) if self.config.momentum_normalize else torch.ones_like(log_decay)
        return log_decay, weight if self.gate is None else weight * self.gate[:, None]

    def forward(self, values: Tensor, length: int, visible: Tensor | None = None) -> Tensor:
        """values (B, H, S, D) -> the averages at the last ``length`` tokens (B, H, length, D), in fp32 at least.

        visible: (B, S) False at padding, wherever it stands, which is neither seen nor any time to the average.
        """
        heads, total = values.shape[1:3]
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if visible is not None:  # what is seen goes to the end, in its order, and the averages back to where their tokens are
                order = visible.long().argsort(dim=1, stable=True)
                back = (order.argsort(dim=1)[:, -length:] - (total - length)).clamp(min=0)
                values = values.masked_fill(~visible[:, None, :, None], 0.0)
                values = values.gather(2, order[:, None, :, None].expand_as(values))
            if self.several:
                values = values.transpose(2, 3).flatten(1, 2)[..., None]  # (B, H * D, S, 1)
            out = self.average(values, length)
            if self.several:
                out = out[..., 0].unflatten(1, (heads, -1)).transpose(2, 3)
            return out if visible is None else out.gather(2, back[:, None, :, None].expand_as(out))

    def average(self, values: Tensor, length: int) -> Tensor:
        """values (B, R, S, D) -> (B, R, length, D): within chunks by the matrix of all decays, and over them by their sums."""
        log_decay, weight = (x.to(values.dtype) for x in self.terms(values.device))
        size = min(CHUNK, values.shape[2])
        chunks = F.pad(values, (0, 0, -values.shape[2] % size, 0)).unflatten(2, (-1, size))  # zeros before the first change nothing
        place = torch.arange(size, device=values.device)
        asked = place[-length:]
        to_end = torch.exp((size - 1 - place) * log_decay[..., None])  # (R, N, size)
        sums = torch.einsum("rnc,brkcd->kbrnd", to_end, chunks)
        over = torch.exp(size * log_decay)[..., None]
        before = [torch.zeros_like(sums[0])]
        for chunk in sums[:-1]:
            before.append(over * before[-1] + chunk)

        kernel = (weight[..., None] * torch.exp(place * log_decay[..., None])).sum(1)  # (R, size), by distance
        lag = asked[:, None] - place
        inside = kernel[:, lag.clamp(min=0)].masked_fill(lag < (0 if self.several else 1), 0.0)
        carried = weight[..., None] * torch.exp((asked + 1) * log_decay[..., None])
        used = -(-length // size)
        out = torch.einsum("rqc,brkcd->brkqd", inside, chunks[:, :, -used:])
        out = out + torch.einsum("rnq,kbrnd->brkqd", carried, torch.stack(before[-used:]))
        return out.flatten(2, 3)[:, :, -length:]


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
    """Softmax attention (B, T, H, D) and its weights (B, H, T, S), one operation after another."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class MomentumLMAttention(nn.Module):
    """Multi-head causal self-attention, plus momentum."""

    def __init__(self, config: MomentumLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.momentum = None if config.momentum_kind == "none" else Momentum(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        rotation: tuple[Tensor, Tensor] | None,
        visible: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, T, C) -> the same shape, and the weights of eager attention."""
        shape = (*hidden_states.shape[:2], self.config.heads, -1)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = query.shape[-1] ** -0.5
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        if self.momentum is not None:
            out = (out + self.momentum(value, query.shape[2], visible).transpose(1, 2)).to(out.dtype)
        return self.out_proj(out.flatten(2)), weights


class MomentumLMBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: MomentumLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.self_attn = MomentumLMAttention(config, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, T, C) -> the same shape, and the weights of eager attention."""
        config = self.config
        attended, weights = self.self_attn(self.self_attn_layer_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(attended, config.dropout, self.training)
        inner = ACTIVATIONS[config.activation](self.fc1(self.final_layer_norm(hidden_states)))
        inner = self.fc2(F.dropout(inner, config.activation_dropout, self.training))
        return hidden_states + F.dropout(inner, config.dropout, self.training), weights


class MomentumLMPreTrainedModel(PreTrainedModel):
    """What both classes below share."""

    config_class = MomentumLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MomentumLMBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("momentum",)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Momentum):
            module.reset_parameters()


class MomentumLMModel(MomentumLMPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: MomentumLMConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, padding)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_positions + padding + 1, config.dim, padding)
        self.layers = nn.ModuleList(MomentumLMBlock(config, i) for i in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.dim)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As other models of transformers: input_ids (B, T) or inputs_embeds (B, T, C) -> hidden states (B, T, C). ``attention_mask`` is
        (B, tokens seen so far, and these), 0 at padding.

        Raises ValueError for another mask, which a static cache makes of it, and for more tokens than there are learned positions.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = config.use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = x.shape[1]
        if getattr(past_key_values, "is_compileable", False) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError("momentum needs a cache that grows, such as DynamicCache, and an attention_mask (batch, all tokens)")
        if attention_mask is not None and attention_mask.shape[1] != past + length:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns for {past} tokens seen and {length} new ones")
        visible = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if position_ids is None:
            count = torch.arange(1, past + length + 1, device=x.device)[None] if visible is None else visible.cumsum(1)
            position_ids = (count - 1).clamp(min=0)[:, -length:]

        x = x * math.sqrt(config.dim) if config.scale_embeddings else x
        rows = position_ids + config.pad_token_id + 1
        if config.position == "learned":
            if past + length > config.max_positions:
                raise ValueError(f"{past + length} tokens exceed the {config.max_positions} learned positions of the model")
            x = x + self.embed_positions(rows)
        elif config.position == "sinusoidal":
            x = x + sinusoids(rows, config.dim).to(x.dtype)
        x = F.dropout(x, config.dropout, self.training)
        rotation = rotations(position_ids, config.dim // config.heads) if config.position == "rotary" else None
        mask = create_causal_mask(config=config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values)

        hidden, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(
                x, attention_mask=mask, past_key_values=past_key_values, rotation=rotation, visible=visible, use_cache=use_cache, **kwargs
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


class MomentumLMForCausalLM(MomentumLMPreTrainedModel, GenerationMixin):
    """Tokens to logits of each next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MomentumLMConfig) -> None:
        super().__init__(config)
        self.model = MomentumLMModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As other models of transformers, with the errors of :class:`MomentumLMModel`: input_ids (B, T) or inputs_embeds (B, T, C) ->
        logits (B, T, V), or of the last ``logits_to_keep`` tokens. ``labels`` (B, T) are the same tokens, which the loss shifts by one;
        -100 counts for nothing."""
        found = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        if self.config.absent_tokens:
            logits[..., list(self.config.absent_tokens)] = -math.inf
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, found.past_key_values, found.hidden_states, found.attentions)


def sinusoids(rows: Tensor, dim: int) -> Tensor:
    """fairseq's sinusoidal embedding of table rows (B, T) -> (B, T, dim) fp32: sines, then cosines, 10000^(-k / (dim/2 - 1))."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float, device=rows.device) * -(math.log(10000) / (half - 1)))
    angle = rows[..., None].float() * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, dim % 2))


def rotations(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, size / 2), fp32, of position * 10000^(-2i / size)."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = positions[:, None, :, None].float() * frequency.float().to(positions.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D), its dimension pairs (i, i + D/2) turned, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
