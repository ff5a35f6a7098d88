"""A GPT decoder whose parameter names are those of fairseq's ``transformer_lm``, with momentum attention as an option."""

from __future__ import annotations

import enum
import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from momentum_lm.errors import UserError
from momentum_lm.ops.naive import run_numbers

from .attention import Cache, CausalSelfAttention, LayerCache, Rotary
from .filters import MomentumEMA, MomentumMultiEMA
from .loss import called_cross_entropy, chunked_cross_entropy
from .mlp import activated_linear
from .output import OutputProjection, token_ids
from .plain import is_plain

POSITIONS = ("sinusoidal", "learned", "rotary")
# The paper gives no decay. This one had the lowest validation perplexity in examples/momentum_vs_vanilla.
DEFAULT_ETA = 0.3
MOMENTUM_KINDS = ("none", "ema", "multi_ema")
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),  # fairseq's name for the tanh approximation
    "relu": F.relu,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and choices of a :class:`Decoder`. Raises UserError, naming the fairseq flag, for values that cannot be."""

    vocab_size: int
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    max_positions: int = 1024
    padding_idx: int = 1
    eos_idx: int = 2
    position: str = "sinusoidal"
    activation: str = "gelu"
    tie_embeddings: bool = True
    scale_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    checkpoint_activations: bool = False
    momentum_kind: str = "none"
    momentum_eta: float = DEFAULT_ETA
    momentum_learned: bool = False
    momentum_normalize: bool = False
    momentum_gate: str = "none"
    absent_tokens: tuple[int, ...] = ()  # ids that are never predicted, such as rows of a dictionary that the model was not trained with

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ("--position", self.position, POSITIONS),
            ("--activation-fn", self.activation, tuple(ACTIVATIONS)),
            ("--momentum-kind", self.momentum_kind, MOMENTUM_KINDS),
            ("--momentum-gate", self.momentum_gate, ("none", "zero")),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value}: must be one of {', '.join(choices)}")
        if not 0 < self.momentum_eta < 1:
            raise UserError(f"--momentum-eta {self.momentum_eta}: the decay must lie strictly between 0 and 1, such as {DEFAULT_ETA}")
        if self.momentum_kind != "ema" and (self.momentum_learned or self.momentum_normalize):
            raise UserError(f"--momentum-learned and --momentum-normalize belong to --momentum-kind ema, not {self.momentum_kind}")
        if self.momentum_kind == "none" and self.momentum_gate != "none":
            raise UserError("--momentum-gate needs --momentum-kind ema or multi_ema")
        for flag, number, most in (
            ("--decoder-layers", self.layers, 10_000),
            ("--decoder-attention-heads", self.heads, 1 << 20),
            ("--decoder-embed-dim", self.dim, 1 << 20),
            ("--decoder-ffn-embed-dim", self.ffn_dim, 1 << 24),
            ("--max-target-positions", self.max_positions, 1 << 40),
        ):
            if number < 1:
                raise UserError(f"{flag} {number}: must be at least 1")
            if number > most:
                raise UserError(f"{flag} {number}: must be at most {most:,}")
        for flag, share in (
            ("--dropout", self.dropout),
            ("--attention-dropout", self.attention_dropout),
            ("--activation-dropout", self.activation_dropout),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"{flag} {share}: must be a probability, from 0 to 1")
        if self.vocab_size <= max(self.padding_idx, self.eos_idx):
            raise UserError(f"a dictionary of {self.vocab_size} entries lacks the special symbols")
        if self.dim % self.heads:
            raise UserError(f"--decoder-embed-dim {self.dim} is not a multiple of --decoder-attention-heads {self.heads}")
        if self.position == "rotary" and self.dim // self.heads % 2:
            raise UserError(f"--position rotary needs an even head size, got {self.dim // self.heads}")
        if self.position == "sinusoidal" and self.dim < 4:
            raise UserError(f"--position sinusoidal needs --decoder-embed-dim of at least 4, got {self.dim}")
        for token in self.absent_tokens:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"--absent-tokens {token}: the dictionary's ids are 0 to {self.vocab_size - 1}")

    @classmethod
    def from_fairseq(cls, cfg: Mapping[str, Any], vocab_size: int, padding_idx: int = 1, eos_idx: int = 2) -> DecoderConfig:
        """The configuration of a fairseq model, ours or a stock ``transformer_lm*``, from its ``cfg.model`` as a mapping.

        Raises UserError, naming the option, for a stock option that this decoder does not have, and for a value that is no number.
        """

        def get(name: str, default: Any) -> Any:
            value = cfg.get(name)
            return default if value is None else value

        def wrong(name: str, value: Any, what: str) -> UserError:
            text = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:79]}…"
            return UserError(f"--{name.replace('_', '-')} {text}: must be {what}")

        def number(kind: type, name: str, default: Any) -> Any:
            value = get(name, default)
            what = "a whole number" if kind is int else "a number"
            try:
                if (
                    isinstance(value, bool)
                    or not isinstance(value, (str, numbers.Real))
                    or (isinstance(value, str) and len(value) > 40)
                ):
                    raise TypeError
                result = kind(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise wrong(name, value, what) from error
            if not isinstance(value, str) and result != value and kind is int:
                raise wrong(name, value, what)
            return result

        def flag(name: str) -> bool:
            value = get(name, False)
            if not isinstance(value, (bool, int)) or value not in (0, 1):
                raise wrong(name, value, "True or False")
            return bool(value)

        def text(name: str, default: str) -> str:
            value = get(name, default)
            value = str(value) if isinstance(value, enum.Enum) else value  # as fairseq keeps choices
            if not isinstance(value, str) or len(value) > 80:
                raise wrong(name, value, "a word")
            return value

        unsupported = {
            "character_embeddings": False,
            "adaptive_softmax_cutoff": None,
            "adaptive_input": False,
            "layernorm_embedding": False,
            "no_decoder_final_norm": False,
            "no_token_positional_embeddings": False,
            "scale_fc": False,
            "scale_attn": False,
            "scale_heads": False,
            "scale_resids": False,
            "base_layers": 0,
            "moe_freq": 0,
            "quant_noise_pq": 0.0,
            "quant_noise_scalar": 0.0,
            "decoder_layerdrop": 0.0,
        }
        for name, plain in unsupported.items():
            if get(name, plain) != plain:
                raise UserError(f"the model was trained with --{name.replace('_', '-')}, which this decoder does not have")
        if "decoder_normalize_before" in cfg and not flag("decoder_normalize_before"):
            raise UserError("the model normalises after each block (no --decoder-normalize-before); this decoder normalises before")
        dim = number(int, "decoder_embed_dim", 512)
        for name in ("decoder_input_dim", "decoder_output_dim"):
            if number(int, name, dim) != dim:
                raise UserError(f"the model's --{name.replace('_', '-')} differs from --decoder-embed-dim, which this decoder cannot do")
        stock = "position" not in cfg
        tied = flag("share_decoder_input_output_embed") if stock else not flag("untie_embeddings")
        position = "learned" if stock and flag("decoder_learned_pos") else "sinusoidal"
        return cls(
            vocab_size=vocab_size,
            dim=dim,
            ffn_dim=number(int, "decoder_ffn_embed_dim", 4 * dim),
            layers=number(int, "decoder_layers", 6),
            heads=number(int, "decoder_attention_heads", 8),
            max_positions=number(int, "max_target_positions", get("tokens_per_sample", 1024)),
            padding_idx=padding_idx,
            eos_idx=eos_idx,
            position=position if stock else text("position", "sinusoidal"),
            activation=text("activation_fn", "relu"),
            tie_embeddings=tied,
            scale_embeddings=not flag("no_scale_embedding"),
            dropout=number(float, "dropout", 0.1),
            attention_dropout=number(float, "attention_dropout", 0.0),
            activation_dropout=number(float, "activation_dropout", 0.0),
            checkpoint_activations=flag("checkpoint_activations"),
            momentum_kind=text("momentum_kind", "none"),
            momentum_eta=number(float, "momentum_eta", DEFAULT_ETA),
            momentum_learned=flag("momentum_learned"),
            momentum_normalize=flag("momentum_normalize"),
            momentum_gate=text("momentum_gate", "none"),
            absent_tokens=token_ids(get("absent_tokens", "")),
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        momentum: nn.Module | None = None
        if config.momentum_kind == "ema":
            momentum = MomentumEMA(
                config.heads,
                config.momentum_eta,
                config.momentum_learned,
                config.momentum_normalize,
                config.momentum_gate == "zero",
            )
        elif config.momentum_kind == "multi_ema":
            momentum = MomentumMultiEMA(config.dim, config.momentum_gate == "zero")
        self.self_attn = CausalSelfAttention(config.dim, config.heads, config.attention_dropout, momentum)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """x (B, T, C) -> (B, T, C); the rest goes to :meth:`CausalSelfAttention.forward`."""
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), **attention))
        inner = self.fc1(self.final_layer_norm(x))
        if self.training and self.activation_dropout.p > 0:
            return x + self.dropout(self.fc2(self.activation_dropout(self.activation(inner))))
        return x + self.dropout(activated_linear(inner, self.fc2, self.activation))


class Decoder(nn.Module):
    """Pre-norm GPT decoder. Tokens (B, T) in, logits (B, T, V) out; padding (left or right) and packed documents change nothing.

    Documents of a packed sequence are given by ``segment_ids`` (B, T), runs of equal ids: neither attention nor EMA crosses a run
    and positions start anew, so each document gets the logits that it gets alone.
    """

    def __init__(self, config: DecoderConfig) -> None:
        # Not super().__init__(): the fairseq adapter inherits from fairseq's decoder class too, whose __init__ takes other arguments.
        nn.Module.__init__(self)
        self.config = config
        self.embed_scale = math.sqrt(config.dim) if config.scale_embeddings else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, config.padding_idx)
        nn.init.normal_(self.embed_tokens.weight, std=config.dim**-0.5)
        with torch.no_grad():
            self.embed_tokens.weight[config.padding_idx].zero_()
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_positions + config.padding_idx + 1, config.dim, config.padding_idx)
            nn.init.normal_(self.embed_positions.weight, std=config.dim**-0.5)
            with torch.no_grad():
                self.embed_positions.weight[config.padding_idx].zero_()
        self.rotary = Rotary(config.dim // config.heads) if config.position == "rotary" else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.dim)
        self.output_projection = OutputProjection(config.dim, config.vocab_size, config.absent_tokens)
        if config.tie_embeddings:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, std=config.dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.register_load_state_dict_pre_hook(_accept_fairseq_keys)

    def new_cache(self) -> Cache:
        """An empty cache: pass it to successive calls with successive tokens."""
        return Cache([LayerCache() for _ in self.layers])

    def compile_blocks(self) -> None:
        """Compiles each block by itself: short compilation, shared by all blocks of the same shape, parameter names unchanged."""
        for layer in self.layers:
            layer.compile()

    def forward(self, tokens: Tensor, cache: Cache | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for each next token; arguments and errors as in :meth:`features`."""
        return self.output_projection(self.features(tokens, cache, segment_ids))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        segment_ids: Tensor | None = None,
        reduction: str = "sum",
        left_padded: bool | None = None,
    ) -> Tensor:
        """Cross entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T), padding targets not counted; never holds
        all logits.

        An output projection with hooks or an adapter is called, on some rows (N, C) of hidden states at a time.
        """
        hidden = self.features(tokens, None, segment_ids, left_padded)
        output = self.output_projection
        if not is_plain(output, OutputProjection):
            return called_cross_entropy(hidden, output, self.config.vocab_size, targets, self.config.padding_idx,
                reduction)
        return chunked_cross_entropy(
            hidden, output.weight, targets, self.config.padding_idx, reduction, absent=output.absent
        )

    def features(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        segment_ids: Tensor | None = None,
        left_padded: bool | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm.

        Args:
            tokens: (B, T) ids; ``padding_idx`` marks padding, on the left or the right.
            cache: what earlier calls saw; these tokens follow it and are added to it.
            segment_ids: (B, T) documents of packed sequences. Not together with a cache.
            left_padded: whether rows may begin with padding; None: look (which on a GPU waits for the device). Padding on the right
                needs no care, since no real token sees it.

        Raises:
            ValueError: segment_ids together with a cache, right padding of tokens that go into a cache, or, with learned positions,
                more tokens than ``max_positions``.
        """
        config = self.config
        length = tokens.shape[1]
        if cache is not None and segment_ids is not None:
            raise ValueError("packed documents cannot be continued from a cache")
        if segment_ids is not None:
            segment_ids = run_numbers(segment_ids)  # so that equal numbers mean the same run
        is_padding = tokens.eq(config.padding_idx)
        if left_padded is None:
            left_padded = not tokens.is_meta and bool(is_padding[:, 0].any())  # on meta there is nothing to look at
        padding = is_padding if left_padded else None
        frozen = cache is not None and cache.frozen
        if cache is not None and not frozen and length > 1 and bool(is_padding[:, -1].any()):
            raise ValueError("tokens that go into a cache must be padded on the left, not on the right")

        if left_padded or cache is not None or segment_ids is not None:
            positions = self._positions(is_padding, cache, segment_ids)
        else:
            positions = torch.arange(length, device=tokens.device)[None]
        x = self.embed_scale * self.embed_tokens(tokens)
        if config.position == "learned":
            self._check_length(length + (0 if cache is None else cache.length))
            x = x + self.embed_positions(
                torch.where(is_padding, config.padding_idx, positions + config.padding_idx + 1)
            )
        elif config.position == "sinusoidal":
            table = sinusoids(positions + config.padding_idx + 1, config.dim)
            x = x + table.masked_fill(is_padding[..., None], 0.0).to(x.dtype)
        x = self.dropout(x)
        rotation = None if self.rotary is None else self.rotary(positions)

        mask = self._mask(length, padding, cache, segment_ids, tokens.device)
        for layer, past in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
            arguments = dict(mask=mask, rotation=rotation, cache=past, padding=padding, segment_ids=segment_ids)
            if config.checkpoint_activations and self.training:
                x = checkpoint(functools.partial(layer, **arguments), x, use_reentrant=False)
            else:
                x = layer(x, **arguments)
        if cache is not None and not frozen:
            cache.length += length
        return self.layer_norm(x)

    def _positions(self, is_padding: Tensor, cache: Cache | None, segment_ids: Tensor | None) -> Tensor:
        """(B, T) positions from 0, padding not counted; remembers in ``cache`` where the next call goes on."""
        count = (~is_padding).long().cumsum(1)
        if segment_ids is not None:
            starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False)
            # real tokens before the current document: the running count just before its first token, carried along the run
            before = torch.where(starts, count - (~is_padding).long(), 0).cummax(1).values
            return (count - before - 1).clamp(min=0)
        if cache is None:
            return (count - 1).clamp(min=0)
        offset = 0 if cache.positions is None else cache.positions[:, None]
        if not cache.frozen:
            cache.positions = (offset + count)[:, -1]
        return (offset + count - 1).clamp(min=0)

    def _mask(
        self, length: int, padding: Tensor | None, cache: Cache | None, segment_ids: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """(B or 1, 1, T, S) True where attention is allowed, or None where causality alone says it (see CausalSelfAttention)."""
        past = 0 if cache is None else cache.length
        if cache is not None and (padding is not None or cache.padding is not None):
            batch = (padding if padding is not None else cache.padding).shape[0]  # type: ignore[union-attr]
            old = (
                cache.padding
                if cache.padding is not None
                else torch.zeros(batch, past, dtype=torch.bool, device=device)
            )
            new = padding if padding is not None else torch.zeros(batch, length, dtype=torch.bool, device=device)
            padding = torch.cat([old, new], 1)
            if not cache.frozen:
                cache.padding = padding
        if padding is None and segment_ids is None and (past == 0 or length == 1):
            return None
        query = torch.arange(past, past + length, device=device)[:, None]
        key = torch.arange(past + length, device=device)
        allowed = (key <= query)[None, None]
        if segment_ids is not None:
            allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        if padding is not None:
            # a padding token may look at itself: a row with nothing to look at is NaN
            allowed = allowed & (~padding[:, None, None, :] | (key == query))
        return allowed

    def _check_length(self, length: int) -> None:
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens exceed the {self.config.max_positions} learned positions of the model")


def _accept_fairseq_keys(module: Decoder, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """fairseq checkpoints hold two entries that are no parameters, and old ones lack the tied output embedding.

    Raises UserError for a checkpoint of an untied model, one of whose two embeddings a tied model would lose.
    """
    state.pop(f"{prefix}version", None)
    state.pop(f"{prefix}embed_positions._float_tensor", None)
    embedding = state.get(f"{prefix}embed_tokens.weight")
    if embedding is not None and module.output_projection.weight is module.embed_tokens.weight:
        output = state.setdefault(f"{prefix}output_projection.weight", embedding)
        if output is embedding:
            return
        # not allclose: fully sharded tensors have none
        if output.shape == embedding.shape and not bool(
            (output.eq(embedding) | (output.isnan() & embedding.isnan())).all()
        ):
            raise UserError(
                "the checkpoint's output projection differs from its embedding: such a model needs --untie-embeddings"
            )


def sinusoids(rows: Tensor, dim: int) -> Tensor:
    """fairseq's sinusoidal embedding of table rows (B, T) -> (B, T, dim) fp32: sines, then cosines, 10000^(-k / (dim/2 - 1))."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float, device=rows.device) * -(math.log(10000) / (half - 1)))
    angle = rows[..., None].float() * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, dim % 2))


def document_ids(tokens: Tensor, eos_idx: int) -> Tensor:
    """Segment ids (B, T) of packed inputs, in which each document begins with the end-of-sentence token that its text follows."""
    return tokens.eq(eos_idx).cumsum(1)
