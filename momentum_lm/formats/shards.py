"""Checkpoints in parts, NAME-shard0.pt, NAME-shard1.pt, ...: one of each process of a run with --use-sharded-state."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momentum_lm.errors import TornCheckpoint, UserError
from momentum_lm.formats.options import count, num_updates, weights
from momentum_lm.formats.pickles import shown


def part_files(path: Path, state: dict[str, Any]) -> list[Path]:
    """All files of the checkpoint of which ``path`` holds ``state``, in order; nothing where it is whole, and not one
    of parts.

    Raises UserError for a part under another name than it had.
    """
    if not is_part(state):
        return []
    metadata = _metadata(state)
    match = re.fullmatch(r"(.*-shard)\d+(\.pt)", path.name)
    if not match:
        raise UserError(
            "it is one part of a checkpoint: name it NAME-shardN.pt again, as it was, and leave it beside the others"
        )
    found = sum(1 for _ in path.parent.glob(f"{glob.escape(match[1])}*{match[2]}"))
    world = part_count(state) if "world_size" in metadata else found

    def part(rank: int) -> Path:
        return path.with_name(f"{match[1]}{rank}{match[2]}")

    missing = next((rank for rank in range(min(world, found + 1)) if not part(rank).exists()), None)
    if missing is not None:
        raise TornCheckpoint(f"cannot read checkpoint {part(missing)}: it is not there, one of {world:,} parts")
    return [part(rank) for rank in range(world)]


def is_part(state: Mapping[str, Any]) -> bool:
    """Whether ``state`` is one part of a checkpoint, ours or of fairscale's FullyShardedDataParallel."""
    metadata = _metadata(state)
    return bool(metadata.get("divided")) or "param_metadata" in metadata


def part_count(state: dict[str, Any]) -> int:
    """How many parts the checkpoint says that it has, of which ``state`` is one; 1 where it says nothing."""
    return count(_metadata(state).get("world_size", 1), "number of parts (fsdp_metadata)", least=1)


def _metadata(state: Mapping[str, Any]) -> dict[str, Any]:
    metadata = state.get("fsdp_metadata")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise UserError(f"its fsdp_metadata is of type {type(metadata).__name__}, not a dict")
    divided = metadata.get("divided", [])
    if not isinstance(divided, (list, tuple)) or not all(isinstance(name, str) for name in divided):
        raise UserError("its fsdp_metadata has a `divided` that is not a list of names")
    return metadata


@contextlib.contextmanager
def _as_described() -> Iterator[None]:
    """Of parts that a program wrote every one has each entry, and pieces that fit; UserError where that is not so."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = shown(" ".join(str(error).split()), 200)
        raise UserError(
            f"the parts do not fit one another or their fsdp_metadata ({type(error).__name__}: {reason})"
        ) from error


def join_parts(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One checkpoint without optimizer state from its parts in order, ours or those of fairscale's
    FullyShardedDataParallel.

    Tensors that lie in one part stay where they are. Raises UserError if parts are missing or do not belong together.
    """
    states = [{name: value for name, value in state.items() if name != "last_optimizer_state"} for state in states]
    if "param_metadata" in _metadata(states[0]):
        _check_updates(states)
        with _as_described():
            return {**states[0], "model": _join_fairscale(states)}
    return join_shards(states)


def _check_updates(states: Sequence[dict[str, Any]]) -> None:
    updates = {num_updates(state) for state in states if state.get("optimizer_history") is not None}
    if len(updates) > 1:
        found = ", ".join(map(str, sorted(updates)))
        raise UserError(f"the parts are of different updates ({found}): a save was interrupted; take earlier ones")


def _join_fairscale(states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The model of fairscale's parts: many parameters are one there, flattened and cut into parts of equal length, the
    last ones padded.

    Source: ``consolidate_shard_weights`` of fairscale 0.4.13.
    """
    wholes = [state["fsdp_metadata"]["param_metadata"] for state in states]
    model = {
        name: states[0]["model"][name]
        for name in states[0]["fsdp_metadata"].get("buffer_names", ())
        if name in states[0]["model"]
    }
    for module, first in enumerate(wholes[0]):
        prefix = f"{first['fsdp_path']}." if first["fsdp_path"] else ""
        for flat, entry in first["params"].items():
            paddings = [whole[module]["params"][flat]["padding"] for whole in wholes]
            tensors = [state["model"][prefix + flat] for state in states]
            parts = [tensor[: len(tensor) - padding] for tensor, padding in zip(tensors, paddings, strict=True)]
            if sum(map(len, parts)) != sum(entry["numels"]):
                raise UserError(
                    f"of its parts {len(states)} are there, and they do not make up {prefix}{entry['names'][0]}: "
                    "some are missing"
                )
            start = 0
            for name, shape, length in zip(entry["names"], entry["shapes"], entry["numels"], strict=True):
                model[prefix + name] = _range(parts, start, start + length).view(shape)
                start += length
        model |= {prefix + other: model[prefix + name] for name, other in first["shared_param_info"]}
    return model


def _range(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of the vectors' concatenation; a view where one vector holds them."""
    pieces = []
    for part in parts:
        pieces.append(part[max(start, 0) : max(stop, 0)])
        start, stop = start - len(part), stop - len(part)
    pieces = [piece for piece in pieces if len(piece)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def join_shards(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One ordinary checkpoint from those that the processes of a run wrote with --use-sharded-state, in any order.

    Raises UserError if one is missing, if some are of other updates than the rest, or if they are no parts.
    """
    states = list(shards)
    metadata = [_metadata(state) for state in states]
    if not states or any("rank" not in m or not m.get("divided") for m in metadata):
        raise UserError(
            "these are not the parts of a sharded checkpoint, as fairseq-train --use-sharded-state writes them"
        )
    world = part_count(states[0])
    ranks = [count(m["rank"], "rank (fsdp_metadata)", most=max(world, len(states))) for m in metadata]
    worlds = {part_count(state) for state in states}
    missing = sorted(set(range(min(world, len(states) + 1))) - set(ranks))
    if missing or len(states) != world or worlds != {world}:
        raise UserError(f"the checkpoint has {world:,} parts, and of these {missing or 'some'} are missing or doubled")
    _check_updates(states)
    with _as_described():
        return _concatenated([state for _, state in sorted(zip(ranks, states, strict=True), key=lambda pair: pair[0])])


def _concatenated(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = dict(states[0])
    divided = set(first.pop("fsdp_metadata")["divided"])
    tensors = [weights(state) for state in states]
    if any(part.keys() != tensors[0].keys() for part in tensors):
        raise UserError("the parts have different names of tensors")
    first["model"] = {
        name: _whole([part[name] for part in tensors]) if name in divided else value
        for name, value in tensors[0].items()
    }
    if first.get("last_optimizer_state"):
        optimizer = dict(first["last_optimizer_state"])
        parts = [state["last_optimizer_state"]["state"] for state in states]
        # of a parameter's state only the step count is one number, the same everywhere
        optimizer["state"] = {
            index: {
                key: _whole([part[index][key] for part in parts]) if value.dim() else value
                for key, value in entry.items()
            }
            for index, entry in optimizer["state"].items()
        }
        first["last_optimizer_state"] = optimizer
    return first


def _whole(parts: Sequence[Tensor]) -> Tensor:
    if any(part.dtype != parts[0].dtype for part in parts):
        raise UserError("the parts of a tensor are of different types")
    return torch.cat(list(parts))
