"""Our decoder as a language model that is evaluated; :mod:`momentum_lm.formats.native` reads its checkpoints."""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from momentum_lm.errors import UserError, arg
from momentum_lm.files import file_sha256
from momentum_lm.formats.native import NativeCheckpoint, read_native
from momentum_lm.model.config import recorded
from momentum_lm.model.filters import filter_names, own_source, remove_filters
from momentum_lm.model.positions import document_ids
from momentum_lm.model.state import Cache
from momentum_lm.text.dictionary import BOS, EOS

from .cpu_fast import inference, limit_onednn_caches
from .scoring import distinct_positions, target_log_probs


class NativeLM(NativeCheckpoint):
    """The decoder of a checkpoint in evaluation mode, as a :class:`momentum_lm.lm.protocol.LanguageModel`.

    Demonstrations are separated by ``</s>``, as documents are in training. A model ``in_training`` is left as it is:
    whoever asks it something sees to its evaluation mode.
    """

    separator = (EOS,)
    special_tokens: Mapping[str, int] = {"<s>": BOS, "</s>": EOS}

    def __init__(self, *checkpoint: Any, in_training: bool = False, **options: Any) -> None:
        super().__init__(*checkpoint, **options)
        self._removed: set[str] = set()
        if not in_training:
            self.model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (momentum's own parameters always stay in fp32)."""
        return self.model.embed_tokens.weight.dtype

    @property
    def max_positions(self) -> int:
        """The longest input that the model was made for, in tokens."""
        return self.config.max_positions

    def describe(self) -> dict[str, Any]:
        """What a record says of the model."""
        return {
            "path": self.name,
            "sha256": self.sha256,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": self._architecture(),
        }

    def _architecture(self) -> dict[str, Any]:
        source = own_source(self.config)
        found = recorded(self.config) | ({} if source is None else {"momentum_code": file_sha256(source)})
        return found | ({"without_momentum": sorted(self._removed)} if self._removed else {})

    def remove_momentum(self, without_momentum: Sequence[int] | str) -> None:
        """Takes the filters of these layers out, counted from 0, or with ``"all"`` those of all layers and of the
        embedding. What the model loses is what it relies on them for, as it was trained with them; it is no model
        trained without. Records say which were taken out.

        Raises UserError, and leaves the model as it is, for a layer that is not there or has no filter.
        """
        wrong, there = arg(without_momentum=without_momentum), filter_names(self.model)
        if without_momentum == "all":
            names = there
        elif isinstance(without_momentum, str) or len(without_momentum) == 0:
            raise UserError(wrong, ": give layers, counted from 0, or all")
        else:
            layers = [operator.index(layer) for layer in without_momentum]
            if not all(0 <= layer < len(self.model.layers) for layer in layers):
                raise UserError(wrong, f": {self.name} has the layers 0 to {len(self.model.layers) - 1}")
            names = [name for name in there if name.startswith(tuple(f"layers.{layer}." for layer in layers))]
            for layer in layers:
                if not any(name.startswith(f"layers.{layer}.") for name in names):
                    raise UserError(wrong, f": layer {layer} of {self.name} has no filter{_instead(there)}")
        if not names:
            raise UserError(wrong, f": {self.name} has no momentum")
        remove_filters(self.model, names)
        self._removed |= set(names)

    @cached_property
    def sha256(self) -> str:
        """Digest of the checkpoint's files, which tells one checkpoint from another wherever it lies."""
        digest = file_sha256(*self.files)
        self.check_unchanged()
        return digest

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer's files and the dictionary's symbols."""
        return self.tokenizer.sha256()

    def check_unchanged(self) -> None:
        """Raises UserError where the checkpoint's files are no longer those that were read."""
        self.unchanged.check()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Dictionary ids of each text."""
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of dictionary ids, with the names of special tokens."""
        special = {BOS: "<s>", EOS: "</s>"}
        runs = itertools.groupby(ids, lambda token: special.get(token, ""))
        return "".join(name * len(list(run)) if name else self.tokenizer.decode(run) for name, run in runs)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens of which each ends a generated text."""
        return (self.config.eos_idx,)

    def row_bytes(self, prefix: int, length: int, keeps: bool = False) -> int:
        """Keys, values and mask of one layer over the whole row, and one block's activations; ``keeps``: and keys and
        values of all layers."""
        c = self.config
        shared, queries = c.kv_heads * c.head_dim, c.heads * c.head_dim
        kept = 2 * shared * c.layers * (prefix + length) if keeps else 0
        inner = 2 * c.dim + 4 * queries + (2 if c.ffn == "plain" else 3) * c.ffn_dim
        block = 4 * shared * (prefix + length) + length * inner
        return self.dtype.itemsize * (kept + block) + 3 * 4 * c.vocab_size

    @inference
    def start(self, ids: Sequence[int]) -> Cache:
        """Keys, values and momentum state after the tokens."""
        cache = self.model.new_cache()
        self.model.features(torch.tensor([list(ids)], device=self.device), cache, left_padded=False)
        return cache

    @inference
    def log_probs(
        self,
        tokens: Tensor,
        padding: Tensor,
        rows: Tensor,
        positions: Tensor,
        targets: Tensor,
        state: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`momentum_lm.lm.protocol.LanguageModel.log_probs`."""
        inputs = tokens.masked_fill(padding, self.config.padding_idx).to(self.device)
        cache = None if state is None else state.rows(len(tokens), frozen=True)
        hidden = self.model.features(inputs, cache, left_padded=bool(padding[:, 0].any()))
        pairs, which = distinct_positions(rows, positions)
        row, position = pairs.to(self.device)

        def logits_of(part: slice) -> Tensor:
            return self.model.output_projection(hidden[row[part], position[part]])

        return target_log_probs(logits_of, which, targets, self.vocab_size, self.config.padding_idx)

    @inference
    def step(self, tokens: Tensor, padding: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """As :meth:`momentum_lm.lm.protocol.LanguageModel.step`; no text holds padding."""
        inputs = tokens.masked_fill(padding, self.config.padding_idx).to(self.device)
        cache = self.model.new_cache() if state is None else state
        hidden = self.model.features(inputs, cache, left_padded=bool(padding[:, 0].any()))[:, -1]
        never = torch.tensor([self.config.padding_idx], device=self.device)
        return self.model.output_projection(hidden).index_fill(1, never, -torch.inf), cache

    @inference
    def token_losses(self, tokens: Tensor, targets: Tensor, packed_documents: bool = False) -> Tensor:
        """-log p of each target in nats, (B, T) fp32 on the CPU; 0 where the target is padding.

        tokens, targets (B, T) int64: input ids and what follows each. Padding on the right changes nothing.
        ``packed_documents``: an end-of-sentence token in ``tokens`` begins a document, and no document sees another.
        """
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        segments = document_ids(tokens, self.config.eos_idx) if packed_documents else None
        losses = self.model.loss(tokens, targets, segments, reduction="none", left_padded=False)
        return losses.float().cpu()


def _instead(there: Sequence[str]) -> str:
    """What else could be taken out."""
    layers = sorted({int(name.split(".")[1]) for name in there if name.startswith("layers.")})
    if layers:
        return f"; layers {', '.join(map(str, layers))} have"
    return "; its filter is at the embedding, which all takes out" if there else "; none has"


def load_native(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | str | None = None,
    trust: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> NativeLM:
    """The model of a checkpoint: arguments and errors as of :func:`momentum_lm.formats.native.read_native`, but
    ``dtype`` None is fp32."""
    limit_onednn_caches()
    return NativeLM(**vars(read_native(path, overrides, trust, device, dtype or torch.float32, tokenizer)))
