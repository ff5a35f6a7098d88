"""``--ddp-backend fully_sharded``: weights, gradients and optimizer state divided among the processes, with torch's
FSDP2.

Each parameter is cut along its first dimension into equal parts (the last ones may be smaller, or empty), one for each
process. A sharded checkpoint (--use-sharded-state) holds one process's parts; parts of all processes, concatenated, are
the ordinary checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from momentum_lm.errors import UserError
from momentum_lm.model.marks import keeps_fp32


class FullySharded(nn.Module):
    """A model divided among the processes of ``group``, as fairseq's trainer expects one; forwards everything else to
    the model.

    The first process's weights are everyone's; models of the others may lie on the device ``meta``, as shapes without
    weights. Blocks (what the model keeps in ``nn.ModuleList``) are gathered one at a time, forward and backward.
    ``dtype``: the blocks' matrices are gathered in it (the parts and the sums of gradients stay fp32); None: as they
    are. ``use_sharded_state``: its state dict is this process's part; otherwise the whole, on the CPU of the first
    process, and empty elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype | None = None,
        use_sharded_state: bool = False,
        reshard_after_forward: bool = True,
    ) -> None:
        super().__init__()
        self.use_sharded_state = use_sharded_state
        self.group = group
        mesh = DeviceMesh.from_group(group, device.type)
        whole = {name: value.detach() for name, value in _entries(model)} if group.rank() == 0 else {}
        # Embeddings and what is marked to stay in fp32 (norms, decays) are left as they are, as in autocast, and no
        # block's input is
        # cast: that would take the residual stream down to bf16.
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]:
            kept = [m for m in block.modules() if keeps_fp32(m) and any(True for _ in m.parameters())]
            if dtype is not None and kept:
                fully_shard(kept, mesh=mesh, reshard_after_forward=reshard_after_forward)
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh)
        self.module = (
            model.to_empty(device=device) if any(value.is_meta for _, value in _entries(model)) else model.to(device)
        )
        self._take_from_first(whole, device)

    @torch.no_grad()
    def _take_from_first(self, whole: dict[str, Tensor], device: torch.device) -> None:
        """Sends the first process's ``whole`` entries to all, one at a time; each keeps its part."""
        first = dist.get_global_rank(self.group, 0)
        for name, own in _entries(self.module):
            value = (
                whole.pop(name).to(device).contiguous()
                if whole
                else torch.empty(own.shape, dtype=own.dtype, device=device)
            )
            dist.broadcast(value, first, group=self.group)
            if isinstance(own, DTensor):
                own.to_local().copy_(_part(value, own))
            else:
                own.copy_(value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Every process must call it: the parts are gathered, unless ``use_sharded_state``."""
        return self._collected(self.module.state_dict())

    def local_metadata_dict(self) -> dict[str, Any]:
        """What joining needs to know: which process's parts these are, of how many, and the names of the entries that
        are divided.
        """
        divided = [name for name, value in self.module.state_dict().items() if isinstance(value, DTensor)]
        return {
            "rank": self.group.rank(),
            "world_size": self.group.size(),
            "divided": divided if self.use_sharded_state else [],
        }

    def load_state_dict(self, state: dict[str, Any], strict: bool = True, model_cfg: Any = None) -> Any:  # type: ignore[override]
        """``state``: whole or this process's part, entry by entry."""
        own = self.module.state_dict()
        state = {name: part_like(value, own.get(name)) for name, value in state.items()}
        extra = {} if model_cfg is None else {"model_cfg": model_cfg}
        return self.module.load_state_dict(state, strict=strict, **extra)

    def gather_full_optim_state_dict(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, whole or in parts as :meth:`state_dict`'s. Every process must call it."""
        return self._collected(optimizer.state_dict())

    def get_shard_from_optim_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """fairseq's trainer asks for it before FusedAdamW.load_state_dict, which takes the parts itself."""
        return state

    def _collected(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.use_sharded_state:
            return _map_tensors(state, lambda value: value.to_local() if isinstance(value, DTensor) else value)
        first = self.group.rank() == 0

        def whole(value: Tensor) -> Tensor:
            if not isinstance(value, DTensor):
                return value
            gathered: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
            return gathered.cpu() if first else gathered.new_empty(0)

        state = _map_tensors(state, whole)
        return state if first else {}


def part_like(value: Any, own: Any) -> Any:
    """``value``, a whole tensor or this process's part, as a part of the divided tensor ``own``; as it is if ``own`` is
    not divided.

    Raises UserError if it is neither.
    """
    if not isinstance(own, DTensor) or not isinstance(value, Tensor):
        return value
    local = own.to_local()
    if value.shape != local.shape:
        if value.shape != own.shape:
            raise UserError(
                f"an entry of the checkpoint has shape {tuple(value.shape)}, where {tuple(own.shape)} is needed"
            )
        value = _part(value, own)
    value = value.to(local.device, copy=True)
    return DTensor.from_local(
        value, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def _part(whole: Tensor, own: DTensor) -> Tensor:
    """This process's part of a tensor that is divided as ``own``."""
    size = -(-own.shape[0] // own.device_mesh.size())
    start = min(size * own.device_mesh.get_local_rank(), own.shape[0])
    return whole[start : start + own.to_local().shape[0]]


def _entries(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(entry, change) for entry in value)
    return value
