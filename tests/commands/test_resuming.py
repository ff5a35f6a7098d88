"""A run that is over, torn, locked, or goes on with other batches; and that fairseq's own models know nothing of it."""

import logging
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from momentum_lm.errors import CheckpointError, UserError
from momentum_lm.fairseq_plugin.lock import NAME
from momentum_lm.formats.checkpoint import load_checkpoint

OURS = ["--arch", "momentum_lm_tiny", "--disable-validation"]
STOCK = ["--arch", "transformer_lm", "--disable-validation"]


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def files(folder):
    """Every checkpoint's bytes."""
    return {path.name: path.read_bytes() for path in folder.glob("checkpoint*.pt")}


def updates(path):
    return load_checkpoint(path)["optimizer_history"][-1]["num_updates"]


def trained(log):
    """The numbers of updates that were logged since the last call."""
    found = [
        int(n)
        for r in log.records
        if r.name == "train_inner"
        for n in re.findall(r'"num_updates": "(\d+)"', r.getMessage())
    ]
    log.clear()
    return found


WAYS = {
    "max-update": ([], [], "6 updates, and --max-update 6"),
    "max-epoch": (["--max-epoch", "1", "--batch-size", "400"], [], "all of its epochs, and --max-epoch 1"),
    "stop-time": (["--stop-time-hours", "1e-9"], [], "hours of training, and --stop-time-hours 1e-09"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_over_trains_no_more(way, train_here, log, tmp_path):
    more, again, said = WAYS[way]
    train_here(tmp_path, *OURS, *more, updates=6)
    kept = files(tmp_path)
    assert trained(log) and kept
    train_here(tmp_path, *OURS, *more, *again, updates=6)
    assert said in log.text and trained(log) == [] and files(tmp_path) == kept


def test_a_run_that_lost_its_patience_trains_no_more(train_here, log, tmp_path):
    more = [
        "--arch",
        "gpt_lm_tiny",
        "--validate-interval-updates",
        "2",
        "--patience",
        "1",
        "--lr",
        "30",
        "--save-interval-updates",
        "2",
    ]
    train_here(tmp_path, *more, updates=100)
    last, kept = trained(log)[-1], files(tmp_path)
    assert last < 100
    train_here(tmp_path, *more, updates=100)
    assert "--patience 1" in log.text and trained(log) == [] and files(tmp_path) == kept
    train_here(tmp_path, *more, "--patience", "-1", updates=last + 1)
    assert trained(log) == [last + 1]


def test_a_run_that_is_over_goes_on_where_what_ended_it_is_to_be_forgotten(train_here, log, tmp_path):
    """Its epochs with --reset-dataloader, its validations without improvement with --reset-meters."""
    epochs = [*OURS, "--max-epoch", "1", "--batch-size", "400"]
    train_here(tmp_path / "epochs", *epochs, updates=100)
    last = trained(log)[-1]
    assert last < 100
    train_here(tmp_path / "epochs", *epochs, "--reset-dataloader", updates=100)
    assert trained(log) == list(range(last + 1, 2 * last + 1))
    bad = ["--arch", "gpt_lm_tiny", "--validate-interval-updates", "2", "--patience", "1", "--lr", "30"]
    train_here(tmp_path / "bad", *bad, updates=100)
    last = trained(log)[-1]
    assert last < 100
    train_here(tmp_path / "bad", *bad, "--reset-meters", updates=last + 1)
    assert trained(log) == [last + 1]


def test_more_updates_go_on_and_none_with_another_runs_checkpoint_are_an_error(train_here, log, tmp_path):
    train_here(tmp_path / "a", *OURS, updates=3)
    train_here(tmp_path / "a", *OURS, updates=5)
    assert trained(log) == [1, 2, 3, 4, 5]
    restore = ["--restore-file", tmp_path / "a/checkpoint_last.pt"]
    with pytest.raises(UserError, match=r"has 5 updates, and --max-update 5: nothing is left to train"):
        train_here(tmp_path / "b", *OURS, *restore, updates=5)
    train_here(tmp_path / "a", *OURS, *restore, updates=5)  # by its name, but its own
    assert trained(log) == []


def test_the_newest_whole_checkpoint_is_that_of_the_most_updates(train_here, log, tmp_path):
    words = [*OURS, "--save-interval-updates", "2", "--batch-size", "150", "--keep-interval-updates", "9"]
    train_here(tmp_path, *words, updates=10)
    for path in tmp_path.glob("checkpoint_*_[24].pt"):
        os.utime(path, (2**31, 2**31))  # a clock was set back since
    os.truncate(tmp_path / "checkpoint_last.pt", 1000)  # a file of its own: the newest one stays whole
    newest = next(tmp_path.glob("checkpoint_*_10.pt"))
    train_here(tmp_path, *words, updates=11)
    assert f"going on from {newest}" in log.text and trained(log)[-1] == 11
    # epochs' checkpoints tell by their content
    epochs = tmp_path / "epochs"
    epochs.mkdir()
    shutil.copy(newest, epochs / "checkpoint2.pt")
    older = [path for path in tmp_path.glob("checkpoint_*_*.pt") if int(path.stem.split("_")[2]) < 10]
    shutil.copy(max(older, key=lambda path: int(path.stem.split("_")[2])), epochs)
    os.utime(epochs / "checkpoint2.pt", (1, 1))
    train_here(epochs, *words, updates=11)
    assert f"going on from {epochs / 'checkpoint2.pt'}" in log.text and trained(log) == [11]


def drawn(monkeypatch):
    """The numbers of the samples that training draws, in order."""
    from momentum_lm.fairseq_plugin.trainer import Trainer

    found, stock = [], Trainer.train_step

    def train_step(self, samples, *rest):
        found.extend(int(i) for sample in samples if sample for i in sample["id"])
        return stock(self, samples, *rest)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return found


@pytest.mark.parametrize(
    "then",
    [
        "--batch-size 3 --update-freq 4",
        pytest.param("--max-tokens 1024", marks=pytest.mark.nightly),
        pytest.param("--seed 9", marks=pytest.mark.nightly),
        pytest.param("--batch-size 8", marks=pytest.mark.nightly),
        pytest.param("--update-freq 3", marks=pytest.mark.nightly),
    ],
)
def test_other_batches_go_on_at_the_same_sample(then, data, train_here, monkeypatch, tmp_path):
    from momentum_lm.text.indexed import IndexedDataset

    ids, then = drawn(monkeypatch), then.split()
    words = [*OURS, "--max-epoch", "1", "--batch-size", "16", "--update-freq", "2"]
    train_here(tmp_path, *words, updates=5)
    assert 130 < len(ids) <= 160
    train_here(tmp_path, *words, *then, updates=7)
    train_here(tmp_path, *words, "--batch-size", "5", updates=9)
    train_here(tmp_path, *words, *then, updates=10**6)
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")["extra_state"]["train_iterator"]
    blocks = -(-IndexedDataset(data / "train").num_tokens // 32)
    assert state["epoch"] == 2 and sorted(ids) == list(range(blocks)) and blocks > 500  # each once, none left out


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["stock task", "earlier version"])
def test_checkpoints_that_do_not_say_their_batches_are_understood_by_their_options(
    kind, train_here, monkeypatch, tmp_path
):
    ids = drawn(monkeypatch)
    task = "stock" if kind == "stock task" else "ours"
    train_here(tmp_path, *OURS, "--batch-size", "16", task=task, updates=5)
    path = tmp_path / "checkpoint_last.pt"
    state = load_checkpoint(path)
    state["extra_state"]["train_iterator"].pop("batching", None)
    torch.save(state, path)
    reset = ["--reset-optimizer", "--reset-lr-scheduler"] if task == "stock" else []  # another criterion
    train_here(tmp_path, *OURS, "--batch-size", "8", "--max-epoch", "1", *reset, updates=10**6)
    assert sorted(ids) == list(range(len(ids)))


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ([], ["--tokens-per-sample", "16"], "epoch of .* samples of 32 tokens, and this one has .* of 16"),
        (
            ["--sample-break-mode", "eos"],
            ["--sample-break-mode", "eos", "--batch-size", "8"],
            "a place cannot be carried over",
        ),
    ],
)
def test_an_epoch_of_other_samples_is_refused_unless_begun_anew(first, then, said, train_here, tmp_path):
    more = [*OURS, "--max-target-positions", "600", "--tokens-per-sample", "600" if first else "32"]
    train_here(tmp_path, *more, *first, updates=3)
    with pytest.raises(UserError, match=rf"{said}.*--reset-dataloader"):
        train_here(tmp_path, *more, *then, updates=4)
    train_here(tmp_path, *more, *then, "--reset-dataloader", updates=4)
    assert updates(tmp_path / "checkpoint_last.pt") == 4


