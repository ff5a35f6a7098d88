"""What a checkpoint says besides its tensors: fairseq's options, histories and counters, looked at before anybody uses
them.

fairseq's own code takes a checkpoint's word for everything. Here each entry that it (or this package) reads has a type
and bounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from momentum_lm.errors import CheckpointError, UserError

from .pickles import shown

MAX_OPTIONS = 100_000  # of all components together, and as many levels as below
_MAX_LEVELS = 20
_MAX_TEXT = 100_000  # characters of an option
_MAX_COUNT = 1 << 62


def mapping(value: Any, what: str) -> dict[str, Any]:
    """The options of one component: a dict or a namespace of them; none where fairseq keeps a component's bare name.

    ``what`` is the entry's name in the checkpoint. Raises UserError, naming it, for anything else.
    """
    if value is None or isinstance(value, str):
        return {}
    options = value if isinstance(value, Mapping) else None
    if isinstance(value, argparse.Namespace) or dataclasses.is_dataclass(value):  # the latter only where it is trusted
        options = vars(value)
    if options is None or not all(isinstance(name, str) for name in options):
        raise UserError(f"its {what} is of type {type(value).__name__}, not a dict of options")
    return dict(options)


def flag(options: Mapping[str, Any], name: str) -> bool:
    """An option that is on or off; where there is none, off. Raises UserError for any other value."""
    value = options.get(name)
    if value is not None and (not isinstance(value, (bool, int)) or value not in (0, 1)):
        raise UserError(f"its option {name} is {shown(repr(value))}, not true or false")
    return bool(value)


def count(entry: Any, what: str, least: int = 0, most: int = _MAX_COUNT) -> int:
    """A whole number of a checkpoint, ``what`` by name, from ``least`` to ``most``. Raises UserError for
    anything else.
    """
    if isinstance(entry, bool) or not isinstance(entry, int) or not least <= entry <= most:
        raise UserError(f"its {what} is {shown(repr(entry))}, not a whole number of at least {least}")
    return entry


def weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors, of any shape, by name, of a checkpoint (``model``) or of a bare state dict.

    Raises UserError for anything else in it.
    """
    found = state.get("model", state)
    found = {} if found is None else found
    if not isinstance(found, Mapping):
        raise UserError(f"its model is of type {type(found).__name__}, not a dict of tensors")
    for name, value in found.items():
        if not isinstance(name, str):
            raise UserError(f"its model has a name of type {type(name).__name__}")
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):  # torch's own name for what is none
            raise UserError(f"{shown(name)} is no tensor; the checkpoint is damaged, or of another program")
    return dict(found)


def num_updates(state: Mapping[str, Any]) -> int:
    """After how many updates the checkpoint was saved; 0 where it does not say."""
    history = _history(state)
    return count(history[-1].get("num_updates", 0), "number of updates") if history else 0


def _history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = state.get("optimizer_history")
    if history is not None and not (isinstance(history, list) and all(isinstance(entry, dict) for entry in history)):
        raise UserError("its optimizer_history is not a list of dicts")
    return history or []


def check_state(state: Mapping[str, Any], path: str) -> None:
    """Looks at all that fairseq's commands read of a checkpoint. Raises CheckpointError naming ``path`` and the entry.

    Checkpoints of every form that fairseq has written pass, also of models that are not ours.
    """
    try:
        weights(state)
        if state.get("cfg") is None and state.get("args") is None:
            raise UserError("it has no options (cfg or args): it is not a checkpoint of fairseq's trainer")
        check_options(state)
        if "optimizer_history" in state and not _history(state):
            raise UserError("its optimizer_history is empty")
        old = {"optimizer", "best_loss"} <= state.keys()
        if "optimizer_history" not in state and not old:
            raise UserError("it has no optimizer_history, so it is not a checkpoint of fairseq's trainer")
        num_updates(state)
        for name in ("optimizer_name", "criterion_name"):
            if _history(state) and not isinstance(_history(state)[-1].get(name, ""), str):
                raise UserError(f"its {name} is not a name")
        states = ("extra_state", "last_optimizer_state", "task_state", "lr_scheduler_state")
        for name in (*states, "fsdp_metadata", "shard_metadata"):
            if not isinstance(state.get(name, {}), (dict, type(None))):
                raise UserError(f"its {name} is of type {type(state[name]).__name__}, not a dict")
        extra = state.get("extra_state")
        iterator = extra.get("train_iterator") if extra else None
        if iterator is not None:
            if not isinstance(iterator, dict):
                raise UserError("its train_iterator is not a dict")
            for name in ("epoch", "iterations_in_epoch"):
                if iterator.get(name) is not None:
                    count(iterator[name], f"train_iterator's {name}")
        _check_optimizer(state.get("last_optimizer_state"))
    except UserError as error:
        raise CheckpointError(f"checkpoint {path}: ", error) from error


def _check_optimizer(state: Any) -> None:
    """torch's own form, where it is that: ``state`` by a parameter's number, and ``param_groups``."""
    if not state or "param_groups" not in state:
        return
    groups, own = state["param_groups"], state.get("state", {})
    listed = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not listed or not all(isinstance(group.get("params"), list) for group in groups):
        raise UserError("its last_optimizer_state has no list of param_groups")
    if not isinstance(own, dict) or not all(isinstance(entry, (dict, list, Tensor)) for entry in own.values()):
        raise UserError("its last_optimizer_state has a state that is no dict of dicts")


