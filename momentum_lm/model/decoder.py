"""The decoder: embedding, blocks of attention and feed-forward, output. Parameters are named as in fairseq."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from momentum_lm.errors import UserError, arg
from momentum_lm.ops.naive import run_numbers

from . import packed
from .attention import CausalSelfAttention
from .config import DecoderConfig, RotaryScaling
from .filters import Around, make_filter
from .loss import called_cross_entropy, chunked_cross_entropy
from .mlp import ACTIVATIONS, activated_linear
from .norms import make_norm
from .output import OutputProjection
from .plain import is_plain
from .positions import Rotary, sinusoids
from .precision import autocast_once
from .state import Cache, LayerCache


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); or, with a parallel residual, x + attention(norm(x)) +
    feed-forward(norm(x)), with a norm each.
    """

    def __init__(self, config: DecoderConfig, layer: int = 0) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention(config, layer)
        self.self_attn_layer_norm = make_norm(config)
        bias = config.bias == "all"
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias)
        self.fc_gate = nn.Linear(config.dim, config.ffn_dim, bias) if config.ffn == "gated" else None
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias)
        self.final_layer_norm = make_norm(config)
        self.momentum_input = make_filter(config, "input")
        self.momentum_ffn = make_filter(config, "ffn")
        self.momentum_ffn_hidden = make_filter(config, "ffn_hidden")
        self.activation = ACTIVATIONS[config.activation]
        self.parallel = config.parallel_residual
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor, **attention: Any) -> Any:
        """x (B, T, C) -> (B, T, C), and with ``below`` this layer's; the rest goes to attention's ``forward``."""
        around = Around(*(attention.get(name) for name in Around._fields))
        inner = around.wide("input", self.momentum_input, self.self_attn_layer_norm(x))
        attended, below = self.self_attn(inner, **attention), None
        if "below" in attention:
            attended, below = attended
        attended = x + self.dropout(attended)
        inner = self.final_layer_norm(x if self.parallel else attended)
        x = attended + self.dropout(self._feed_forward(around.wide("ffn", self.momentum_ffn, inner), around))
        return x if below is None else (x, below)

    def _feed_forward(self, x: Tensor, around: Around) -> Tensor:
        """(B, T, C) -> (B, T, C): ``fc2(activation(fc1(x)))``, gated ``fc2(activation(fc_gate(x)) * fc1(x))``."""
        if self.fc_gate is None:
            activated, factor = self.fc1(x), None
        else:
            x = autocast_once(x)
            activated, factor = self.fc_gate(x), self.fc1(x)
        activated = around.wide("ffn_hidden", self.momentum_ffn_hidden, activated)
        if self.training and self.activation_dropout.p > 0:
            inner = self.activation(activated)
            return self.fc2(self.activation_dropout(inner if factor is None else inner * factor))
        return activated_linear(activated, self.fc2, self.activation, factor)


class Decoder(nn.Module):
    """Pre-norm decoder, of GPT's, Llama's or GPT-NeoX's form. Tokens (B, T) in, logits (B, T, V) out; padding (left or
    right) and packed documents change nothing.

    Documents of a packed sequence are given by ``segment_ids`` (B, T), runs of equal ids: neither attention nor a
    filter crosses a run, and positions start anew, so each document gets the logits that it gets alone.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_scale = math.sqrt(config.dim) if config.scale_embeddings else 1.0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, config.padding_idx)
        nn.init.normal_(self.embed_tokens.weight, std=config.dim**-0.5)
        with torch.no_grad():
            self.embed_tokens.weight[config.padding_idx].zero_()
        if config.position == "learned":
            rows = config.max_positions + config.padding_idx + 1  # as fairseq counts them
            self.embed_positions = nn.Embedding(rows, config.dim, config.padding_idx)
            nn.init.normal_(self.embed_positions.weight, std=config.dim**-0.5)
            with torch.no_grad():
                self.embed_positions.weight[config.padding_idx].zero_()
        scaling = RotaryScaling.parse(config.rotary_scaling)
        rotary = config.position == "rotary"
        self.rotary = Rotary(config.rotary_dim, config.rotary_base, scaling) if rotary else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.momentum_embedding = make_filter(config, "embedding")
        self.layer_norm = make_norm(config)
        self.output_projection = OutputProjection(config.dim, config.vocab_size, config.absent_tokens)
        if config.tie_embeddings:
            self.output_projection.weight = self.embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, std=config.dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.register_load_state_dict_pre_hook(_check_tie)

    def new_cache(self) -> Cache:
        """An empty cache: pass it to successive calls with successive tokens."""
        return Cache([LayerCache() for _ in self.layers])

    def compile_blocks(self) -> None:
        """Compiles each block by itself: short compilation, shared by all blocks of the same shape, parameter names
        unchanged.
        """
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
            return called_cross_entropy(
                hidden, output, self.config.vocab_size, targets, self.config.padding_idx, reduction
            )
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
            left_padded: whether rows may begin with padding; None: look (which on a GPU waits for the device). Padding
                on the right needs no care, since no real token sees it.

        Raises:
            ValueError: segment_ids together with a cache, right padding of tokens that go into a cache, or, with
                learned positions, more tokens than ``max_positions``.
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
        if config.position == "learned":
            self._check_length(length + (0 if cache is None else cache.length))
        around = Around(segment_ids, padding, None if cache is None else cache.embedding)
        x = self._embed(tokens, is_padding, positions, around)
        across = {"below": x.new_zeros(())} if "depth" in config.places else {}
        rotation = None if self.rotary is None else self.rotary(positions)

        mask = self._mask(length, padding, cache, segment_ids, tokens.device)
        for layer, past in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
            arguments = dict(mask=mask, rotation=rotation, cache=past, padding=padding, segment_ids=segment_ids)
            if config.checkpoint_activations and self.training:
                x = checkpoint(functools.partial(layer, **arguments, **across), x, use_reentrant=False)
            else:
                x = layer(x, **arguments, **across)
            if across:
                x, across["below"] = x
        if cache is not None and not frozen:
            cache.length += length
        return self.layer_norm(x)

    def _embed(self, tokens: Tensor, is_padding: Tensor, positions: Tensor, around: Around) -> Tensor:
        """Tokens (B, T) at positions (B or 1, T) -> embeddings (B, T, C); padding has no position."""
        config = self.config
        x = around.wide("embedding", self.momentum_embedding, self.embed_scale * self.embed_tokens(tokens))
        rows = positions + config.padding_idx + 1
        if config.position == "learned":
            x = x + self.embed_positions(torch.where(is_padding, config.padding_idx, rows))
        elif config.position == "sinusoidal":
            x = x + sinusoids(rows, config.dim).masked_fill(is_padding[..., None], 0.0).to(x.dtype)
        return self.dropout(x)

    def _positions(self, is_padding: Tensor, cache: Cache | None, segment_ids: Tensor | None) -> Tensor:
        """(B, T) positions from 0, padding not counted; remembers in ``cache`` where the next call goes on."""
        count = (~is_padding).long().cumsum(1)
        if segment_ids is not None:
            starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=False)
            # real tokens before the current document: the running count just before its first token, carried along the
            # run
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
    ) -> Tensor | packed.BlockMask | None:
        """(B or 1, 1, T, S) True where attention is allowed, or None if plain causal masking is enough (see
        CausalSelfAttention); for packed documents alone, where it can be used, FlexAttention's mask.
        """
        dropout = self.training and self.config.attention_dropout > 0
        if segment_ids is not None and padding is None and packed.usable(device, self.config.head_dim, dropout):
            return packed.document_mask(segment_ids)
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


def _check_tie(module: Decoder, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A tied model takes its output projection from the embedding where it is not given, and refuses another one.

    Raises UserError for the weights of an untied model, one of whose two embeddings it would lose.
    """
    embedding = state.get(f"{prefix}embed_tokens.weight")
    if embedding is None or not module.config.tie_embeddings:
        return
    output = state.setdefault(f"{prefix}output_projection.weight", embedding)
    if output is embedding or output.shape != embedding.shape:
        return
    # not allclose: fully sharded tensors have none
    if not bool((output.eq(embedding) | (output.isnan() & embedding.isnan())).all()):
        raise UserError(
            "the checkpoint's output projection differs from its embedding: such a model needs ",
            arg(tie_embeddings=False),
        )
