"""Our decoder, from a fairseq checkpoint: one of ours, a stock ``transformer_lm*``, or a published dense LM."""

from __future__ import annotations

import ast
import difflib
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from momentum_lm.errors import TornCheckpoint, UserError
from momentum_lm.files import Unchanged, file_sha256
from momentum_lm.formats import options as checkpoint_options
from momentum_lm.formats.checkpoint import load_checkpoint, trusted
from momentum_lm.formats.pickles import shown
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.attention import Cache
from momentum_lm.model.decoder import document_ids
from momentum_lm.model.filters import NOTES
from momentum_lm.model.precision import Float32
from momentum_lm.text.dictionary import BOS, DIGEST, EOS, check_symbols
from momentum_lm.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

from .inference import inference
from .scoring import distinct_positions, target_log_probs
from .shards import is_part, join_parts, part_files

CHECKPOINTS = ("model.pt", "checkpoint_best.pt", "checkpoint_last.pt")  # what a folder is searched for, in this order
_OPTIONS = (  # those of fairseq's and our own options that say what a decoder computes
    *("decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_layers", "decoder_attention_heads", "activation_fn"),
    *("position", "no_scale_embedding", "untie_embeddings", "max_target_positions", "absent_tokens"),
    *("momentum_kind", "momentum_eta", "momentum_learned", "momentum_normalize", "momentum_gate"),
)
_IGNORED = re.compile(r"(version|embed_positions\._float_tensor)$")


class NativeLM:
    """A decoder in evaluation mode, and where it came from.

    ``bos`` is what its training inputs began with: ``</s>`` unless fairseq's ``--add-bos-token`` was given. Where a checkpoint does not
    say, it is ``<s>``, as in the authors' experiments. Demonstrations are separated by ``</s>``, as documents are in training. A model
    ``in_training`` is left as it is: whoever asks it something sees to its evaluation mode.
    """

    separator = (EOS,)
    special_tokens: Mapping[str, int] = {"<s>": BOS, "</s>": EOS}

    def __init__(
        self,
        model: Decoder,
        path: Path,
        packed_documents: bool = False,
        bos: tuple[int, ...] = (BOS,),
        tokenizer_path: str | os.PathLike[str] | None = None,
        in_training: bool = False,
        files: Sequence[Path] = (),
        unchanged: Unchanged | None = None,
        trained_on: str | os.PathLike[str] | None = None,
        dictionary: str | None = None,
    ) -> None:
        self.model = model if in_training else model.eval().requires_grad_(False)
        self.path = path
        self.files = files or [path]  # a checkpoint in parts has several
        self._unchanged = unchanged or Unchanged(self.files)
        self.trained_on = Path(trained_on) if trained_on else None  # the folder of data that the checkpoint names
        self.packed_documents = packed_documents  # whether it was trained on packed documents
        self.bos = bos
        # the digest of its symbols (data.dictionary.symbols_digest), where the checkpoint tells
        self.dictionary = dictionary
        self.tokenizer_path = Path(tokenizer_path) if tokenizer_path else path

    @property
    def name(self) -> str:
        """How messages and reports call the model: its path."""
        return str(self.path)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (momentum's own parameters always stay in fp32)."""
        return self.model.embed_tokens.weight.dtype

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def max_positions(self) -> int:
        """The longest input that the model was made for, in tokens."""
        return self.config.max_positions

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def describe(self) -> dict[str, Any]:
        """What a record says of the model."""
        return {
            "path": self.name,
            "sha256": self.sha256,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": asdict(self.config),
        }

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
        self._unchanged.check()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model. Raises UserError where there is none, or one of another model."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.tokenizer_path} has {tokenizer.vocab_size} entries, but {self.name} has {self.vocab_size}: "
                "name the folder of the data that the model was trained on with --tokenizer"
            )
        whose = f"the tokenizer's dictionary in {self.tokenizer_path}"
        check_symbols(tokenizer.dictionary.symbols, self.dictionary, whose)
        return tokenizer

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
        kept = 2 * c.dim * c.layers * (prefix + length) if keeps else 0
        return (
            self.dtype.itemsize * (kept + 4 * c.dim * (prefix + length) + length * (6 * c.dim + 2 * c.ffn_dim))
            + 3 * 4 * c.vocab_size
        )

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


