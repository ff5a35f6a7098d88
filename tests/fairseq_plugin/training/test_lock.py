"""A folder's lock where a launcher starts a training again."""

import fcntl
import os
import threading

import pytest

from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin import lock


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_training_that_is_started_again_waits_for_the_one_before(name, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    before = os.open(tmp_path / lock.NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(before, fcntl.LOCK_EX)
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="is in use by another training"):
        lock.hold(tmp_path)
    monkeypatch.setenv(name, "1")
    ending = threading.Timer(0.2, os.close, [before])
    ending.start()
    lock.hold(tmp_path)
    ending.join()
    other = os.open(tmp_path / lock.NAME, os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)
