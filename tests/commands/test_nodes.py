"""Several machines, as network namespaces of this one: the recipe's launch line, and the check before it."""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
import uuid
from pathlib import Path

import pytest
import torch
from processes import children
from weights import apart

from momentum_lm.formats.checkpoint import load_checkpoint

TRAIN = Path(__file__).parent.parent.parent / "examples" / "pretraining" / "train.sh"


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes():
    """Three namespaces on one switch: (name, address) of each."""
    if not shutil.which("ip"):
        pytest.skip("no `ip` here (iproute2) to make network namespaces with")
    run = uuid.uuid4().hex[:6]
    hub, names = f"hub{run}", [f"n{i}{run}" for i in range(3)]
    try:
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "switch", "type", "bridge")
        ip("-n", hub, "link", "set", "switch", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", hub)
            ip("-n", hub, "link", "set", f"port{i}", "master", "switch", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield [(name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def start(cli_command, nodes):
    """start(node, command, **environment) -> the process on that node, its output in one pipe."""

    def run(node, command, **environment):
        command, environment = cli_command(
            command, {"GLOO_SOCKET_IFNAME": "eth0", "HEAD": f"{nodes[0][1]}:29511", **environment}
        )
        environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"
        inside = ["ip", "netns", "exec", nodes[node][0], *command]
        return subprocess.Popen(inside, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return run


def small(updates):
    """What makes the recipe a test: words that come last win."""
    words = "--arch momentum_lm_tiny --decoder-layers 2 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
    words += "--decoder-attention-heads 2 "
    words += (
        "--tokens-per-sample 32 --batch-size 4 --update-freq 1 --warmup-updates 5 --total-num-update 1000 --lr 1e-2 "
    )
    words += "--cpu --distributed-backend gloo --num-workers 0 --disable-validation --log-interval 1 --log-format json "
    words += "--save-interval-updates 10"
    return [*words.split(), "--max-update", updates]


@pytest.mark.nightly
def test_two_nodes_train_through_the_recipes_launch_line_and_survive_a_killed_worker(
    nodes, start, data, run_cli, tmp_path
):
    began = {}
    processes = []
    for node in range(2):
        command = ["/bin/bash", TRAIN, data, tmp_path / "two", *small(40)]
        processes.append(start(node, command, NODES=2, NODE_RANK=node, GPUS=1, ADDRESS=nodes[node][1], JOB="test"))
    output = ""
    for line in processes[0].stdout:
        output += line
        if not began and '"num_updates": "15"' in line:
            workers = children(processes[1].pid)
            assert len(workers) == 1
            os.kill(workers[0], signal.SIGKILL)
            began["killed"] = time.monotonic()
        if began and "again" not in began and re.search(r"Loaded checkpoint .* @ [1-9]0 updates", line):
            began["again"] = time.monotonic()
    outputs = [output, processes[1].communicate(timeout=120)[0]]
    processes[0].wait(timeout=120)
    assert [process.returncode for process in processes] == [0, 0], "".join(outputs)[-4000:]
    assert began["again"] - began["killed"] < 90  # the other node's worker ended too, and both came back
    one = run_cli(
        ["/bin/bash", TRAIN, data, tmp_path / "one", *small(40), "--update-freq", "2"], env={"GPUS": 1}, warm=True
    )
    assert one.returncode == 0, one.stderr[-3000:]
    a, b = (load_checkpoint(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", "two"))
    assert apart(a, b) < 1e-4 and all(torch.isfinite(v).all() for v in b.values())


def check(start, ranks, *words):
    """momentum-lm preflight on some of three nodes -> (code, output) of each."""
    running = [
        start(rank, ["momentum-lm", "preflight", "--megabytes", "1", *words], NODES=3, NODE_RANK=rank) for rank in ranks
    ]
    return [(process.communicate(timeout=60)[0], process.returncode) for process in running]


def test_preflight_passes_where_all_reach_all(start):
    (said, code), *others = check(start, [0, 1, 2], "--timeout", "30")
    assert code == 0 and re.search(
        r"preflight: 3 nodes reach each other; all-reduce of 1 MB: \d+ ms \(\d+ MB/s a node\)", said
    ), said
    assert others == [("", 0), ("", 0)]


@pytest.mark.nightly
def test_preflight_names_the_node_that_does_not_come(start):
    for said, code in check(start, [0, 2], "--timeout", "8"):
        assert code == 2 and "error: node 1 did not come to 10.77.0.1:29511" in said, said


@pytest.mark.nightly
def test_preflight_names_the_link_that_is_cut(nodes, start):
    ip("-n", nodes[2][0], "route", "add", "unreachable", "10.77.0.2/32")
    try:
        for said, code in check(start, [0, 1, 2], "--timeout", "15"):
            assert code == 2 and re.search(
                r"error: .*node 2 \(\S+\) cannot connect to node 1 \(\S+\) at 10\.77\.0\.2", said
            ), said
    finally:
        ip("-n", nodes[2][0], "route", "del", "unreachable", "10.77.0.2/32")


@pytest.mark.nightly
def test_preflight_without_a_head_says_where_it_looked(start):
    ((said, code),) = check(start, [1], "--timeout", "2")
    assert (
        code == 2 and said.startswith("error: node 1 (") and "cannot reach node 0 at 10.77.0.1:29511 within 2 s" in said
    ), said


@pytest.mark.parametrize(
    "words,word",
    [
        (["--head", "nohost"], "--head HOST:PORT"),
        (["--head", "h:1"], "--nodes is missing"),
        (["--head", "h:1", "--nodes", "2", "--rank", "2"], "--rank 2"),
    ],
)
def test_preflight_says_what_is_missing(words, word, run_cli):
    result = run_cli(
        ["momentum-lm", "preflight", *words], env={"HEAD": "", "NODES": "", "SLURM_NNODES": "", "NODE_RANK": ""}
    )
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and word in result.stderr
        and len(result.stderr.splitlines()) == 1
    )
