"""What a training run does about bad batches, torn checkpoints and full disks."""

import json
import re
import subprocess

import pytest
import torch

from momentum_lm.formats.checkpoint import load_checkpoint

MODEL = ["--arch", "momentum_lm_tiny", "--momentum-learned", "--disable-validation", "--clip-norm", "1.0"]


def state(path):
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def command(data, flags):
    """command(save_dir, *more, updates) -> fairseq-train's words."""
    return lambda save_dir, *more, updates: flags(data, save_dir, *MODEL, *more, task="ours", updates=updates)


def test_a_torn_checkpoint_gives_way_to_the_newest_whole_one(command, run_cli, losses, tmp_path):
    words = ["--save-interval-updates", "4", "--keep-interval-updates", "3"]
    first = run_cli(command(tmp_path, *words, updates=10))
    assert first.returncode == 0
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    (tmp_path / "checkpoint_1_8.pt").write_bytes(b"")
    result = run_cli(command(tmp_path, *words, updates=10))
    said = "checkpoint_last, checkpoint_1_8 in .* torn or missing: going on from .*checkpoint_1_4"
    assert re.search(said, result.stdout + result.stderr)
    assert list(losses(result)) == [5, 6, 7, 8, 9, 10] and losses(result).items() <= losses(first).items()
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(b"torn")
    result = run_cli(command(tmp_path, *words, updates=12))
    assert result.returncode != 0 and "error: no checkpoint in" in result.stderr
    assert all(path.read_bytes() == b"torn" for path in tmp_path.glob("checkpoint*.pt"))


POISON = '''
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig

@register_criterion("poisoned", dataclass=CrossEntropyCriterionConfig)
class Poisoned(CrossEntropyCriterion):
    """Not a number whenever sample POISON is in the batch."""
    def forward(self, model, sample, reduce=True):
        loss, size, log = super().forward(model, sample, reduce)
        if any(int(i) % EVERY == 0 for i in sample["id"]):
            loss = loss * float("nan")
        return loss, size, log
'''


@pytest.fixture
def poisoned(tmp_path):
    """poisoned(every) -> flags of a criterion that gives NaN for every so many samples."""

    def make(every):
        folder = tmp_path / f"poison{every}"
        folder.mkdir()
        (folder / "__init__.py").write_text(POISON.replace("EVERY", str(every)))
        return ["--user-dir", folder, "--criterion", "poisoned"]

    return make


@pytest.mark.parametrize(
    "precision", [[], ["--bf16", "--fp16-no-flatten-grads", "--autocast", "none"]], ids=["fp32", "bf16"]
)
def test_bad_batches_are_left_out_and_written_down(precision, command, poisoned, run_cli, json_lines, tmp_path):
    result = run_cli(command(tmp_path / "run", *poisoned(37), *precision, updates=80))
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()]
    assert records and all(any(i % 37 == 0 for i in record["ids"]) for record in records)
    lines = json_lines(result)
    assert [int(line["num_updates"]) for line in lines] == list(range(1, 81))
    assert all(torch.isfinite(t).all() for t in state(tmp_path / "run" / "checkpoint_last.pt")["model"].values())
    rates = {int(line["num_updates"]): float(line["lr"]) for line in lines}
    first = records[0]["update"]
    assert rates[first + 1] == pytest.approx(0.005) and {0.01} >= {
        rate for update, rate in rates.items() if update <= first
    }
    assert not (tmp_path / "run" / "crash.pt").exists()


def test_a_run_of_nothing_but_bad_batches_stops(command, poisoned, run_cli, tmp_path):
    result = run_cli(command(tmp_path / "run", *poisoned(1), updates=80))
    assert result.returncode != 0 and result.stderr.splitlines()[-1].startswith(
        "error: the gradient at update 0 is not finite"
    )
    assert len((tmp_path / "run" / "bad_batches.jsonl").read_text().splitlines()) == 5
    assert not list((tmp_path / "run").glob("checkpoint*.pt"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 500 kB, on which one checkpoint fits and another does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(command, run_cli, small_disk, tmp_path):
    words = ["--save-interval-updates", "4"]
    result = run_cli(command(small_disk, *words, updates=20))
    assert result.returncode != 0
    said = r"error: cannot write checkpoint \S+: .*No space left on device; what was there before is untouched"
    assert re.match(said, result.stderr.splitlines()[-1])
    kept = sorted(path.name for path in small_disk.glob("*"))
    assert kept and not any(name.endswith(".tmp") for name in kept)
    (tmp_path / "more").mkdir()
    for name in kept:
        (tmp_path / "more" / name).write_bytes((small_disk / name).read_bytes())
    again = run_cli(command(tmp_path / "more", *words, updates=20))  # the same on a larger disk
    assert again.returncode == 0 and re.search(r"Loaded checkpoint .* @ \d+ updates", again.stdout + again.stderr)
