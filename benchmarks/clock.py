"""Marks in time: on a GPU events, which nobody waits for until they are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """``mark()`` between pieces of work, then ``seconds()`` of each piece."""

    def __init__(self, device: str | torch.device) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.marks)]
        return [after - before for before, after in pairwise(self.marks)]


def seconds_each(calls: list[Callable[[], Any]], device: str | torch.device) -> list[float]:
    """Seconds of each call, one right after the other."""
    clock = Clock(device)
    clock.mark()
    for call in calls:
        call()
        clock.mark()
    return clock.seconds()