def load_native(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | str | None = None,
    trust: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> NativeLM:
    """Reads a checkpoint file, or the one in a folder (``model.pt``, ``checkpoint_best.pt`` or ``checkpoint_last.pt``),
    whole or in parts (``checkpoint_best-shard0.pt`` and so on; any of them may be named).

    The weights are the file's own memory pages where dtype and device allow it, and what changes them leaves the file
    alone; parts are joined, and others converted tensor by tensor, so that there are never two copies of all.

    The architecture comes from the checkpoint; where it holds none, shapes come from the tensors and the rest from
    ``overrides``: fairseq's model options as a mapping or as the text of a Python dict, such as
    ``{'decoder_attention_heads': 8}``. ``trust`` lifts the limit on what a checkpoint may hold (see
    ``momentum_lm.formats.checkpoint``). ``dtype`` None is fp32, whatever was saved. ``tokenizer`` is a folder or file
    for ``load_tokenizer``; None is beside the checkpoint, or else in the data that the checkpoint says it was trained
    on.

    Raises UserError for a missing or damaged checkpoint, and for a model that the decoder cannot represent.
    """
    path = find_checkpoint(path)
    before = Unchanged([path])
    files, state = _read(path, trust)
    unchanged = Unchanged(files)
    before.check()
    path = files[0]
    try:
        tensors = _tensors(state)
        _check_amount(tensors, files)
        model_cfg, task_cfg = _options(state, trust)
        dictionary = _dictionary_digest(state)
        del state  # or every tensor would be kept until the last one is converted
        options = model_cfg or _options_from_tensors(tensors)
        options = options | _parse_overrides(overrides, options)
        if not model_cfg and "decoder_attention_heads" not in options:
            raise UserError(
                "the checkpoint does not say its number of heads: add --model-overrides \"{'decoder_attention_heads': "
                'N}"'
            )
        fixed = options.get("momentum_kind") == "ema" and not options.get("momentum_learned")
        if not model_cfg and fixed and "momentum_eta" not in options:
            raise UserError(
                "the checkpoint does not say its momentum's decay: add --model-overrides \"{'momentum_eta': ETA}\""
            )
        for name in ("tokens_per_sample", "max_target_positions"):
            options.setdefault(name, task_cfg.get(name))
        config = DecoderConfig.from_fairseq(options, tensors["embed_tokens.weight"].shape[0])
        checkpoint_options.check_sizes(tensors, config.layers, config.dim, config.ffn_dim)
        model = _build(config, tensors, torch.device(device), dtype or torch.float32)
        bos = BOS if not task_cfg or checkpoint_options.flag(task_cfg, "add_bos_token") else EOS
        packed = checkpoint_options.flag(task_cfg, "packed_documents")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    data = _data_folder(task_cfg)
    if tokenizer is None and data and not has_tokenizer(path.parent):
        tokenizer = data if has_tokenizer(data) else None
    return NativeLM(
        model, path, packed, (bos,), tokenizer, files=files, unchanged=unchanged, trained_on=data, dictionary=dictionary
    )


def _dictionary_digest(state: Mapping[str, Any]) -> str | None:
    """The digest of the symbols that the checkpoint was trained with (data.dictionary.symbols_digest), if our task
    wrote it.
    """
    task_state = state.get("task_state")
    digest = task_state.get(DIGEST) if isinstance(task_state, Mapping) else None
    return digest if isinstance(digest, str) else None


def _data_folder(task_cfg: Mapping[str, Any]) -> str:
    """The (first) folder of the data that the checkpoint says it was trained on, where that is here; else nothing."""
    data = task_cfg.get("data")
    data = data[0] if isinstance(data, (list, tuple)) and data else data
    folder = data.split(os.pathsep)[0] if isinstance(data, str) else ""
    try:
        return folder if folder and os.path.isdir(folder) else ""
    except (OSError, ValueError):  # what cannot be a path: too long, or with a null byte
        return ""


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``path`` means, or the first of its parts. Raises UserError if there is none."""
    path = Path(path)
    if not path.is_dir():
        return path
    names = [form for name in CHECKPOINTS for form in (name, name.replace(".pt", "-shard0.pt"))]
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise UserError(f"{path} holds no checkpoint ({', '.join(CHECKPOINTS)}); name the file itself")
    return found


def _read(path: Path, trust: bool) -> tuple[list[Path], dict[str, Any]]:
    """The checkpoint's files, and what it holds, its tensors mapped. The optimizer's state, twice the model, is never read."""
    state = load_checkpoint(path, trust=trust, mmap=True)
    try:
        files = part_files(path, state)
        if not files:
            return [path], state
        return files, join_parts([load_checkpoint(file, trust=trust, mmap=True) for file in files])
    except TornCheckpoint:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's state dict under this package's names, from the forms that fairseq's versions have written."""
    weights = checkpoint_options.weights(state)
    if "decoder.embed_tokens.weight" not in weights:
        raise UserError(
            "it holds no decoder-only language model (no decoder.embed_tokens.weight); "
            "is it another kind of checkpoint?"
        )
    foreign = next((name for name in weights if not name.startswith("decoder.")), None)
    if foreign is not None:
        raise UserError(f"it holds more than a decoder-only language model, such as {shown(foreign)}")
    tensors: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix("decoder.")
        if _IGNORED.match(name):
            continue
        _check_tensor(name, value)
        fused = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if fused:  # before 2019: queries, keys and values in one matrix
            if not value.dim() or len(value) % 3:
                raise UserError(f"{shown(name)} is {tuple(value.shape)}, which is not queries, keys and values in one")
            found = {
                f"{fused[1]}.{letter}_proj.{fused[2]}": part for letter, part in zip("qkv", value.chunk(3), strict=True)
            }
        elif name == "embed_out":  # an untied output projection, before 2020
            found = {"output_projection.weight": value}
        else:
            found = {name: value}
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise UserError(f"it holds {shown(twice)} twice, under an old name too")
        tensors |= found
    embedding = tensors["embed_tokens.weight"]
    if embedding.dim() != 2:
        raise UserError(f"embed_tokens.weight is {tuple(embedding.shape)}, which is no matrix of embeddings")
    tensors.setdefault("output_projection.weight", embedding)  # tied, before 2020
    return tensors


def _check_tensor(name: str, value: Any) -> None:
    """Raises UserError for what cannot be a decoder's parameter, before it is converted to one in silence."""
    if not isinstance(value, Tensor):
        raise UserError(f"{shown(name)} is no tensor; the checkpoint is damaged, or of another program")
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        raise UserError(f"{shown(name)} is sparse, quantised or without values; save it as an ordinary tensor")
    if not value.is_floating_point() and name.rpartition(".")[2] not in NOTES:
        raise UserError(
            f"{shown(name)} is of {str(value.dtype).removeprefix('torch.')}, and weights are floating-point numbers"
        )


def _check_amount(tensors: Mapping[str, Tensor], files: Sequence[Path]) -> None:
    """Tensors of one storage under many names would be many, once they are converted. Only the output projection may be
    another's.
    """
    own = {name: value for name, value in tensors.items() if name != "output_projection.weight"}
    told, held = sum(value.nbytes for value in own.values()), sum(file.stat().st_size for file in files)
    if told > held:
        raise UserError(
            f"its tensors have {told:,} bytes, and the checkpoint has {held:,}: some are the same under several names"
        )


def check_fairseq_model(state: Mapping[str, Any]) -> None:
    """Whether a model of ours can be made as a checkpoint's options say: fairseq makes it before it looks at the
    tensors.

    ``state`` is what fairseq made of a checkpoint. Raises UserError; says nothing of models that are not ours.
    """
    cfg = state.get("cfg")
    options = cfg.get("model") if isinstance(cfg, Mapping) else None
    if not isinstance(options, Mapping) or "position" not in options:
        return
    prefix = "decoder."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in checkpoint_options.weights(state).items()
        if name.startswith(prefix)
    }
    for name, value in tensors.items():
        if not _IGNORED.match(name):
            _check_tensor(name, value)
    config = DecoderConfig.from_fairseq({name: options.get(name) for name in options}, 1 << 40)
    divided = is_part(state)
    positions = config.max_positions + 2 if config.position == "learned" else 0
    checkpoint_options.check_sizes(tensors, config.layers, config.dim, config.ffn_dim, positions, divided)