def test_fixed_momentum_is_not_lost_or_changed_where_a_checkpoint_is_restored(train_here, tmp_path):
    """It has no tensors, so that the weights fit a model without it."""
    train_here(tmp_path / "a", "--arch", "momentum_lm_tiny", "--momentum-eta", "0.3", updates=1)
    words = ["--restore-file", tmp_path / "a/checkpoint_last.pt", "--reset-optimizer"]
    with pytest.raises(UserError, match="was trained with --momentum-kind ema, and this command's model has none"):
        train_here(tmp_path / "b", "--arch", "gpt_lm_tiny", *words)
    with pytest.raises(UserError, match=r"was trained with --momentum-eta 0\.3, and this command's model has 0\.5"):
        train_here(tmp_path / "c", "--arch", "momentum_lm_tiny", "--momentum-eta", "0.5", *words)
    train_here(tmp_path / "d", "--arch", "momentum_lm_tiny", "--momentum-eta", "0.3", *words, updates=1)


def test_a_restore_file_that_is_not_there(train_here, log, tmp_path):
    with pytest.raises(CheckpointError, match=r"--restore-file .*typo/checkpoint_last\.pt does not exist"):
        train_here(tmp_path, *OURS, "--restore-file", tmp_path / "typo/checkpoint_last.pt")
    with pytest.raises(CheckpointError, match=r"--restore-file .*typo\.pt does not exist"):
        train_here(tmp_path, *OURS, "--restore-file", tmp_path / "typo.pt")
    # the run's own, before its first start
    train_here(tmp_path, *OURS, "--restore-file", tmp_path / "checkpoint_last.pt", updates=1)
    assert trained(log) == [1]


