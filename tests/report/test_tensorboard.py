"""Events are read back with TensorBoard's own code, HParams tab included."""

import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from momentum_lm.report.tensorboard import TrainingLog


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def hparams_tab(folder):
    """What the HParams tab shows: {run: (hyper-parameters, metrics)}, and which hyper-parameters differ."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider, multiplexer=multiplexer))
    experiment = get_experiment.Handler(
        RequestContext(), context, "", api_pb2.GetExperimentRequest(include_metrics=True)
    ).run()
    columns = [api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
    columns += [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, col_params=columns, include_metrics=True,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
    )  # fmt: skip
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    table = {}
    for group in groups:
        values = {k: v.string_value or v.number_value for k, v in group.hparams.items()}
        table[group.sessions[0].name] = values, {m.name.tag: m.value for m in group.metric_values}
    return table, {info.name for info in experiment.hparam_infos if info.differs}


def test_scalars_and_histograms(tmp_path):
    with TrainingLog(tmp_path, {"lr": 0.1}) as log:
        for step in range(3):
            log.scalars({"loss": 3.0 - step, "other": step}, step)
        log.histogram("decay", torch.tensor([0.1, 0.9, float("nan")], dtype=torch.bfloat16), 1)
        log.histogram("nothing", torch.full((3,), float("nan")), 1)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    (histogram,) = events.Histograms("decay")
    assert histogram.histogram_value.num == 2
    assert events.Tags()["histograms"] == ["decay"]


def test_runs_compare_in_the_hparams_tab(tmp_path):
    """Runs with different hyper-parameters, one of which was killed: all are there, none hides another's columns."""
    with TrainingLog(tmp_path / "vanilla", {"kind": "none", "lr": 0.1, "absent": None, "betas": (0.9, 0.98)}) as log:
        log.hparams_with_metrics({"ppl": 30.0}, 5)
        log.hparams_with_metrics({"ppl": 20.0}, 10)
    killed = TrainingLog(tmp_path / "momentum", {"kind": "ema", "lr": 0.1, "eta": 0.5})
    killed.hparams_with_metrics({"ppl": 19.0}, 10)
    table, differing = hparams_tab(tmp_path)
    killed.close()
    assert table == {
        "vanilla": ({"kind": "none", "lr": 0.1, "betas": "(0.9, 0.98)"}, {"hparam/ppl": 20.0}),
        "momentum": ({"kind": "ema", "lr": 0.1, "eta": 0.5}, {"hparam/ppl": 19.0}),
    }
    assert differing == {"kind"}


def test_close_twice_then_writing_is_an_error(tmp_path):
    log = TrainingLog(tmp_path, {})
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.scalars({"loss": 1.0}, 1)


def test_interrupted_program_loses_nothing(tmp_path):
    program = (
        "import atexit, os, signal, sys\n"
        "from momentum_lm.report.tensorboard import TrainingLog\n"
        "log = TrainingLog(sys.argv[1], {'lr': 1})\n"
        "atexit.register(log.close)\n"
        "log.scalars({'loss': 2.0}, 7)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss")] == [(7, 2.0)]
