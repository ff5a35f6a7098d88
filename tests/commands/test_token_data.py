"""Damaged shards stop fairseq-train with one line that names the file: at the start, or where the token is met."""

import shutil

import numpy as np
import pytest

from momentum_lm.text.indexed import IndexedDataset

MODEL = ["--arch", "gpt_lm_tiny", "--disable-validation"]


@pytest.fixture
def shards(data, tmp_path):
    """Two folders with the same data."""
    for name in ("one", "two"):
        shutil.copytree(data, tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.nightly
def test_folders_take_turns_by_epoch(shards, run_cli, flags, tmp_path, losses):
    one, two = shards
    updates = -(-IndexedDataset(one / "train").num_tokens // 32 // 4) + 3
    result = run_cli(flags(f"{one}:{two}", tmp_path / "run", *MODEL, task="ours", updates=updates))
    assert max(losses(result)) == updates
    assert all(f"{folder / 'train'}\n" in result.stderr + result.stdout for folder in shards)


def test_an_index_missing_in_the_second_folder_is_named_before_training(shards, run_cli, flags, tmp_path):
    one, two = shards
    (two / "train.idx").unlink()
    result = run_cli(flags(f"{one}:{two}", tmp_path / "run", *MODEL, task="ours"))
    (error,) = result.stderr.splitlines()
    assert result.returncode != 0 and error.startswith(f"error: {two / 'train.idx'} is missing; make it with")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_id_beyond_the_dictionary_is_named_with_its_document(workers, shards, run_cli, flags, tmp_path, losses):
    folder, _ = shards
    path = folder / "train.bin"
    ids = np.fromfile(path, np.uint16)
    ids[-1] = 60000
    ids.tofile(path)
    document = len(IndexedDataset(folder / "train")) - 1
    result = run_cli(flags(folder, tmp_path / "run", *MODEL, "--num-workers", workers, task="ours", updates=10**6))
    error = result.stderr.splitlines()[-1]
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert error.startswith(
        f"error: {path} holds the token id 60000 in document {document} (counted from 0), but the dictionary has"
    )
