"""Several processes that share one study: ``torchrun`` starts them, rank 0 writes."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch.distributed as dist

from momentum_lm.errors import UserError, arg

TIMEOUT = 600.0  # seconds that a process may take to come, or between two signs of life
_PATIENCE = 20.0  # seconds of waiting after which it is said who is waited for
_entered = 0  # how often this process has begun to share something: the others have as often
_shared: Any = None  # the store, which stays for the next time


class Processes:
    """This process among those that torchrun started; a study without torchrun has one. Use as a context manager.

    Objects travel over gloo, whatever the device: they are small. Before each exchange the processes meet at a store of
    keys, so that one that does not come is known by its number: the others raise UserError naming it when it has given
    no sign of life (:meth:`alive`) for ``timeout`` seconds. ``store`` and ``rank``: of a test without torchrun.
    """

    def __init__(
        self, timeout: float = TIMEOUT, store: Any = None, rank: int | None = None, world: int | None = None
    ) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.timeout = timeout
        self._store = store
        self._group: Any = None
        self._made_default = False
        self._meetings = 0

    def __enter__(self) -> Processes:
        if self.world > 1 and self._store is None:
            global _entered
            _entered += 1
            self._store = dist.PrefixStore(f"momentum_lm/{_entered}", self._rendezvous())
            self._meet()
            self._made_default = not dist.is_initialized()
            if self._made_default:
                dist.init_process_group(
                    "gloo", store=dist.PrefixStore("gloo", self._store), rank=self.rank, world_size=self.world
                )
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None and kind is None:  # after an error the others may not come: torchrun ends them
            self._meet()
            # the caller's own group stays
            dist.destroy_process_group(None if self._made_default else self._group)
            self._store.set(f"left/{self.rank}", "")
            if self.first:  # it may keep the store
                with contextlib.suppress(RuntimeError):
                    self._store.wait([f"left/{rank}" for rank in range(self.world)], datetime.timedelta(seconds=10))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def alive(self) -> None:
        """A sign of life: between two of them no process may take longer than ``timeout``. Call it after each batch."""
        if self._store is not None:
            self._store.add(f"alive/{self.rank}", 1)

    def agree(self, **values: Any) -> None:
        """Raises UserError, in every process, naming the first one whose ``values`` (by what they are: ``model``,
        ``flags``) are not those of process 0."""
        if self.world == 1 or self._store is None:
            return
        key = f"agree/{self._meetings}"
        with self._connected():
            self._store.set(f"{key}/{self.rank}", json.dumps([socket.gethostname(), values]))
            self._meet()
            there = [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world)]
            self._meet()  # or the one that keeps the store might be gone before the others have read
        expected = there[0][1]
        for rank, (host, found) in enumerate(there):
            if differing := _differing(expected, found):
                raise UserError(
                    f"process {rank} on {host} has another {differing} than process 0 on {there[0][0]}; start all of "
                    "them with the same files, flags and versions"
                )

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, in every process."""
        self._meet()
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values in rank 0, by rank; elsewhere nothing."""
        self._meet()
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def _meet(self) -> None:
        """Waits for all processes. Raises UserError naming those that have given no sign of life for too long."""
        if self._store is None:
            return
        key, self._meetings = f"meeting/{self._meetings}", self._meetings + 1
        with self._connected():
            self._store.set(f"{key}/{self.rank}", "")
            self._wait(key)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Raises UserError where the store's keeper is gone."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"process {self.rank} has lost the connection to the others ({_line(error)}); see their output"
            ) from error

    def _wait(self, key: str) -> None:
        began = time.monotonic()
        seen = {rank: (0, began) for rank in range(self.world) if rank != self.rank}
        pause, announced = 0.001, False
        while True:
            seen = {rank: signs for rank, signs in seen.items() if not self._store.check([f"{key}/{rank}"])}
            if not seen:
                return
            now = time.monotonic()
            for rank, (count, _) in seen.items():
                if (latest := self._store.add(f"alive/{rank}", 0)) != count:
                    seen[rank] = latest, now
            lost = [rank for rank, (_, since) in seen.items() if now - since > self.timeout]
            if lost:
                raise UserError(
                    f"{_numbered(lost)} of {self.world} has not come within {self.timeout:g} s, or hangs; look at "
                    "its output, or give it more time with ",
                    arg("timeout"),
                )
            if not announced and now - began > min(_PATIENCE, self.timeout / 2):
                announced = True
                print(
                    f"process {self.rank} waits for {_numbered(list(seen))}, at most {self.timeout:g} s without a "
                    f"sign of it",
                    file=sys.stderr,
                )
            time.sleep(pause)
            pause = min(0.25, 1.5 * pause)

    def _rendezvous(self) -> Any:
        """The store of torchrun, or of the group that there is already."""
        global _shared
        if dist.is_initialized():
            return dist.distributed_c10d._get_default_store()
        if _shared is not None:
            return _shared
        _name_loopback()
        seconds = datetime.timedelta(seconds=self.timeout)
        host, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                _shared = next(dist.rendezvous("env://", timeout=seconds))[0]
            else:  # as the former does, but for the wait for all the others, which would not say who is missing
                _shared = dist.TCPStore(host, int(port), self.world, self.rank == 0, seconds, wait_for_workers=False)
            return _shared
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {self.rank} does not reach process 0 at {host}:{port} within {self.timeout:g} s "
                f"({_line(error)}); is it there?"
            ) from error


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    name = next((name for name in one if one[name] != other.get(name)), "")
    return f"{name} ({_short(other.get(name))}, not {_short(one[name])})" if name else ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 16 else text[:12] + "..."


def _numbered(ranks: list[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _name_loopback() -> None:
    """gloo looks up this machine's own name, which minimal systems do not have; where all processes are on it the
    loopback does."""
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
