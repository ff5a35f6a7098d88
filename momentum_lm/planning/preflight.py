"""Before a run on several machines: can each reach each other, and are they alike? Says which cannot, instead of
hanging.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from momentum_lm.errors import UserError, arg


@dataclass(frozen=True)
class Place:
    """Where this process stands among the machines. ``hosts``: their names by number, where the cluster tells them."""

    rank: int
    nodes: int
    head: str
    port: int
    hosts: tuple[str, ...] = ()

    def name(self, rank: int) -> str:
        """What messages call the machine."""
        return f"node {rank} ({self.hosts[rank]})" if rank < len(self.hosts) else f"node {rank}"


def preflight(place: Place, timeout: float, megabytes: int = 64, say: Any = print) -> None:
    """Every machine calls it, within ``timeout`` seconds of each other. Node 0 listens where training's rendezvous
    will.

    Checks that all come, that each reaches each by TCP, that versions and GPUs are alike, and that an all-reduce of
    ``megabytes`` MB over all of them ends. Raises UserError naming the nodes and hosts that do not, on all that can
    hear of it. Ends within about 3 ``timeout``.
    """
    deadline = time.monotonic() + timeout
    mine = {"host": socket.gethostname(), **_versions()}
    with _listening() as port:
        store = _store(place, timeout)
        mine |= {"address": _address_towards(place), "port": port}
        store.set(f"node/{place.rank}", json.dumps(mine))
        others = _wait_for_all(place, store, deadline)
        here = [
            place.name(rank) if place.hosts else f"node {rank} ({other['host']})" for rank, other in enumerate(others)
        ]
        unreached = [
            rank
            for rank, other in enumerate(others)
            if not _reaches(other["address"], other["port"], timeout=min(timeout, 10))
        ]
        lines = [f"{here[place.rank]} cannot connect to {here[r]} at {others[r]['address']}" for r in unreached]
        reports = _exchange(place, store, "reached", lines, time.monotonic() + timeout)
        if broken := [line for report in reports for line in report]:
            _last_words(place, store, timeout)
            raise UserError(f"{'; '.join(broken)}: look at their network interfaces and firewalls")
        for what in ("python", "torch", "momentum_lm", "gpus"):
            kinds = {str(other[what]) for other in others}
            if len(kinds) > 1:
                _last_words(place, store, timeout)
                found = ", ".join(f"{here[rank]}: {other[what]}" for rank, other in enumerate(others))
                raise UserError(f"{what} differs between the machines ({found}); install the same everywhere")
    hung = threading.Timer(
        2 * timeout, _give_up, [f"{here[place.rank]}: the machines reach each other, but an all-reduce hangs"]
    )
    hung.daemon = True
    hung.start()  # NCCL's own start obeys no timeout
    seconds = _all_reduce(place, store, timeout, megabytes, here)
    hung.cancel()
    if place.rank == 0:
        rate = 2 * megabytes * (place.nodes - 1) / place.nodes / seconds
        took = f"{seconds * 1e3:.0f} ms ({rate:.0f} MB/s a node)"
        say(f"preflight: {place.nodes} nodes reach each other; all-reduce of {megabytes} MB: {took}")
    _last_words(place, store, timeout)


def _give_up(reason: str) -> None:
    print(
        f"error: {reason}; try NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME, and NCCL_DEBUG=INFO",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _versions() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "momentum_lm": importlib.metadata.version("momentum_lm"),
        "gpus": f"{len(gpus)} {gpus[0] if gpus else ''}".strip(),
    }


@contextlib.contextmanager
def _listening() -> Iterator[int]:
    """A port of this machine that accepts connections and closes them."""
    server = socket.create_server(("", 0), backlog=1024)

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                server.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


def _store(place: Place, timeout: float) -> dist.TCPStore:
    seconds = datetime.timedelta(seconds=timeout)
    who = f"{place.name(place.rank)}" if place.hosts else f"node {place.rank} ({socket.gethostname()})"
    try:
        return dist.TCPStore(place.head, place.port, place.nodes, place.rank == 0, seconds, wait_for_workers=False)
    except (RuntimeError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:200]
        if place.rank == 0:
            raise UserError(
                f"{who} cannot listen at {place.head}:{place.port}: {reason}; choose another port with ",
                arg("head"),
            ) from error
        raise UserError(
            f"{who} cannot reach node 0 at {place.head}:{place.port} within {timeout:g} s: {reason}; "
            "is it up, is the name right, is the port open?"
        ) from error


def _address_towards(place: Place) -> str:
    """This machine's address as the others see it: of the interface through which it sees node 0, whose own may be a
    loopback.
    """
    if place.rank == 0:
        return place.head
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((socket.gethostbyname(place.head), place.port))
        return str(probe.getsockname()[0])


def _wait_for_all(place: Place, store: dist.TCPStore, deadline: float) -> list[dict[str, Any]]:
    """Node 0 waits and decides, so that all hear the same. Raises UserError naming those that did not come."""
    if place.rank == 0:
        missing = list(range(place.nodes))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"node/{rank}"])]
            time.sleep(0.05 if missing else 0)
        store.set("missing", json.dumps(missing))
    store.wait(["missing"], datetime.timedelta(seconds=max(1.0, deadline - time.monotonic() + 10)))
    missing = json.loads(store.get("missing"))
    if missing:
        if place.rank == 0:
            time.sleep(1)  # for those who came to read it
        names = ", ".join(place.name(rank) for rank in missing)
        raise UserError(f"{names} did not come to {place.head}:{place.port}: down, not started, or cut off from it")
    return [json.loads(store.get(f"node/{rank}")) for rank in range(place.nodes)]


def _reaches(address: str, port: int, timeout: float) -> bool:
    try:
        with socket.create_connection((address, port), timeout):
            return True
    except OSError:
        return False


def _exchange(place: Place, store: dist.TCPStore, what: str, value: Any, deadline: float) -> list[Any]:
    """Everybody's ``value``; raises UserError naming those who fell silent."""
    store.set(f"{what}/{place.rank}", json.dumps(value))
    values = []
    for rank in range(place.nodes):
        try:
            store.wait([f"{what}/{rank}"], datetime.timedelta(seconds=max(1.0, deadline - time.monotonic())))
        except RuntimeError as error:
            raise UserError(f"{place.name(rank)} fell silent during the check; look at its log") from error
        values.append(json.loads(store.get(f"{what}/{rank}")))
    return values


