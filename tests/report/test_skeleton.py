import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from momentum_lm.errors import UserError
from momentum_lm.report import skeleton


def test_short_names():
    assert skeleton.short_names(["runs/a/eval", "runs/b/eval"]) == ["a", "b"]
    assert skeleton.short_names(["runs/a", "runs/a/b"]) == [".", "b"]
    assert skeleton.short_names(["runs/only"]) == ["only"]
    with pytest.raises(UserError, match="named twice"):
        skeleton.short_names(["runs/a", "runs/./a"])


def write(folder, task, runs=({},)):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"task": task, "model": {}, "config": {}, "runs": list(runs)}))
    return folder


def test_results_of_one_task(tmp_path):
    a, b, other, empty = (
        write(tmp_path / n, t, r) for n, t, r in (("a", "x", [{}]), ("b", "x", [{}]), ("c", "y", [{}]), ("d", "x", []))
    )
    assert [r["task"] for r in skeleton.read_runs([a, b], ["x", "y"])] == ["x", "x"]
    with pytest.raises(
        UserError, match=r"c holds results of y, which cannot stand beside those of x in .*a; name folders of one task"
    ):
        skeleton.read_runs([a, other], ["x", "y"])
    with pytest.raises(UserError, match="c holds results of y, and not of x"):
        skeleton.read_runs([other], ["x"])
    with pytest.raises(UserError, match="d holds no finished run of x"):
        skeleton.read_runs([empty], ["x"])


def test_events_are_replaced(tmp_path):
    for value in (1.0, 2.0):
        skeleton.replace_events(tmp_path, {"lr": 0.1}, lambda log, value=value: log.scalars({"loss": value}, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.0)]


def test_older_events_stay_where_writing_fails(tmp_path):
    skeleton.replace_events(tmp_path, {}, lambda log: log.scalars({"loss": 1.0}, 3))

    def fail(log):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        skeleton.replace_events(tmp_path, {}, fail)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == [1.0]