def check_options(state: Mapping[str, Any]) -> None:
    """Of a checkpoint's ``cfg`` and ``args``, types and amounts. Raises UserError naming the option.

    An option that is but the name of another plain one, as fairseq of the spring of 2021 left it for omegaconf to look
    up, gets that one's value here.
    """
    cfg, args = state.get("cfg"), state.get("args")
    if cfg is not None and not isinstance(cfg, Mapping):
        raise UserError(f"its cfg is of type {type(cfg).__name__}, not a dict")
    if args is not None and not isinstance(args, argparse.Namespace):
        raise UserError(f"its args are of type {type(args).__name__}, not a namespace")
    for name, section in (cfg or {}).items():
        kinds = (Mapping, argparse.Namespace, str, type(None), bool, int, float)
        if not isinstance(name, str) or not isinstance(section, kinds):
            raise UserError(f"its cfg.{shown(name)} is of type {type(section).__name__}, not options")
    level: list[tuple[str, Any]] = [("cfg", cfg), ("args", args)]
    seen = 0
    for _ in range(_MAX_LEVELS):
        following: list[tuple[str, Any]] = []
        for where, value in level:
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            if isinstance(inner, Mapping):
                if isinstance(inner, dict) and isinstance(cfg, Mapping):
                    inner.update({name: _referred(cfg, entry) for name, entry in inner.items() if _refers(entry)})
                following += [(f"{where}.{shown(name)}", entry) for name, entry in inner.items()]
            elif isinstance(inner, (list, tuple, set)):
                following += [(where, entry) for entry in inner]
            elif isinstance(inner, Tensor):
                raise UserError(f"its option {where} is a tensor")
            elif isinstance(inner, str) and len(inner) > _MAX_TEXT:
                raise UserError(f"its option {where} has {len(inner):,} characters")
            elif _refers(inner):  # omegaconf would look it up, in the environment too
                raise UserError(f"its option {where} refers to something else: {shown(inner)}")
            elif isinstance(inner, int) and inner.bit_length() > 64:
                raise UserError(f"its option {where} is a number of {inner.bit_length()} bits")
            seen += 1
            if seen + len(following) > MAX_OPTIONS:
                raise UserError(f"it has more than {MAX_OPTIONS:,} options")
        if not following:
            return
        level = following
    raise UserError(f"its options lie in one another, more than {_MAX_LEVELS} deep")


_REFERENCE = re.compile(r"\$\{(\w{1,100}(?:\.\w{1,100}){0,9})\}")
_MAX_REFERENCES = 10  # one to the next, and so on


def _refers(entry: Any) -> bool:
    return isinstance(entry, str) and "${" in entry


def _referred(cfg: Mapping[str, Any], text: str) -> Any:
    """The plain option, or list of such, that ``${GROUP.OPTION}`` means; ``text`` itself where it means none."""
    value: Any = text
    for _ in range(_MAX_REFERENCES):
        match = _REFERENCE.fullmatch(value)
        if not match:
            return text
        value = cfg
        for name in match[1].split("."):
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            if not isinstance(inner, Mapping) or name not in inner:
                return text
            value = inner[name]
        if not _refers(value):
            parts = value if isinstance(value, list) else [value]
            plain = all(isinstance(part, (str, int, float, type(None))) and not _refers(part) for part in parts)
            return value if plain else text
    return text


_LAYER = re.compile(r"layers\.(\d{1,9})\.")


def num_layers(names: Mapping[str, Any]) -> int:
    """How many layers have tensors, by their names without ``decoder.``."""
    return len({match[1] for name in names if (match := _LAYER.match(name))})


def check_sizes(
    tensors: Mapping[str, Tensor], layers: int, dim: int, ffn_dim: int, positions: int = 0, divided: bool = False
) -> None:
    """Whether a decoder's tensors, of any shape, by their names without ``decoder.``, are as many and as large as it
    says.

    It costs nothing, and comes before a model of these options is made, which can take any amount of time and memory.
    ``positions`` 0: not learned. ``divided``: these are one part of a checkpoint's, of which only widths can be told.
    Raises UserError.
    """
    embedding = tensors.get("embed_tokens.weight")
    if embedding is None or "flat_param_0" in tensors:  # of fairscale: all parameters are one
        return
    found = num_layers(tensors)
    if found != layers:
        raise UserError(
            f"its tensors do not fit its architecture: {found} layers in the checkpoint, {layers} by the architecture"
        )
    expected = {"embed_tokens.weight": (None, dim), "layers.0.fc1.weight": (ffn_dim, dim)}
    if positions:
        expected["embed_positions.weight"] = (positions, dim)
    for name, shape in expected.items():
        has = tuple(tensors[name].shape) if name in tensors else shape
        rows = has[0] if has and (shape[0] is None or divided) else shape[0]
        wanted = (rows, shape[1])
        if has != wanted:
            raise UserError(
                f"its tensors do not fit its architecture: {name} is {has} in the checkpoint, "
                f"{wanted} by the architecture"
            )
