"""``--arch gpt_lm_SIZE``, ``momentum_lm_SIZE`` and the like: fairseq's view of :class:`momentum_lm.model.Decoder`."""

import argparse
import dataclasses
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II, DictConfig, OmegaConf
from torch import Tensor

from momentum_lm.errors import UserError, flags, named
from momentum_lm.fairseq_plugin.training import building_place
from momentum_lm.formats import decoder_options
from momentum_lm.formats.state_dict import drop_extras, extras
from momentum_lm.model import Cache, Decoder, DecoderConfig
from momentum_lm.model.sizes import architectures

_Field = tuple[str, Any, Any]  # as dataclasses.make_dataclass takes it


def _option(name: str, kind: Any, default: Any, help: str) -> _Field:
    return name, kind, dataclasses.field(default=default, metadata={"help": help})


def _own_options(arch: str) -> list[_Field]:
    """Options of the table, with the defaults that the architecture gives them."""
    plain = decoder_options.defaults(arch)
    fields = []
    for name, (_, kind, entry) in decoder_options.table().items():
        if entry.choices and not entry.open:
            kind = ChoiceEnum([*entry.choices, *(decoder_options.ACTIVATIONS if name == "activation_fn" else ())])
        kind = str if entry.open or not (kind in (bool, int, float) or entry.choices) else kind
        if plain[name] is True:  # of a default of True fairseq makes a flag that switches it off
            fields.append(_option(name, Optional[bool], None, f"{entry.help}; in this architecture always"))
        else:
            fields.append(_option(name, kind, plain[name], entry.help))
    return fields


def _stock_options() -> list[_Field]:
    """The other flags of stock ``transformer_lm``: what means an option of ours, and what is refused by name."""
    fields = []
    for f in dataclasses.fields(TransformerLanguageModelConfig):
        if f.name in decoder_options.TRANSLATED:
            text = f"as of stock transformer_lm: {f.metadata['help']}"
            fields.append(_option(f.name, Optional[f.type], None, text))
        elif f.name in decoder_options.REFUSED or f.name in decoder_options.WITHOUT_EFFECT:
            fields.append(_option(f.name, f.type, f.default, argparse.SUPPRESS))
    return fields


def _configuration(arch: str) -> type[FairseqDataclass]:
    """The flags of an architecture: what the decoder's table of options says, and what fairseq gives it."""
    fields = {field[0]: field for field in (*_own_options(arch), *_stock_options())} | {
        "max_target_positions": ("max_target_positions", Optional[int], II("task.max_target_positions")),
        "tokens_per_sample": ("tokens_per_sample", int, II("task.tokens_per_sample")),
        "compile": _option("compile", bool, False, "compile each block with torch.compile"),
        "_name": ("_name", str, arch),
    }
    return dataclasses.make_dataclass(f"{arch}_config", fields.values(), bases=(FairseqDataclass,))


class FairseqDecoder(FairseqIncrementalDecoder, Decoder):
    """The decoder with the calling conventions of fairseq's incremental decoders."""

    def __init__(self, config: DecoderConfig, dictionary: Any) -> None:
        Decoder.__init__(self, config)  # that of fairseq's classes would make another one
        self.register_load_state_dict_pre_hook(drop_extras)
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
        """Logits (B, T, V), or hidden states with ``features_only``, or with ``targets`` the summed loss; and no
        attention weights.

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
        destination |= {f"{prefix}{name}": value for name, value in extras(self.config).items()}


class DoesNotFit(UserError, RuntimeError):
    """Tensors that are not the model's. Also a RuntimeError, as torch's own."""


class MomentumLanguageModel(FairseqLanguageModel):
    """GPT with or without momentum attention; one subclass per architecture, so that each has complete
    hydra defaults.
    """

    @classmethod
    def build_model(cls, cfg: DictConfig, task: Any) -> "MomentumLanguageModel":
        if cfg.max_target_positions is None:
            cfg.max_target_positions = cfg.tokens_per_sample
        dictionary = task.target_dictionary
        if len(dictionary) != len(task.source_dictionary):
            raise UserError(
                f"--output-dictionary-size: --arch {cfg._name} predicts all "
                f"{len(task.source_dictionary)} entries of the dictionary, not the first ones alone; leave it out"
            )
        options: Any = (
            OmegaConf.to_container(cfg, enum_to_str=True, resolve=True) if OmegaConf.is_config(cfg) else vars(cfg)
        )
        symbols = (len(dictionary), dictionary.pad(), dictionary.eos())
        try:
            config = decoder_options.from_fairseq(options, *symbols, names=flags())
        except decoder_options.Unsupported as error:
            raise UserError(error, "; leave it out, or choose --arch transformer_lm_gpt") from error
        with building_place():
            decoder = FairseqDecoder(config, dictionary)
        if cfg.compile:
            decoder.compile_blocks()
        return cls(decoder)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """As fairseq's. Raises DoesNotFit, one line, for tensors that are not this model's by name or shape."""
        try:
            with named(decoder_options.model_flags):
                return super().load_state_dict(state_dict, strict, **kwargs)
        except RuntimeError as error:
            first, *others = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            more = f" (and {len(others)} more)" if others else ""
            raise DoesNotFit(f"the checkpoint's tensors do not fit the model: {first[:300]}{more}") from error

    def max_positions(self) -> int:
        return self.decoder.max_positions()


def _register(arch: str) -> None:
    model = type(arch, (MomentumLanguageModel,), {"__doc__": MomentumLanguageModel.__doc__})
    register_model(arch, dataclass=_configuration(arch))(model)


ARCHITECTURES = architectures()
for _name in ARCHITECTURES:
    _register(_name)