def test_the_dictionary_of_a_checkpoint_is_its_own(data, train_here, run_cli, tmp_path):
    """Of equal size with two symbols exchanged: refused by whatever reads the weights; other counts are no matter."""
    train_here(tmp_path / "run", *OURS, updates=2)
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    other = shutil.copytree(data, tmp_path / "other")
    lines = (data / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join([*lines[1::-1], *lines[2:]]) + "\n")
    said = f"the dictionary of {other} is not the one that"
    with pytest.raises(UserError, match=re.escape(f"{said} {checkpoint} was trained with")):
        train_here(tmp_path / "run", *OURS, updates=3, folder=other)
    words = ["--path", checkpoint, "--batch-size", "4", "--cpu"]
    # fairseq's own task, by default
    evaluate = ["fairseq-eval-lm", other, "--gen-subset", "valid", "--tokens-per-sample", "32", *words]
    validate = ["fairseq-validate", other, "--task", "momentum_language_modeling", *words]
    for command in (evaluate, validate):
        result = run_cli(command)
        assert result.returncode != 0 and result.stderr.splitlines()[-1].startswith(f"error: {said}"), result.stderr
    perplexity = [
        "fairseq-eval",
        "--task",
        "lm_perplexity",
        other,
        "--path",
        checkpoint,
        "--context-lengths",
        "32",
        "--split",
        "valid",
    ]
    result = run_cli([*perplexity, "--results-dir", tmp_path / "out"])
    assert result.returncode == 2 and f"{other / 'dict.txt'} is not the one that" in result.stderr
    (other / "dict.txt").write_text("\n".join(f"{line.split()[0]} 1" for line in lines) + "\n")
    train_here(tmp_path / "run", *OURS, updates=3, folder=other)


# One training at a time


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_dead(
    train_here, cli_command, flags, data, log, tmp_path
):
    words = [*OURS, "--num-workers", "2", "--save-interval-updates", "2", "--keep-interval-updates", "2"]
    command, environment = cli_command(flags(data, tmp_path, *words, task="ours", updates=10**6))
    first = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in first.stdout:
        if '"num_updates": "3"' in line:
            break
    with pytest.raises(
        UserError, match=rf"--save-dir {tmp_path} is in use by another training \(process {first.pid} on "
    ):
        train_here(tmp_path, *OURS, updates=4)
    assert trained(log) == []
    first.send_signal(signal.SIGKILL)  # its workers live on for some seconds
    first.wait()
    began = updates(tmp_path / "checkpoint_last.pt")
    train_here(tmp_path, *OURS, updates=began + 1)
    assert trained(log) == [began + 1]
    first.stdout.close()


