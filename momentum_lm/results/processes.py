"""Several processes that share one study: ``torchrun`` starts them, rank 0 writes."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch.distributed as dist


class Processes:
    """This process among those that torchrun started; a study without torchrun has one. Use as a context manager.

    Objects travel over gloo, whatever the device: they are small.
    """

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._group: Any = None

    def __enter__(self) -> Processes:
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is not None and kind is None:  # after an error the others may not come: torchrun ends them
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, in every process."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values in rank 0, by rank; elsewhere nothing."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []
