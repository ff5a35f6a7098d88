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

from momentum_lm.data.dictionary import BOS, EOS
from momentum_lm.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from momentum_lm.errors import UserError
from momentum_lm.files import file_sha256
from momentum_lm.modules import Decoder, DecoderConfig
from momentum_lm.modules.attention import Cache
from momentum_lm.modules.decoder import document_ids
from momentum_lm.modules.momentum import NOTES
from momentum_lm.modules.precision import Float32

from .inference import inference
from .scoring import target_log_probs
from .shards import join_parts, part_files

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
    ) -> None:
        self.model = model if in_training else model.eval().requires_grad_(False)
        self.path = path
        self.files = files or [path]  # a checkpoint in parts has several
        self.packed_documents = packed_documents  # whether it was trained on packed documents
        self.bos = bos
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
        return file_sha256(*self.files)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model. Raises UserError where there is none, or one of another model."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.tokenizer_path} has {tokenizer.vocab_size} entries, but {self.name} has {self.vocab_size}: "
                "name the folder of the data that the model was trained on with --tokenizer"
            )
        return tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Dictionary ids of each text."""
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of dictionary ids, with the names of special tokens."""
        special = {BOS: "<s>", EOS: "</s>"}
        runs = itertools.groupby(ids, lambda token: special.get(token, ""))
        return "".join(name * len(list(run)) if name else self.tokenizer.decode(run) for name, run in runs)

    def row_bytes(self, prefix: int, length: int) -> int:
        """Keys, values and mask of one layer over the whole row, and one block's activations."""
        c = self.config
        return self.dtype.itemsize * (4 * c.dim * (prefix + length) + length * (6 * c.dim + 2 * c.ffn_dim)) + 3 * 4 * c.vocab_size

    @inference
    def encode_prefix(self, ids: Sequence[int]) -> Cache:
        """Keys, values and momentum state after the tokens."""
        cache = self.model.new_cache()
        self.model.features(torch.tensor([list(ids)], device=self.device), cache, left_padded=False)
        return cache

    @inference
    def log_probs(
        self, tokens: Tensor, padding: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, prefix: Cache | None = None
    ) -> Tensor:
        """As :meth:`momentum_lm.lm.protocol.LanguageModel.log_probs`."""
        inputs = tokens.masked_fill(padding, self.config.padding_idx).to(self.device)
        cache = None if prefix is None else prefix.expand(len(tokens), frozen=True)
        hidden = self.model.features(inputs, cache, left_padded=bool(padding[:, 0].any()))

        def logits_at(row: Tensor, position: Tensor) -> Tensor:
            return self.model.output_projection(hidden[row.to(self.device), position.to(self.device)])

        return target_log_probs(logits_at, rows, positions, targets, self.vocab_size)

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
    """Reads a checkpoint file, or the one in a folder (``model.pt``, ``checkpoint_best.pt`` or ``checkpoint_last.pt``), whole or in parts
    (``checkpoint_best-shard0.pt`` and so on; any of them may be named).

    The weights are the file's own memory pages where dtype and device allow it, and what changes them leaves the file alone; parts are
    joined, and others converted tensor by tensor, so that there are never two copies of all.

    The architecture comes from the checkpoint; where it holds none, shapes come from the tensors and the rest from
    ``overrides``: fairseq's model options as a mapping or as the text of a Python dict, such as
    ``{'decoder_attention_heads': 8}``. ``trust`` lifts the limit on what a checkpoint may hold (see
    ``fairseq_compat.load_checkpoint``). ``dtype`` None is fp32, whatever was saved. ``tokenizer`` is a folder or file for
    ``load_tokenizer``; None is beside the checkpoint, or else in the data that the checkpoint says it was trained on.

    Raises UserError for a missing or damaged checkpoint, and for a model that the decoder cannot represent.
    """
    path = find_checkpoint(path)
    files, state = _read(path, trust)
    path = files[0]
    tensors = _tensors(state, path)
    model_cfg, task_cfg = _options(state)
    del state  # or every tensor would be kept until the last one is converted
    try:
        options = model_cfg or _options_from_tensors(tensors)
        options = options | _parse_overrides(overrides, options)
        if not model_cfg and "decoder_attention_heads" not in options:
            raise UserError("the checkpoint does not say its number of heads: add --model-overrides \"{'decoder_attention_heads': N}\"")
        fixed = options.get("momentum_kind") == "ema" and not options.get("momentum_learned")
        if not model_cfg and fixed and "momentum_eta" not in options:
            raise UserError("the checkpoint does not say its momentum's decay: add --model-overrides \"{'momentum_eta': ETA}\"")
        for name in ("tokens_per_sample", "max_target_positions"):
            options.setdefault(name, task_cfg.get(name))
        config = DecoderConfig.from_fairseq(options, tensors["embed_tokens.weight"].shape[0])
        model = _build(config, tensors, torch.device(device), dtype or torch.float32)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    bos = BOS if not task_cfg or task_cfg.get("add_bos_token") else EOS
    if tokenizer is None and not has_tokenizer(path.parent):
        data = str(task_cfg.get("data") or "").split(os.pathsep)[0]
        tokenizer = data if data and has_tokenizer(data) else None
    return NativeLM(model, path, bool(task_cfg.get("packed_documents", False)), (bos,), tokenizer, files=files)


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
    from fairseq_compat import CheckpointError, load_checkpoint

    try:
        state = load_checkpoint(path, trust=trust, mmap=True)
        files = part_files(path, state)
        if not files:
            return [path], state
        states = [load_checkpoint(file, trust=trust, mmap=True) for file in files]
    except CheckpointError as error:
        raise UserError(str(error)) from error
    try:
        return files, join_parts(states)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _tensors(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The decoder's state dict under this package's names, from the forms that fairseq's versions have written."""
    weights = state.get("model", state)
    if not isinstance(weights, Mapping) or "decoder.embed_tokens.weight" not in weights:
        raise UserError(f"{path} holds no decoder-only language model (no decoder.embed_tokens.weight); is it another kind of checkpoint?")
    foreign = [name for name in weights if not name.startswith("decoder.")]
    if foreign:
        raise UserError(f"{path} holds more than a decoder-only language model, such as {foreign[0]}")
    wrong = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is no tensor; the checkpoint is damaged, or of another program")
    tensors: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix("decoder.")
        fused = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if fused:  # before 2019: queries, keys and values in one matrix
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                tensors[f"{fused[1]}.{letter}_proj.{fused[2]}"] = part
        elif name == "embed_out":  # an untied output projection, before 2020
            tensors["output_projection.weight"] = value
        elif not _IGNORED.match(name):
            tensors[name] = value
    tensors.setdefault("output_projection.weight", tensors["embed_tokens.weight"])  # tied, before 2020
    return tensors


def _options(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """fairseq's options of the model and of the task; empty where the checkpoint holds none."""
    cfg = state.get("cfg")
    if isinstance(cfg, Mapping):
        return _mapping(cfg.get("model")), _mapping(cfg.get("task"))
    arguments = _mapping(state.get("args"))  # before 2020: one namespace for all
    return arguments, arguments


def _mapping(value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, str):  # fairseq keeps the bare name where a component has no options
        return {}
    return dict(value) if isinstance(value, Mapping) else dict(vars(value))


def _options_from_tensors(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the tensors show. What they do not show is that of the fairseq dense LMs: gelu, scaled embeddings,
    sinusoidal positions, 2048."""
    embedding, output = tensors["embed_tokens.weight"], tensors["output_projection.weight"]
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    options: dict[str, Any] = {
        "decoder_embed_dim": embedding.shape[1],
        "decoder_layers": len(layers),
        "activation_fn": "gelu",
        "dropout": 0.0,
        "position": "sinusoidal",
        "untie_embeddings": not (output.shape == embedding.shape and torch.equal(output, embedding)),
        "max_target_positions": 2048,
    }
    if "layers.0.fc1.weight" in tensors:
        options["decoder_ffn_embed_dim"] = tensors["layers.0.fc1.weight"].shape[0]
    if "embed_positions.weight" in tensors:
        options |= {"position": "learned", "max_target_positions": tensors["embed_positions.weight"].shape[0] - 2}
    momentum = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith("layers.0.self_attn.momentum.")}
    if momentum:
        options["momentum_kind"] = "multi_ema" if "delta" in momentum else "ema"
        options["momentum_learned"] = "decay_logit" in momentum
        options["momentum_normalize"] = "normalized" in momentum
        if "fixed_log_decay" in momentum:
            options["momentum_eta"] = _eta(float(momentum["fixed_log_decay"][0]))
        options["momentum_gate"] = "zero" if "gate" in momentum else "none"
        if options["momentum_kind"] == "ema":
            options["decoder_attention_heads"] = next(tensor.shape[0] for tensor in momentum.values() if tensor.dim())
    return options


def _eta(log_decay: float) -> float:
    """The shortest decimal number whose logarithm is the fp32 number ``log_decay``."""
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
            raise UserError(f"--model-overrides: no option is called {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return dict(value)


class _Unfilled(TorchFunctionMode):
    """Within it ``torch.empty`` takes no memory: layers have shapes and no initial values, and what follows from the configuration has its
    values as always."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        place = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **place})


def _build(config: DecoderConfig, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Decoder:
    """The decoder with these tensors, themselves where they are as wanted; ``tensors`` is emptied."""
    with torch.random.fork_rng(devices=[]), _Unfilled():  # the few values that are drawn leave the caller's generator as it was
        model = Decoder(config)
    expected = _without_notes(model.state_dict())
    for name in tensors.keys() - _without_notes(tensors).keys():  # old checkpoints lack them, and a model goes without
        del tensors[name]
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        lack, extra = (f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names) for names in (missing, unknown))
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