def _last_words(place: Place, store: dist.TCPStore, timeout: float) -> None:
    """Node 0 keeps the store until all have read what they need of it."""
    store.set(f"done/{place.rank}", "")
    if place.rank == 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"done/{rank}" for rank in range(place.nodes)], datetime.timedelta(seconds=timeout))


def _all_reduce(place: Place, store: dist.TCPStore, timeout: float, megabytes: int, here: list[str]) -> float:
    """Seconds of the second of two sums over all machines, one process each."""
    gpu = torch.cuda.is_available()
    backend = "nccl" if gpu else "gloo"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that NCCL too ends after the timeout
    try:
        dist.init_process_group(
            backend, store=dist.PrefixStore("preflight", store), rank=place.rank, world_size=place.nodes,
            timeout=datetime.timedelta(seconds=timeout),
        )  # fmt: skip
        data = torch.ones(megabytes << 18, device="cuda" if gpu else "cpu")
        for _ in range(2):
            began = time.perf_counter()
            dist.all_reduce(data)
            total = float(data[-1])
            seconds = time.perf_counter() - began
        dist.destroy_process_group()
    except RuntimeError as error:
        hint = "NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO" if gpu else "GLOO_SOCKET_IFNAME"
        raise UserError(
            f"{here[place.rank]}: the machines reach each other, but an all-reduce over {backend} failed "
            f"({str(error).splitlines()[0][:200]}); try {hint}"
        ) from error
    if total != place.nodes**2:
        raise UserError(
            f"{here[place.rank]}: an all-reduce gave {total:g} instead of {place.nodes**2}: faulty hardware"
        )
    return seconds