def test_what_lies_in_the_lock_files_place_is_left_as_it_is(train_here, log, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    ways = (lambda path: path.symlink_to(mine), os.mkfifo, os.mkdir, lambda path: os.link(mine, path))
    for number, make in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / NAME)
        began = time.monotonic()
        train_here(folder, *OURS, updates=1)
        assert trained(log) == [1] and time.monotonic() - began < 60
    assert mine.read_text() == "mine"


# fairseq's own


def test_fairseqs_own_models_resume_as_without_us(train_here, log, tmp_path):
    """A missing --restore-file is none, only the last checkpoint counts, and a finished run makes one more update."""
    words = [*STOCK, "--save-interval-updates", "2", "--restore-file"]
    train_here(tmp_path, *words, tmp_path / "checkpoint_last.pt", task="stock", updates=4)
    train_here(tmp_path, *words, "checkpoint_last.pt", task="stock", updates=4)
    assert trained(log) == [1, 2, 3, 4, 5]
    (tmp_path / "checkpoint_last.pt").unlink()
    train_here(tmp_path, *words, "checkpoint_last.pt", task="stock", updates=1)
    assert trained(log) == [1]
    assert not (tmp_path / NAME).exists()
    state = load_checkpoint(tmp_path / "checkpoint_last.pt")
    assert state["task_state"] == {} and not {"skipped", "early_stop"} & state["extra_state"].keys()


# Muon


@pytest.mark.parametrize("task,words", [("ours", OURS), pytest.param("stock", STOCK, marks=pytest.mark.nightly)])
def test_muon_goes_on_bit_for_bit(task, words, train_here, log, tmp_path):
    """Under a schedule of three stages, which scales both learning rates."""
    schedule = "--lr-scheduler tri_stage --warmup-steps 3 --hold-steps 4 --decay-steps 3".split()
    words = [*words, "--optimizer", "muon", "--weight-decay", "0.1", "--clip-norm", "1.0", *schedule]
    train_here(tmp_path / "straight", *words, task=task, updates=10)
    for end in (5, 10):
        train_here(tmp_path / "stopped", *words, task=task, updates=end)
    assert trained(log) == [*range(1, 11), *range(1, 11)]
    straight, stopped = (load_checkpoint(tmp_path / name / "checkpoint_last.pt") for name in ("straight", "stopped"))
    assert straight["model"].keys() == stopped["model"].keys()
    for name, tensor in straight["model"].items():
        # fairseq leaves the latter as memory was
        assert torch.equal(tensor, stopped["model"][name]) or name.endswith("_float_tensor"), name
    a, b = (state["last_optimizer_state"] for state in (straight, stopped))
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index, entry in a["state"].items():
        assert all(torch.equal(value, b["state"][index][name]) for name, value in entry.items())
    rates = {"ns_steps" in group: group["lr"] for group in a["param_groups"]}
    assert rates == {False: pytest.approx(1e-4), True: pytest.approx(2e-4)}  # a hundredth of 1e-2 and of 0.02


@pytest.mark.parametrize("words", [["--fp16"], ["--ddp-backend", "fully_sharded"]])
@pytest.mark.parametrize("task,model", [("ours", OURS), pytest.param("stock", STOCK, marks=pytest.mark.nightly)])
def test_what_does_not_go_with_muon_is_one_line(task, model, words, train_here, tmp_path):
    with pytest.raises(UserError, match=f"^{' '.join(words)} does not go with --optimizer muon; leave it out"):
        train_here(tmp_path, *model, "--optimizer", "muon", *words, task=task, updates=1)
    assert not list(tmp_path.glob("*.pt"))


# What cannot be trained is one line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-tokens", "20"], "a sample of 32 tokens does not fit --max-tokens 20"),
        (["--max-tokens", "1", "--sample-break-mode", "eos"], r"a sample of \d+ tokens does not fit --max-tokens 1"),
        (["--max-target-positions", "16"], "a sample of 32 tokens does not fit the model, which takes 16"),
        (["--output-dictionary-size", "50"], "--output-dictionary-size: .* predicts all 504 entries"),
        (
            ["--memory-efficient-fp16"],
            "--memory-efficient-fp16 and --memory-efficient-bf16 do not go with --optimizer fused_adamw",
        ),
        (
            ["--memory-efficient-bf16"],
            "--memory-efficient-fp16 and --memory-efficient-bf16 do not go with --optimizer fused_adamw",
        ),
    ],
)
def test_impossible_flags(words, said, train_here, tmp_path):
    with pytest.raises(UserError, match=said):
        train_here(tmp_path, *OURS, *words, updates=1)
    assert not list(tmp_path.glob("*.pt"))
