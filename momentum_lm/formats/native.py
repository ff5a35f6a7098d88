"""A fairseq checkpoint (one of ours, a stock ``transformer_lm*``, or a published dense LM) read into our decoder."""

from __future__ import annotations

import ast
import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from momentum_lm.errors import TornCheckpoint, UserError, arg
from momentum_lm.files import Unchanged
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.filters import is_of_filter
from momentum_lm.model.precision import Float32
from momentum_lm.text.dictionary import BOS, DIGEST, EOS, check_symbols
from momentum_lm.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

from . import options as checkpoint_options
from .checkpoint import load_checkpoint, trusted
from .decoder_options import from_fairseq, table
from .lazy import FLOATS
from .pickles import shown
from .shards import is_part, join_parts, part_files

CHECKPOINTS = ("model.pt", "checkpoint_best.pt", "checkpoint_last.pt")  # what a folder is searched for, in this order
# what is no parameter: fairseq's own entries, and notes that this package's checkpoints once had
_IGNORED = re.compile(
    r"(version|embed_positions\._float_tensor|layers\.\d+\.self_attn\.momentum\.(fixed_log_decay|normalized))$"
)


@dataclass
class NativeCheckpoint:
    """A decoder, and what its checkpoint says besides.

    path: the checkpoint's (first) file; files: all of them, as a checkpoint in parts has several; unchanged: the same,
        as they were read.
    bos: what its training inputs began with: ``</s>`` unless fairseq's ``--add-bos-token`` was given. Where a
        checkpoint does not say, it is ``<s>``, as in the authors' experiments.
    packed_documents: whether it was trained on packed documents.
    tokenizer_path: folder or file of the tokenizer; None: beside the checkpoint.
    trained_on: the folder of data that the checkpoint names. dictionary: the digest of its symbols
        (:func:`momentum_lm.text.dictionary.symbols_digest`), where the checkpoint tells.
    """

    model: Decoder
    path: Path
    packed_documents: bool = False
    bos: tuple[int, ...] = (BOS,)
    tokenizer_path: Path = None  # type: ignore[assignment]
    files: Sequence[Path] = ()
    unchanged: Unchanged = None  # type: ignore[assignment]
    trained_on: Path | None = None
    dictionary: str | None = None

    def __post_init__(self) -> None:
        self.files = self.files or [self.path]
        self.unchanged = self.unchanged or Unchanged(self.files)
        self.tokenizer_path = Path(self.tokenizer_path or self.path)

    @property
    def name(self) -> str:
        """How messages and reports call the model: its path."""
        return str(self.path)

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model. Raises UserError where there is none, or one of another model."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.tokenizer_path} has {tokenizer.vocab_size} entries, but {self.name} has "
                f"{self.vocab_size}: name the folder of the data that the model was trained on with ",
                arg("tokenizer"),
            )
        whose = f"the tokenizer's dictionary in {self.tokenizer_path}"
        check_symbols(tokenizer.dictionary.symbols, self.dictionary, whose)
        return tokenizer


