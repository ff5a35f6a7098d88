"""``--arch gpt_lm_SIZE`` and ``--arch momentum_lm_SIZE``: fairseq's view of :class:`momentum_lm.model.Decoder`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from omegaconf import II, DictConfig, OmegaConf
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin.training import building_place
from momentum_lm.model import Cache, Decoder, DecoderConfig
from momentum_lm.model.decoder import ACTIVATIONS, DEFAULT_ETA, MOMENTUM_KINDS, POSITIONS
from momentum_lm.model.sizes import Size, architecture, architectures


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LanguageModelConfig(FairseqDataclass):
    """The flags of every architecture here; sizes and the kind of momentum get their defaults from its name."""

    decoder_embed_dim: int = _option(192, "width")
    decoder_ffn_embed_dim: int = _option(768, "width of the feed-forward layers")
    decoder_layers: int = _option(3, "number of layers")
    decoder_attention_heads: int = _option(3, "number of attention heads")
    activation_fn: ChoiceEnum(list(ACTIVATIONS)) = _option("gelu", "activation of the feed-forward layers")  # type: ignore[valid-type]
    dropout: float = _option(0.0, "dropout probability")
    attention_dropout: float = _option(0.0, "dropout probability of attention weights")
    activation_dropout: float = _option(0.0, "dropout probability after the activation in the feed-forward layers")
    position: ChoiceEnum(list(POSITIONS)) = _option("sinusoidal", "position embedding")  # type: ignore[valid-type]
    no_scale_embedding: bool = _option(False, "do not multiply embeddings by the square root of the width")
    untie_embeddings: bool = _option(False, "output projection with weights of its own")
    checkpoint_activations: bool = _option(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = _option(False, "compile each block with torch.compile")
    momentum_kind: ChoiceEnum(list(MOMENTUM_KINDS)) = _option(  # type: ignore[valid-type]
        "none",
        "momentum attention: ema, the paper's formula with one decay per head; multi_ema, eight decays per channel",
    )
    momentum_eta: float = _option(DEFAULT_ETA, "decay of the moving average of values, between 0 and 1")
    momentum_learned: bool = _option(False, "learn one decay per head, from --momentum-eta")
    momentum_normalize: bool = _option(False, "scale the moving average so that its weights sum to 1")
    momentum_gate: ChoiceEnum(["none", "zero"]) = _option(  # type: ignore[valid-type]
        "none", "zero: a learned factor per head that starts at 0, to add momentum to a trained model"
    )
    absent_tokens: str = _option(
        "", "ids of tokens that are never predicted, with commas between, as the configuration of a converted model has"
    )
    max_target_positions: Optional[int] = II("task.max_target_positions")
    tokens_per_sample: int = II("task.tokens_per_sample")


class FairseqDecoder(Decoder, FairseqIncrementalDecoder):
    """The decoder with the calling conventions of fairseq's incremental decoders."""

    def __init__(self, config: DecoderConfig, dictionary: Any) -> None:
        Decoder.__init__(self, config)
        self.dictionary = dictionary
        self.onnx_trace = False
        self.adaptive_softmax = None

    def forward(  # type: ignore[override]
        self,
        prev_output_tokens: Tensor,
        encoder_out: None = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        src_lengths: Tensor | None = None,
        segment_ids: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits (B, T, V), or hidden states with ``features_only``, or with ``targets`` the summed loss; and no attention weights.

        With ``incremental_state`` only the tokens that it has not seen yet are computed and returned.
        """
        extra = {"attn": [None]}  # no attention weights: SequenceGenerator asks
        if targets is not None:
            return self.loss(prev_output_tokens, targets, segment_ids, left_padded=False), extra
        cache: Cache | None = None
        if incremental_state is not None:
            cache = incremental_state.setdefault("momentum_lm", self.new_cache())
            prev_output_tokens = prev_output_tokens[:, cache.length :]
        left_padded = False if self.training else None  # fairseq's language modelling data is padded on the right
        x = self.features(prev_output_tokens, cache, segment_ids, left_padded)
        return (x if features_only else self.output_projection(x)), extra

    def extract_features(self, prev_output_tokens: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.forward(prev_output_tokens, features_only=True, **kwargs)

    def output_layer(self, features: Tensor, **kwargs: Any) -> Tensor:
        return self.output_projection(features)

    def max_positions(self) -> int:
        return self.config.max_positions

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> None:
        if "momentum_lm" in incremental_state:
            incremental_state["momentum_lm"].select(new_order)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # what stock transformer_lm asks for in a strict load: its format version, and a buffer that only tells the device
        destination[f"{prefix}version"] = torch.tensor([3.0])
        if self.config.position == "sinusoidal":
            destination[f"{prefix}embed_positions._float_tensor"] = torch.zeros(1)


class DoesNotFit(UserError, RuntimeError):
    """Tensors that are not the model's. Also a RuntimeError, as torch's own."""


class MomentumLanguageModel(FairseqLanguageModel):
    """GPT with or without momentum attention; one subclass per architecture, so that each has complete hydra defaults."""

    @classmethod
    def build_model(cls, cfg: DictConfig, task: Any) -> "MomentumLanguageModel":
        if cfg.max_target_positions is None:
            cfg.max_target_positions = cfg.tokens_per_sample
        dictionary = task.target_dictionary
        if len(dictionary) != len(task.source_dictionary):
            raise UserError(
                "--output-dictionary-size: --arch gpt_lm_* and momentum_lm_* predict all "
                f"{len(task.source_dictionary)} entries of the dictionary, not the first ones alone; leave it out"
            )
        options = OmegaConf.to_container(cfg, enum_to_str=True, resolve=True) if OmegaConf.is_config(cfg) else vars(cfg)
        config = DecoderConfig.from_fairseq(options, len(dictionary), dictionary.pad(), dictionary.eos())
        with building_place():
            decoder = FairseqDecoder(config, dictionary)
        if cfg.compile:
            decoder.compile_blocks()
        return cls(decoder)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True, **kwargs: Any
    ) -> Any:
        """As fairseq's. Raises DoesNotFit, one line, for tensors that are not this model's by name or shape."""
        try:
            return super().load_state_dict(state_dict, strict, **kwargs)
        except RuntimeError as error:
            first, *others = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            more = f" (and {len(others)} more)" if others else ""
            raise DoesNotFit(f"the checkpoint's tensors do not fit the model: {first[:300]}{more}") from error

    def max_positions(self) -> int:
        return self.decoder.max_positions()


def _register(name: str, size: Size, momentum_kind: str) -> None:
    defaults = {
        "_name": name,
        "decoder_layers": size.layers,
        "decoder_embed_dim": size.dim,
        "decoder_ffn_embed_dim": 4 * size.dim,
        "decoder_attention_heads": size.heads,
        "momentum_kind": momentum_kind,
    }
    types = {f.name: f.type for f in dataclasses.fields(LanguageModelConfig)}
    fields = [
        (
            key,
            types[key],
            dataclasses.field(default=value, metadata=dict(LanguageModelConfig.__dataclass_fields__[key].metadata)),
        )
        for key, value in defaults.items()
    ]
    config = dataclasses.make_dataclass(f"{name}_config", fields, bases=(LanguageModelConfig,))
    register_model(name, dataclass=config)(
        type(name, (MomentumLanguageModel,), {"__doc__": MomentumLanguageModel.__doc__})
    )


ARCHITECTURES = architectures()
for _name in ARCHITECTURES:
    _register(_name, *architecture(_name))
