"""Options of a checkpoint that are names of others."""

import argparse

import pytest

from momentum_lm.errors import UserError
from momentum_lm.formats.options import check_options


def test_an_option_that_names_another_gets_its_value():
    """As in checkpoints of fairseq-hydra-train of March to May 2021."""
    nested = {"task": {"seed": "${common.seed}"}, "args": argparse.Namespace(lr="${optimization.lr}")}
    cfg = {
        "common": {"seed": 7, "tpu": False},
        "dataset": {"batch_size": None, "batch_size_valid": "${dataset.batch_size}"},
        "optimization": {"lr": [0.1, 0.2]},
        "task": {
            "seed": "${common.seed}",
            "batch_size_valid": "${dataset.batch_size_valid}",
            "data": "/a",
            "tpu": "${common.tpu}",
        },
        "model": argparse.Namespace(data="${task.data}", w2v_args=nested),
    }
    check_options({"cfg": cfg})
    assert cfg["task"] == {"seed": 7, "batch_size_valid": None, "data": "/a", "tpu": False}
    assert cfg["dataset"]["batch_size_valid"] is None and cfg["model"].data == "/a"
    assert nested["task"]["seed"] == 7 and nested["args"].lr == [0.1, 0.2]


OTHERS = [
    "${oc.env:HOME}",
    "${env:HOME}",
    "${model}",
    "${model.y}",
    "a${model.n}",
    "${model.n}${model.n}",
    "${${model.n}}",
]


@pytest.mark.parametrize("text", ["${model.x}", *OTHERS])
def test_what_is_more_than_the_name_of_a_plain_option_is_refused(text):
    for options in ({"x": text, "n": 1}, argparse.Namespace(x=text, n=1)):
        with pytest.raises(UserError, match=r"its option cfg\.model\.x refers to something else"):
            check_options({"cfg": {"model": options}})
    long = {f"x{i}": f"${{model.x{i + 1}}}" for i in range(20)} | {"x20": 1}
    with pytest.raises(UserError, match=r"its option cfg\.model\.x0 refers to something else"):
        check_options({"cfg": {"model": long}})
