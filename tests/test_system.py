"""Processes that are started import nothing from the current folder."""

import multiprocessing
import os

import pytest

from momentum_lm.system import isolated_children


def ran(number):
    return number + 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_run_no_file_of_the_current_folder(tmp_path, monkeypatch, method):
    """Nor do the processes that look after their semaphores and fork them."""
    for name in ("pickle", "multiprocessing", "struct", "signal", "socket"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    context = multiprocessing.get_context(method)
    with isolated_children(), context.Pool(1) as pool:
        assert pool.map(ran, [1]) == [2]
    assert not (tmp_path / "ran").exists() and "PYTHONSAFEPATH" not in os.environ


def test_the_environment_is_what_it_was(monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    with isolated_children():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONSAFEPATH"] == "yes"
