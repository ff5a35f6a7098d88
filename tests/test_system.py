"""Processes that are started import nothing from the current folder; progress bars fit what they are shown on."""

import io
import multiprocessing
import os
import sys

import pytest

from momentum_lm.system import isolated_children, progress_bar


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_run_no_file_of_the_current_folder(tmp_path, monkeypatch, method):
    """Nor do the processes that look after their semaphores and fork them."""
    for name in ("pickle", "multiprocessing", "struct", "signal", "socket"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    context = multiprocessing.get_context(method)
    with isolated_children(), context.Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
    assert not (tmp_path / "ran").exists() and "PYTHONSAFEPATH" not in os.environ


def test_the_environment_is_what_it_was(monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    with isolated_children():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONSAFEPATH"] == "yes"


def test_a_bar_writes_seldom_into_a_log_file_and_ends_there(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=3000, desc="work") as bar:
        for _ in range(3000):
            bar.update(0)  # as one does who watches others work
            bar.update(1)
    written = sys.stderr.getvalue()
    assert "3000/3000" in written and written.count("\r") <= 4