def _options(state: dict[str, Any], trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """fairseq's options of the model and of the task; empty where the checkpoint holds none."""
    if not (trust or trusted()):
        checkpoint_options.check_options(state)
    cfg = state.get("cfg")
    if isinstance(cfg, Mapping):
        return checkpoint_options.mapping(cfg.get("model"), "cfg.model"), checkpoint_options.mapping(
            cfg.get("task"), "cfg.task"
        )
    arguments = checkpoint_options.mapping(state.get("args"), "args")  # before 2020: one namespace for all
    return arguments, arguments


def _options_from_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the tensors show. What they do not show is that of the fairseq dense LMs: gelu, scaled embeddings,
    sinusoidal positions, 2048."""
    embedding, output = tensors["embed_tokens.weight"], tensors["output_projection.weight"]
    options: dict[str, Any] = {
        "decoder_embed_dim": embedding.shape[1],
        "decoder_layers": checkpoint_options.num_layers(tensors),
        "activation_fn": "gelu",
        "dropout": 0.0,
        "position": "sinusoidal",
        "untie_embeddings": not (output.shape == embedding.shape and torch.equal(output, embedding)),
        "max_target_positions": 2048,
    }
    if "layers.0.fc1.weight" in tensors:
        options["decoder_ffn_embed_dim"] = _rows(tensors, "layers.0.fc1.weight")
    if "embed_positions.weight" in tensors:
        options |= {"position": "learned", "max_target_positions": _rows(tensors, "embed_positions.weight") - 2}
    momentum = {
        name.rpartition(".")[2]: value
        for name, value in tensors.items()
        if name.startswith("layers.0.self_attn.momentum.")
    }
    if momentum:
        options["momentum_kind"] = "multi_ema" if "delta" in momentum else "ema"
        options["momentum_learned"] = "decay_logit" in momentum
        options["momentum_normalize"] = "normalized" in momentum
        if "fixed_log_decay" in momentum and _rows(momentum, "fixed_log_decay"):
            options["momentum_eta"] = _eta(float(momentum["fixed_log_decay"].flatten()[0]))
        options["momentum_gate"] = "zero" if "gate" in momentum else "none"
        if options["momentum_kind"] == "ema":
            heads = [tensor.shape[0] for tensor in momentum.values() if tensor.dim()]
            options |= {"decoder_attention_heads": heads[0]} if heads else {}
    return options


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    if not tensors[name].dim():
        raise UserError(f"{name} is a single number, and should have rows")
    return len(tensors[name])


def _eta(log_decay: float) -> float:
    """The shortest decimal number whose logarithm is the fp32 number ``log_decay``. Raises UserError for that of no
    decay.
    """
    if not -100 < log_decay < 0:
        raise UserError(f"its fixed_log_decay is {log_decay:g}, which is not the logarithm of a decay between 0 and 1")
    candidates = (float(f"{math.exp(log_decay):.{digits}g}") for digits in range(1, 18))
    fitting = (eta for eta in candidates if 0 < eta < 1 and float(torch.tensor(math.log(eta))) == log_decay)
    return next(fitting, math.exp(log_decay))


def _parse_overrides(overrides: Mapping[str, Any] | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    value: Any = overrides or {}
    if isinstance(overrides, str):
        try:
            value = ast.literal_eval(overrides.strip() or "{}")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(
            f"--model-overrides {overrides!r} is not a Python dict of option names, such as \"{{'decoder_attention_heads': 8}}\""
        )
    known = {*options, *_OPTIONS}
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"--model-overrides: no option is called {shown(key)!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return dict(value)


class _Unfilled(TorchFunctionMode):
    """Within it ``torch.empty`` takes no memory: layers have shapes and no initial values, and what follows from the configuration has its
    values as always."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        place = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **place})


def _build(config: DecoderConfig, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder with these tensors, themselves where they are as wanted; ``tensors`` is emptied."""
    with (
        torch.random.fork_rng(devices=[]),
        _Unfilled(),
    ):  # the few values that are drawn leave the caller's generator as it was
        model = Decoder(config)
    expected = _without_notes(model.state_dict())
    for name in tensors.keys() - _without_notes(tensors).keys():  # old checkpoints lack them, and a model goes without
        del tensors[name]
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        lack, extra = (
            shown(names[0]) + f" and {len(names) - 1} more" * (len(names) > 1) if names else ""
            for names in (missing, unknown)
        )
        parts = [f"lacks {lack}"] * bool(missing) + [f"has {extra}, which the decoder does not"] * bool(unknown)
        raise UserError(f"its tensors do not fit its architecture: the checkpoint {' and '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(expected[name].shape)} by the architecture"
            raise UserError(f"its tensors do not fit its architecture: {name} is {shapes}")
    output, embedding = tensors["output_projection.weight"], tensors["embed_tokens.weight"]
    if config.tie_embeddings and output.dtype == embedding.dtype and torch.equal(output, embedding):
        del tensors["output_projection.weight"]  # and the other is taken for it; one that differs is refused
    del output, embedding
    exact = {f"{room}.{name}" for room, m in model.named_modules() if isinstance(m, Float32) for name in m.state_dict()}
    for name in list(tensors):
        fitting = tensors.pop(name).to(device, torch.float32 if name in exact else dtype)
        tensors[name] = fitting
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.output_projection.weight = model.embed_tokens.weight
    return model.to(device)


def _without_notes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in NOTES}
