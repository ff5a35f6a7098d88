"""Files written tensor by tensor are what torch and safetensors write; folders are whole whatever ends the process;
memory stays low.
"""

import os
import signal
import subprocess
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from momentum_lm.errors import UserError
from momentum_lm.files import write_json
from momentum_lm.formats.families import GPT2, expected
from momentum_lm.formats.folder import whole_folder
from momentum_lm.formats.lazy import Lazy, concatenated, read_safetensors, write_safetensors, write_torch
from momentum_lm.model import DecoderConfig

TENSORS = {
    "single": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2, 2).bfloat16(),
    "double": torch.randn(1, 9).double(),
    "whole": torch.arange(5),
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 4),
    "turned": torch.randn(4, 6).t(),
}


def test_torch_reads_what_is_written(tmp_path):
    lazies = {name: Lazy.of(tensor) for name, tensor in TENSORS.items()}
    seen = []
    write_torch(
        tmp_path / "model.pt",
        {"model": lazies | {"again": lazies["single"]}, "cfg": {"a": [1, None, "é"]}},
        seen.append,
    )
    assert sum(seen) == sum(tensor.nbytes for tensor in TENSORS.values())
    for mmap in (False, True):
        state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
        assert state["cfg"] == {"a": [1, None, "é"]}
        for name, tensor in TENSORS.items():
            found = state["model"][name]
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype and found.is_contiguous(), name
        assert state["model"]["again"].data_ptr() == state["model"]["single"].data_ptr()
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.testzip() is None
        offsets = [entry.header_offset for entry in archive.infolist() if "/data/" in entry.filename]
    content = (tmp_path / "model.pt").read_bytes()
    for offset in offsets:
        name, extra = (int.from_bytes(content[offset + at : offset + at + 2], "little") for at in (26, 28))
        assert (offset + 30 + name + extra) % 64 == 0


def test_safetensors_reads_what_is_written(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {name: Lazy.of(tensor) for name, tensor in TENSORS.items()})
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    lazies = read_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(lazies[name].load(), tensor) for name, tensor in TENSORS.items())
    assert {name: (lazy.shape, lazy.dtype) for name, lazy in lazies.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in TENSORS.items()
    }


def test_changes_wait_until_they_are_needed():
    calls = []

    def load():
        calls.append(1)
        return TENSORS["single"]

    lazy = Lazy((3, 5), torch.float32, load)
    turned, parts = lazy.transposed(), lazy.chunks(3)
    rows, half = lazy.rows(torch.tensor([2, -1, 0, 0])), lazy.to(torch.float16)
    back = concatenated(parts)
    assert not calls and [part.shape for part in parts] == [(1, 5)] * 3
    assert (turned.shape, rows.shape, half.nbytes, back.shape) == ((5, 3), (4, 5), 30, (3, 5))
    assert torch.equal(back.load(), TENSORS["single"]) and torch.equal(turned.load(), TENSORS["single"].t())
    assert torch.equal(rows.load(), torch.stack([TENSORS["single"][2], torch.zeros(5), *[TENSORS["single"][0]] * 2]))
    assert half.load().dtype == torch.float16 and Lazy.of(TENSORS["whole"]).to(torch.float16).dtype == torch.int64
    with pytest.raises(ValueError, match="gave"):
        write_safetensors(os.devnull, {"a": Lazy((2,), torch.float32, load)})


def fail_half_way(output):
    with whole_folder(output, True) as folder:
        (folder / "model.pt").write_text("half")
        raise RuntimeError


def test_an_error_leaves_what_there_was(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail_half_way(tmp_path / "out")
        assert os.listdir(tmp_path) == []
    with whole_folder(tmp_path / "out", False) as folder:
        (folder / "model.pt").write_text("whole")
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "out")
    assert (tmp_path / "out" / "model.pt").read_text() == "whole" and os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["model.pt"]


def test_two_at_once(tmp_path):
    with whole_folder(tmp_path / "out", False) as folder:
        (folder / "model.pt").write_text("whole")
        with pytest.raises(UserError, match="is being written by process"), whole_folder(tmp_path / "out", False):
            raise AssertionError
    assert (tmp_path / "out" / "model.pt").read_text() == "whole"


def test_killed_between_the_two_renamings(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "model.pt").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.pt").write_text("new")
    with pytest.raises(UserError, match="is there already"), whole_folder(tmp_path / "out", False):
        raise AssertionError
    assert (tmp_path / "out" / "model.pt").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def large_gpt2(folder, megabytes):
    """A GPT-2 in fp16 of about this size, written as safetensors. Its numbers are 0 to 99, over and over."""
    layers = max(1, round((megabytes * 2**20 / 2 - 8_000 * 1024) / (12 * 1024**2)))
    decoder = DecoderConfig(
        8_000, 1024, 4096, layers, 16, 256, position="learned", scale_embeddings=False, activation="gelu_accurate"
    )
    folder.mkdir()
    numbers = (torch.arange(8_000 * 1024) % 100).half()
    tensors = {
        name: Lazy(lazy.shape, torch.float16, lambda shape=lazy.shape: numbers[: torch.Size(shape).numel()].view(shape))
        for name, lazy in GPT2.to_theirs(expected(decoder), decoder).items()
    }
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", GPT2.config(decoder, 8_000) | {"eos_token_id": 7_999})
    return os.path.getsize(folder / "model.safetensors")


MEASURED = """
import sys
from momentum_lm.cli.convert import main
assert main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    "megabytes", [pytest.param(100, marks=pytest.mark.nightly), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_memory_stays_low(tmp_path, run_cli, megabytes):
    def peak(source, output):
        result = run_cli(["python", "-c", MEASURED, source, output])
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split()[-1]) * 1024

    large_gpt2(tmp_path / "small", 1)
    size = large_gpt2(tmp_path / "large", megabytes)
    base = peak(tmp_path / "small", tmp_path / "small_ours")
    assert peak(tmp_path / "large", tmp_path / "ours") - base < 60 * 2**20
    # the checkpoint is mapped, and of what is mapped the pages that were read count
    assert (
        peak(tmp_path / "ours", tmp_path / "again") - peak(tmp_path / "small_ours", tmp_path / "small_again")
        < size + 60 * 2**20
    )
    before, after = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("large", "again"))
    assert before.keys() == after.keys() and all(
        torch.equal(before[name].load(), after[name].load()) for name in before
    )


@pytest.mark.parametrize("there", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_killed_process_leaves_nothing_half(tmp_path, cli_command, there):
    large_gpt2(tmp_path / "theirs", 120)
    out, partial = tmp_path / "ours", tmp_path / ".ours.partial"
    if there:
        out.mkdir()
        (out / "model.pt").write_text("old")
    arguments = ["momentum-lm", "convert", tmp_path / "theirs", out, *(["--force"] if there else [])]
    command, environment = cli_command(arguments)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not ((partial / "model.pt").exists() and os.path.getsize(partial / "model.pt") > 20_000_000):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert partial.exists() and (os.listdir(out) == ["model.pt"] if there else not out.exists())
    assert not there or (out / "model.pt").read_text() == "old"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"] and sorted(os.listdir(out)) == ["dict.txt", "model.pt"]
    assert len(torch.load(out / "model.pt", weights_only=True, mmap=True)["model"]) > 20
