"""Training that stops and goes on, on one process or two, and what it shows in TensorBoard."""

import random
import re
import signal
import subprocess
import time

import pytest
import torch
from weights import apart

from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.lm.native import load_native

MODEL = ["--arch", "momentum_lm_tiny", "--momentum-learned"]


def weights(path):
    return load_checkpoint(path)["model"]


def curve(folder):
    """The logged losses, in full precision."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("task", [pytest.param("stock", marks=pytest.mark.nightly), "ours"])
def test_resumed_training_is_bitwise_training_straight_through(task, data, run_cli, tmp_path, flags, losses):
    more = [*MODEL, "--dropout", "0.1", "--save-interval-updates", "5", "--disable-validation"]
    straight = run_cli(flags(data, tmp_path / "straight", *more, task=task, updates=10))
    first = run_cli(flags(data, tmp_path / "halves", *more, task=task, updates=5))
    second = run_cli(flags(data, tmp_path / "halves", *more, task=task, updates=10))
    for result in (straight, first, second):
        assert result.returncode == 0, result.stderr
    assert losses(straight) == losses(first) | losses(second) and list(losses(second)) == [6, 7, 8, 9, 10]
    assert same(weights(tmp_path / "straight/checkpoint_last.pt"), weights(tmp_path / "halves/checkpoint_last.pt"))


@pytest.mark.nightly
def test_same_seed_same_run_other_seed_other_run(data, run_cli, tmp_path, flags, losses):
    runs = [
        run_cli(flags(data, tmp_path / str(i), *MODEL, "--seed", seed, updates=3)) for i, seed in enumerate((7, 7, 8))
    ]
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


@pytest.mark.parametrize("most", [6, pytest.param(20, marks=pytest.mark.nightly)])
def test_kill_dash_nine_at_random_moments_loses_a_few_updates_at_most(
    most, data, run_cli, tmp_path, cli_command, flags, json_lines
):
    more = [*MODEL, "--save-interval-updates", "2", "--keep-interval-updates", "2", "--disable-validation"]
    updates = 15 * most
    straight = run_cli(flags(data, tmp_path / "straight", *more, task="ours", updates=updates))
    assert straight.returncode == 0, straight.stderr
    command, environment = cli_command(flags(data, tmp_path / "killed", *more, task="ours", updates=updates), warm=True)
    moment = random.Random(0)
    log, reached, kills = "", 0, 0
    while kills < most:
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines = []
        for line in process.stdout:  # the moment is counted from when training has begun: start-up is slow and harmless
            lines.append(line)
            if "Start iterating" in line:
                break
        time.sleep(moment.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        kills += 1
        log = "".join(lines)
        loaded = re.search(r"Loaded checkpoint .* @ (\d+) updates", log)
        assert loaded or "No existing checkpoint found" in log, log
        start = int(loaded[1]) if loaded else 0
        assert start >= reached - 2, f"restart {kills} began at {start}, but {reached} had been logged"
        done = [int(entry["num_updates"]) for entry in json_lines(log)]
        reached = max([start, *done])
        if reached >= updates:
            break
    last = run_cli(flags(data, tmp_path / "killed", *more, task="ours", updates=updates))
    assert last.returncode == 0, last.stderr
    assert kills == most and same(
        weights(tmp_path / "straight/checkpoint_last.pt"), weights(tmp_path / "killed/checkpoint_last.pt")
    )
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize("task", [pytest.param("stock", marks=pytest.mark.nightly), "ours"])
def test_two_processes_are_one_with_twice_the_batch(task, data, run_cli, tmp_path, flags):
    def logged(name, *words):
        return flags(
            data, tmp_path / name, *MODEL, *words, "--tensorboard-logdir", tmp_path / name / "tb", task=task, updates=10
        )

    one = run_cli(logged("one", "--update-freq", "2"))
    assert one.returncode == 0, one.stderr
    alone = curve(tmp_path / "one/tb/train_inner")
    assert len(alone) == 10
    for backend in ("pytorch_ddp", "legacy_ddp"):
        launch = "torchrun --standalone --nproc_per_node 2 --no-python".split()
        two = run_cli(
            [*launch, *logged(backend, "--distributed-backend", "gloo", "--ddp-backend", backend)],
            warm=True,
            timeout=300,
        )
        assert two.returncode == 0, two.stderr[-3000:]
        assert curve(tmp_path / backend / "tb/train_inner") == pytest.approx(alone, abs=1e-4)
        a, b = weights(tmp_path / "one/checkpoint_last.pt"), weights(tmp_path / backend / "checkpoint_last.pt")
        assert apart(a, b) < 1e-4


def test_bf16_autocast_follows_fp32(data, run_cli, tmp_path, flags, losses):
    plain, cast = (
        run_cli(flags(data, tmp_path / name, *MODEL, "--autocast", name, task="ours", updates=12))
        for name in ("none", "bf16")
    )
    assert losses(plain) != losses(cast)
    for update, loss in losses(plain).items():
        assert float(losses(cast)[update]) == pytest.approx(float(loss), rel=0.02)
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "bf16/checkpoint_last.pt").values())


def test_fp16_lowers_its_loss_scale_until_it_fits_and_keeps_decays_in_fp32(data, run_cli, tmp_path, flags, json_lines):
    words = [
        "--fp16",
        "--fp16-no-flatten-grads",
        "--fp16-init-scale",
        2**22,
        "--autocast",
        "none",
        "--clip-norm",
        "1.0",
    ]
    plain = run_cli(
        flags(data, tmp_path / "plain", *MODEL, "--autocast", "none", "--clip-norm", "1.0", task="ours", updates=8)
    )
    half = run_cli(flags(data, tmp_path / "half", *MODEL, *words, task="ours", updates=8))
    assert half.returncode == 0, half.stderr[-3000:]
    assert "gradient overflow" in half.stdout + half.stderr and not (tmp_path / "half" / "bad_batches.jsonl").exists()
    lines = json_lines(half)
    scales = [float(line["loss_scale"]) for line in lines]
    assert [int(line["num_updates"]) for line in lines] == list(range(1, 9)) and max(scales) < 2**22
    # other batches than in fp32, since those of an overflow are left out, but the same course
    ends = [float(json_lines(result)[-1]["loss"]) for result in (plain, half)]
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
    kept = weights(tmp_path / "half/checkpoint_last.pt")
    assert {v.dtype for k, v in kept.items() if k.endswith("momentum.decay_logit")} == {torch.float32}


def test_packed_documents_change_the_loss(data, run_cli, tmp_path, flags, losses):
    loose, packed = (
        run_cli(flags(data, tmp_path / str(i), *MODEL, *more, task="ours", updates=3))
        for i, more in enumerate(([], ["--packed-documents"]))
    )
    assert loose.returncode == packed.returncode == 0, packed.stderr
    assert losses(loose) != losses(packed) and losses(loose).keys() == losses(packed).keys()


def test_tensorboard_shows_speed_decays_ratios_and_hparams(data, run_cli, tmp_path, flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    result = run_cli(
        flags(
            data,
            tmp_path / "run",
            *MODEL,
            "--tensorboard-logdir",
            tmp_path / "tb",
            "--log-interval",
            "2",
            "--validate-interval-updates",
            "4",
            task="ours",
            updates=8,
        )
    )
    assert result.returncode == 0, result.stderr
    stock = EventAccumulator(str(tmp_path / "tb" / "train_inner")).Reload()
    assert {"loss", "gnorm", "wps", "tokens_per_second", "peak_memory_gib", "decay", "ema_over_attention"} <= set(
        stock.Tags()["scalars"]
    )
    ours = EventAccumulator(str(tmp_path / "tb" / "model")).Reload()
    scalars = set(ours.Tags()["scalars"])
    for layer in (0, 1):
        assert {f"decay/layer_{layer}", f"ema_over_attention/layer_{layer}"} <= scalars
        assert f"decays/layer_{layer}" in ours.Tags()["histograms"]
    decays = [event.value for event in ours.Scalars("decay/layer_0")]
    assert len(decays) == 4 and all(0 < decay < 1 for decay in decays) and decays[0] != decays[-1]
    assert all(event.value > 0 for event in ours.Scalars("ema_over_attention/layer_1"))
    assert [event.step for event in ours.Scalars("hparam/valid/loss")] == [4, 8]
    plugin = ours.summary_metadata["_hparams_/session_start_info"].plugin_data
    start = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info
    assert start.hparams["momentum_learned"].number_value == 1
    assert start.hparams["arch"].string_value == "momentum_lm_tiny"
    assert start.hparams["lr"].number_value > 0 and start.hparams["optimizer"].string_value
    assert not [name for name in start.hparams if name.startswith("_")]
    evaluated = load_native(tmp_path / "run/checkpoint_last.pt").describe()["architecture"]
    numbers = {name: value for name, value in evaluated.items() if value is not None}
    assert numbers.keys() <= start.hparams.keys()  # one name for an option in training and evaluation
    layout = ours.summary_metadata["custom_scalars__config__"]
    assert layout.plugin_data.plugin_name == "custom_scalars"
