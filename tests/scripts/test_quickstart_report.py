"""What the quickstart's page makes of curves and commands."""

import math
import shlex
import sys
from pathlib import Path

import pytest
from quickstart import fetching
from quickstart_report import _gap

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_gap_is_momentums_loss_less_the_others_in_nats_where_both_logged():
    momentum = [{"num_updates": n, "loss": loss} for n, loss in ((10, 5.0), (20, 3.0), (30, 2.0))]
    baseline = [{"num_updates": n, "loss": loss} for n, loss in ((10, 4.0), (20, 4.0), (40, 1.0))]
    assert _gap(momentum, baseline, 2048) == [
        (20480, pytest.approx(math.log(2))),
        (40960, pytest.approx(-math.log(2))),
    ]


def test_a_command_that_fetches_can_be_typed(tmp_path):
    words = shlex.split(fetching("corpus", "movie-reviews", f"{tmp_path}/my runs/corpus"))
    assert words == [sys.executable, "scripts/fetch_corpus.py", "movie-reviews", f"{tmp_path}/my runs/corpus"]
    for what in ("corpus", "model", "datasets"):
        assert Path(shlex.split(fetching(what))[1]).name in {path.name for path in SCRIPTS.iterdir()}
