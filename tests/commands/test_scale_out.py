"""Several processes, divided models, killed workers and signals: every run ends where the undisturbed one does."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from processes import children
from weights import apart

from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.formats.shards import join_shards

# the Llama form: norms without biases, a third matrix in feed-forward layers, query heads that share keys and values
MODEL = ["--arch", "momentum_llama_lm_tiny", "--decoder-kv-heads", "1", "--bias", "qkv", "--momentum-learned",
         "--disable-validation"]  # fmt: skip
BACKENDS = {"ddp": ["--ddp-backend", "pytorch_ddp"], "sharded": ["--ddp-backend", "fully_sharded"]}


def state(path):
    return load_checkpoint(path)


def difference(a, b):
    """Between two checkpoints' weights."""
    return apart(a["model"], b["model"])


def workers_of(process):
    """The processes that torchrun has started, in their order."""
    return children(process.pid, "fairseq-train")


def curve(folder):
    """{update: logged loss}, in full precision; of an update that was done twice, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return {
        event.step: event.value
        for event in EventAccumulator(str(folder / "tb" / "train_inner")).Reload().Scalars("loss")
    }


@pytest.fixture(scope="module")
def launch(cli_command):
    """launch(processes, command, *torchrun's flags) -> the started torchrun, its output in one pipe; with
    ``fresh=True`` none of its processes is forked from the interpreter that has imported torch.
    """

    def start(processes, command, *words, fresh=False):
        # without it torch 2.13's torchrun starts workers again on the store in which the dead ones' addresses still are
        command, environment = cli_command(command, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}, warm=not fresh)
        agent = [
            sys.executable,
            *"-m torch.distributed.run --standalone --no-python".split(),
            "--nproc_per_node",
            str(processes),
            *words,
        ]
        return subprocess.Popen(
            [*agent, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


@pytest.fixture(scope="module")
def finish():
    """finish(process, read) -> its output, of which ``read`` was read already; it must succeed."""

    def wait(process, read=""):
        output = read + process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-4000:]
        return output

    return wait


@pytest.fixture(scope="module")
def command(data, flags):
    """command(save_dir, *more, updates=50) -> fairseq-train's words, on gloo."""

    def make(save_dir, *more, updates=50):
        words = ["--distributed-backend", "gloo", "--clip-norm", "1.0", "--tensorboard-logdir", save_dir / "tb"]
        return flags(data, save_dir, *MODEL, *words, *more, task="ours", updates=updates)

    return make


@pytest.fixture(scope="module")
def straight(command, run_cli, tmp_path_factory):
    """straight(processes) -> (loss curve, checkpoint) of one process with as many batches in an update."""
    made = {}

    def run(processes):
        if processes not in made:
            folder = tmp_path_factory.mktemp("straight")
            result = run_cli(command(folder, "--update-freq", processes))
            assert result.returncode == 0, result.stderr[-3000:]
            made[processes] = curve(folder), state(folder / "checkpoint_last.pt")
        return made[processes]

    return run


@pytest.mark.parametrize(
    "backend,processes",
    [
        ("sharded", 2),
        pytest.param("ddp", 2, marks=pytest.mark.nightly),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        pytest.param("sharded", 4, marks=pytest.mark.slow),
    ],
)
def test_a_killed_worker_costs_a_restart_and_nothing_else(
    backend, processes, command, launch, finish, straight, tmp_path
):
    """torchrun starts all workers again, which go on from the last checkpoint. They end where undisturbed ones do, bit
    for bit, and where one process does, to 1e-4.
    """
    words = [*BACKENDS[backend], "--save-interval-updates", "10", "--keep-interval-updates", "1"]
    restarts = ["--max-restarts", "2", "--monitor-interval", "0.1"]
    for attempt in range(3):  # on a busy machine the kill may come when all is over
        folder = tmp_path / str(attempt)
        process = launch(processes, command(folder, *words), *restarts, fresh=backend == "ddp")
        output, killed = "", False
        for line in process.stdout:
            output += line
            if not killed and '"num_updates": "25"' in line:
                killed = True
                for worker in workers_of(process)[processes - 1 : processes]:
                    os.kill(worker, signal.SIGKILL)
        finish(process, output)
        if re.search(r"Loaded checkpoint .* @ [234]0 updates", output):
            break
    else:
        raise AssertionError(output[-3000:])
    expected, checkpoint = straight(processes)
    assert len(expected) == 50 and curve(folder) == pytest.approx(expected, abs=1e-4)
    ended = state(folder / "checkpoint_last.pt")
    assert difference(ended, checkpoint) < 1e-4
    finish(launch(processes, command(tmp_path / "undisturbed", *words)))
    assert difference(ended, state(tmp_path / "undisturbed" / "checkpoint_last.pt")) == 0
    assert curve(folder) == curve(tmp_path / "undisturbed")
    assert ended["optimizer_history"][-1]["num_updates"] == 50


@pytest.mark.nightly
def test_muon_on_two_processes_is_muon_on_one(command, launch, finish, run_cli, tmp_path):
    words = [*BACKENDS["ddp"], "--optimizer", "muon", "--weight-decay", "0.1"]
    finish(launch(2, command(tmp_path / "two", *words, updates=20)))
    result = run_cli(command(tmp_path / "one", *words, "--update-freq", "2", updates=20))
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(curve(tmp_path / "one")) == 20
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    ended, expected = (state(tmp_path / name / "checkpoint_last.pt") for name in ("two", "one"))
    assert difference(ended, expected) < 1e-4


@pytest.mark.nightly
def test_weights_that_travel_in_bf16_train_as_fp32_ones_do(command, launch, finish, straight, tmp_path):
    finish(launch(2, command(tmp_path, *BACKENDS["sharded"], "--autocast", "bf16", updates=20)))
    expected = straight(2)[0]
    losses = curve(tmp_path)
    assert len(losses) == 20 and losses != {update: expected[update] for update in losses}
    assert all(loss == pytest.approx(expected[update], rel=0.02) for update, loss in losses.items())
    assert {t.dtype for t in state(tmp_path / "checkpoint_last.pt")["model"].values()} == {torch.float32}


@pytest.mark.nightly
def test_parts_join_to_the_whole_and_either_goes_on(command, launch, finish, straight, run_cli, tmp_path):
    """Three processes: the parts are of different sizes, and some of them empty."""
    sharded = ["--ddp-backend", "fully_sharded"]
    finish(launch(3, command(tmp_path, *sharded, "--use-sharded-state", updates=20)))
    parts = sorted(tmp_path.glob("checkpoint_last*"))
    assert [p.name for p in parts] == [f"checkpoint_last-shard{i}.pt" for i in range(3)]
    sizes = [sum(t.numel() for t in state(p)["model"].values()) for p in parts]
    whole = join_shards(state(p) for p in reversed(parts))
    assert "fsdp_metadata" not in whole
    joined = tmp_path / "joined.pt"
    result = run_cli(["momentum-lm", "convert", parts[1], joined])
    assert result.returncode == 0 and "3 parts, 20 updates" in result.stdout, result.stderr
    assert difference(state(joined), whole) == 0
    assert max(sizes) < 0.5 * sum(t.numel() for t in whole["model"].values())
    refused = run_cli(["momentum-lm", "convert", parts[1], joined])
    assert refused.returncode == 2 and "--force" in refused.stderr

    # other numbers of processes say what to do, and then do it; the parts go on by themselves
    lost = launch(2, command(tmp_path, *sharded, "--use-sharded-state"))
    output = lost.communicate(timeout=120)[0]
    assert (
        lost.returncode != 0 and "error: " in output and "is of 3 parts" in output and "momentum-lm convert" in output
    )
    alone = run_cli(command(tmp_path))
    assert alone.returncode != 0 and "momentum-lm convert" in alone.stderr
    output = finish(launch(3, command(tmp_path, *sharded, "--use-sharded-state")))
    assert "@ 20 updates" in output
    assert difference(join_shards(state(p) for p in parts), straight(3)[1]) < 1e-4
    other = tmp_path / "other"
    output = finish(launch(2, command(other, *sharded, "--use-sharded-state", "--restore-file", joined, updates=22)))
    assert "@ 20 updates" in output
    one = tmp_path / "one"
    assert run_cli(command(one, "--update-freq", "2", "--restore-file", joined, updates=22)).returncode == 0
    assert (
        difference(
            join_shards(state(p) for p in sorted(other.glob("checkpoint_last*"))), state(one / "checkpoint_last.pt")
        )
        < 1e-4
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.nightly)])
def test_a_signal_to_one_process_saves_and_ends_all(number, command, launch, finish, tmp_path):
    process = launch(2, command(tmp_path, *BACKENDS["ddp"], updates=100000), fresh=number == signal.SIGTERM)
    for line in process.stdout:
        if '"num_updates": "5"' in line:
            os.kill(workers_of(process)[1], number)
            break
    output = finish(process)
    assert "got a signal" in output
    saved = state(tmp_path / "checkpoint_last.pt")
    updates = saved["optimizer_history"][-1]["num_updates"]
    assert 5 <= updates < 100000 and saved["cfg"]["optimization"]["max_update"] == 100000
    assert saved["cfg"]["dataset"]["disable_validation"] is True
    again = finish(launch(2, command(tmp_path, *BACKENDS["ddp"], updates=updates + 2)))
    assert f"@ {updates} updates" in again


def test_fully_sharded_refuses_what_it_does_not_have(command, run_cli, tmp_path):
    for words in (["--fp16"], ["--cpu-offload"], ["--icl-eval-datasets", "mr"]):
        result = run_cli(command(tmp_path, "--ddp-backend", "fully_sharded", *words))
        assert (
            result.returncode != 0
            and f"error: {words[0]} does not go with --ddp-backend fully_sharded" in result.stderr
        )