def read_native(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | str | None = None,
    trust: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> NativeCheckpoint:
    """Reads a checkpoint file, or the one in a folder (``model.pt``, ``checkpoint_best.pt`` or ``checkpoint_last.pt``),
    whole or in parts (``checkpoint_best-shard0.pt`` and so on; any of them may be named).

    The weights are the file's own memory pages where dtype and device allow it, and what changes them leaves the file
    alone; parts are joined, and others converted tensor by tensor, so that there are never two copies of all.

    The architecture comes from the checkpoint; where it holds none, shapes come from the tensors and the rest from
    ``overrides``: fairseq's model options as a mapping or as the text of a Python dict, such as
    ``{'decoder_attention_heads': 8}``. ``trust`` lifts the limit on what a checkpoint may hold (see
    ``momentum_lm.formats.checkpoint``). ``dtype`` None is the one that the weights are saved in. ``tokenizer`` is a
    folder or file for ``load_tokenizer``; None is beside the checkpoint, or else in the data that the checkpoint says
    it was trained on.

    Raises UserError for a missing or damaged checkpoint, and for a model that the decoder cannot represent.
    """
    path = find_checkpoint(path)
    before = Unchanged([path])
    files, state = _read(path, trust)
    unchanged = Unchanged(files)
    before.check()
    path = files[0]
    try:
        dtype, old = dtype or _saved_dtype(state), _old_notes(state)
        tensors = _tensors(state)
        _check_amount(tensors, files)
        model_cfg, task_cfg = _options(state, trust)
        dictionary = _dictionary_digest(state)
        del state  # or every tensor would be kept until the last one is converted
        options = model_cfg or _options_from_tensors(tensors) | old
        options = options | _parse_overrides(overrides, options)
        if not model_cfg:
            _check_told(options)
        for name in ("tokens_per_sample", "max_target_positions"):
            options.setdefault(name, task_cfg.get(name))
        config = from_fairseq(options, tensors["embed_tokens.weight"].shape[0])
        checkpoint_options.check_sizes(tensors, config.layers, config.dim, config.ffn_dim)
        model = _build(config, tensors, torch.device(device), dtype)
        bos = BOS if not task_cfg or checkpoint_options.flag(task_cfg, "add_bos_token") else EOS
        packed = checkpoint_options.flag(task_cfg, "packed_documents")
    except UserError as error:
        raise UserError(f"{path}: ", error) from error
    data = _data_folder(task_cfg)
    if tokenizer is None and data and not has_tokenizer(path.parent):
        tokenizer = data if has_tokenizer(data) else None
    where = Path(tokenizer or path)
    return NativeCheckpoint(
        model, path, packed, (bos,), where, files, unchanged, Path(data) if data else None, dictionary
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
    """The checkpoint's files, and what it holds, its tensors mapped. The optimizer's state, twice the model, is never
    read."""
    state = load_checkpoint(path, trust=trust, mmap=True)
    try:
        files = part_files(path, state)
        if not files:
            return [path], state
        return files, join_parts([load_checkpoint(file, trust=trust, mmap=True) for file in files])
    except TornCheckpoint:
        raise
    except UserError as error:
        raise UserError(f"{path}: ", error) from error


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


def _saved_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """The dtype that holds all weights; momentum's own parameters are always fp32. Raises UserError for quantised
    ones."""
    dtypes = set()
    named = {name: value for name, value in checkpoint_options.weights(state).items() if isinstance(value, Tensor)}
    for name, tensor in named.items():
        matrix = name.endswith((".weight", ".bias"))
        if tensor.dtype not in FLOATS and (matrix or is_of_filter(name)):
            remedy = "give the model in fp32, bf16 or fp16, before it was quantised"
            raise UserError(f"{shown(name)} is in {tensor.dtype}: {remedy}")
        dtypes |= {tensor.dtype} if matrix else set()
    return functools.reduce(torch.promote_types, dtypes or {torch.float32})


def _check_tensor(name: str, value: Any) -> None:
    """Raises UserError for what cannot be a decoder's parameter, before it is converted to one in silence."""
    if not isinstance(value, Tensor):
        raise UserError(f"{shown(name)} is no tensor; the checkpoint is damaged, or of another program")
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        raise UserError(f"{shown(name)} is sparse, quantised or without values; save it as an ordinary tensor")
    if not value.is_floating_point():
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
    config = from_fairseq({name: options.get(name) for name in options}, 1 << 40)
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
    """What the tensors show: of momentum what is learned. What they do not show is that of the fairseq dense LMs: gelu,
    scaled embeddings, sinusoidal positions, 2048."""
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
        kinds = {"delta": "multi_ema", "weights": "fir"}
        options["momentum_kind"] = next((kind for name, kind in kinds.items() if name in momentum), "ema")
        if "weights" in momentum:
            options |= {"momentum_taps": _rows(momentum, "weights"), "momentum_current": "current" in momentum}
        options["momentum_learned"] = "decay_logit" in momentum
        options["momentum_gate"] = "zero" if "gate" in momentum else "none"
        if options["momentum_kind"] == "ema":
            heads = [tensor.shape[0] for tensor in momentum.values() if tensor.dim()]
            options |= {"decoder_attention_heads": heads[0]} if heads else {}
    return options


def _check_told(options: Mapping[str, Any]) -> None:
    """Raises UserError where neither the tensors nor the user tell what no checkpoint without options tells."""
    if "decoder_attention_heads" not in options:
        raise UserError(
            "the checkpoint does not say its number of heads: add ", arg(overrides="{'decoder_attention_heads': N}")
        )
    fixed = options.get("momentum_kind") == "ema" and not options.get("momentum_learned")
    if fixed and "momentum_eta" not in options:
        raise UserError(
            "the checkpoint does not say its momentum's decay: add ", arg(overrides="{'momentum_eta': ETA}")
        )


def _old_notes(state: Mapping[str, Any]) -> dict[str, Any]:
    """What entries among the tensors that checkpoints once had tell of momentum that is not learned."""
    names = {name.rpartition(".momentum.")[2] for name in checkpoint_options.weights(state)}
    options = {"momentum_kind": "ema"} if "fixed_log_decay" in names else {}
    return options | ({"momentum_normalize": True} if "normalized" in names else {})


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    if not tensors[name].dim():
        raise UserError(f"{name} is a single number, and should have rows")
    return len(tensors[name])


def _parse_overrides(overrides: Mapping[str, Any] | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    value: Any = overrides or {}
    if isinstance(overrides, str):
        try:
            value = ast.literal_eval(overrides.strip() or "{}")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(
            arg(overrides=overrides),
            " is not a Python dict of option names, such as \"{'decoder_attention_heads': 8}\"",
        )
    known = {*options, *table()}
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            instead = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(arg("overrides"), f": no option is called {shown(key)!r}{instead}")
    return dict(value)


class _Unfilled(TorchFunctionMode):
    """Within it ``torch.empty`` takes no memory: layers have shapes and no initial values, and what follows from the
    configuration has its values as always."""

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
    expected = model.state_dict()
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
