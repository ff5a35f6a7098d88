"""Processes that share a study: threads with a store between them, and real ones where one is missing."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from momentum_lm.errors import UserError
from momentum_lm.results.processes import Processes


def together(work, timeout=5.0, world=3):
    """What ``work(processes)`` returns or raises in each of several processes, here threads, by rank."""
    store, found = dist.HashStore(), [None] * world

    def run(rank):
        try:
            found[rank] = work(Processes(timeout, store, rank, world))
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_agree_go_on():
    def work(processes):
        processes.agree(model="a", flags="b")
        processes.agree(prompts="c")
        return processes.gather(processes.rank)

    assert together(work) == [[0], [1], [2]]  # without a group each has its own


@pytest.mark.parametrize("what", ["model", "data", "flags"])
def test_a_process_with_something_else_is_named_in_all(what):
    def work(processes):
        processes.agree(
            **({"model": "a", "data": "a", "flags": "a"} | ({what: "other"} if processes.rank == 2 else {}))
        )

    said = together(work)
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"process 2 on {socket.gethostname()} has another {what} (other, not a) than process 0 on "
    )


def test_a_process_that_hangs_is_named_within_the_time_and_one_that_works_is_not(capsys):
    def work(processes):
        if processes.rank == 1:
            return time.sleep(1.5)  # never comes
        if processes.rank == 2:  # slow, but alive
            for _ in range(4):
                time.sleep(0.1)
                processes.alive()
        began = time.monotonic()
        try:
            processes.agree(model="a")
        finally:
            assert time.monotonic() - began < 1.2

    said = together(work, timeout=0.3)
    remedy = "look at its output, or give it more time with timeout"
    line = f"process 1 of 3 has not come within 0.3 s, or hangs; {remedy}"
    assert said == [line, None, line]
    assert "process 0 waits for process" in capsys.readouterr().err


SCRIPT = """\
import sys
from momentum_lm.errors import main_guard
from momentum_lm.results.processes import Processes

@main_guard
def main(argv=None):
    for turn in range(2):
        with Processes(float(sys.argv[1])) as processes:
            print(processes.from_first(7 + processes.rank), processes.gather(processes.rank), flush=True)

sys.exit(main([]))
"""


OF_A_PROGRAM_WITH_A_GROUP = f"""\
import torch.distributed as dist
dist.init_process_group("gloo")
{SCRIPT.replace("sys.exit(main([]))", "main([])")}
box = [dist.get_rank()]
dist.broadcast_object_list(box, src=1)
print(dist.is_initialized(), box)
"""


def start(rank, world, port, timeout, script=SCRIPT):
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = [sys.executable, "-c", script, str(timeout)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_processes_share_twice_without_torchrun():
    port = free_port()
    running = [start(rank, 2, port, 60) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["7 [0, 1]\n" * 2, "7 []\n" * 2]


def test_a_program_keeps_the_group_that_it_had():
    port = free_port()
    running = [start(rank, 2, port, 60, OF_A_PROGRAM_WITH_A_GROUP) for rank in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["7 [0, 1]\n" * 2 + "True [1]\n", "7 []\n" * 2 + "True [1]\n"]


def test_a_process_that_was_never_started_is_named():
    process = start(0, 2, free_port(), 1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: process 1 of 2 has not come within 1 s, or hangs" in said and "Traceback" not in said
