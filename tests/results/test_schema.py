import json

import pytest

from momentum_lm.errors import UserError
from momentum_lm.results.records import prediction, read_results, read_samples
from momentum_lm.results.schema import Prediction, problem

RUN = {"dataset": "mr", "seed": 1, "shots": 4, "order": 0, "calibration": "none", "shots_fitted": 4, "num_examples": 10,
    "accuracy": 0.5,
       "ci95": [0.2, 0.8], "macro_f1": 0.5, "majority": 0.5, "confusion": [[5, 0], [5, 0]]}  # fmt: skip
BIG = int("9" * 400)


def write(path, **changes):
    run = {name: value for name, value in (RUN | changes).items() if value is not ...}
    config = {"datasets": {"mr": {"labels": ["a", "b"]}}}
    path.write_text(
        json.dumps({"task": "icl_classification", "model": {"path": "m"}, "config": config, "runs": [RUN, run]})
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accuracy": "abc"}, "run 1: accuracy is a str"),
        ({"accuracy": None}, "run 1: accuracy is a NoneType"),
        ({"accuracy": True}, "run 1: accuracy is a bool"),
        ({"accuracy": 1e308}, "run 1: accuracy is 1e+308, and not from 0 to 1"),
        ({"accuracy": BIG}, "run 1: accuracy is a number of more than 20 digits, and not from 0 to 1"),
        ({"accuracy": ...}, "run 1 has no accuracy"),
        ({"shots": "many"}, "run 1: shots is a str"),
        ({"shots": 2**40}, "run 1: shots is 1099511627776, and not from 0 to 2.14748e+09"),
        ({"seed": 1.0}, "run 1: seed is a float"),
        ({"num_examples": 0}, "run 1: num_examples is 0, and not from 1"),
        ({"ci95": [0.5]}, "run 1: ci95 has a length of 1, and not 2"),
        ({"ci95": [0.5, "x"]}, "run 1: ci95 is a str"),
        ({"dataset": ["mr"]}, "run 1: dataset is a list"),
        ({"dataset": "trec"}, "run 1: dataset is 'trec', which config.datasets lacks"),
        ({"confusion": [[1]]}, "run 1: confusion is no table of 2 by 2 labels"),
        ({"majority": None}, "run 1 has neither majority nor chance"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, said):
    write(tmp_path / "results.json", **changes)
    with pytest.raises(UserError) as error:
        read_results(tmp_path)
    assert f"results.json is damaged ({said}" in str(error.value) and str(error.value).endswith(
        "delete it or choose another folder"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"task": NaN}', "NaN is no JSON"),
        (b'{"task": "\xff"}', "not UTF-8"),
        (b'{"task": "\\ud800"}', "not UTF-8"),
        (b"9" * 10_000, "digits"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, said):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.json is damaged \(") as error:
        read_results(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_keys_of_a_later_version_are_left_alone(tmp_path):
    write(tmp_path / "results.json", demonstrations_kind="gold", more={"a": [1]})
    assert read_results(tmp_path)["runs"][1]["more"] == {"a": [1]}


LINE = {"dataset": "mr", "seed": 1, "shots": 0, "order": 0, "calibration": "none", "index": 0, "gold": 0, "pred": 1}


@pytest.mark.parametrize(
    "change",
    [{}, {"seed": 2**40}, {"pred": -1}, {"pred": "0"}, {"pred": 99999999999999999999}, {"gold": None}, {"index": True},
    {"dataset": ["a"]},
     {"calibration": {}}, {"order": "x"}, {"scores": [0.5]}, {"pred": 0.0}],
)  # fmt: skip
def test_the_quick_check_of_predictions_is_the_schemas(change):
    entry = LINE | change
    found, wrong = prediction(json.dumps(entry).encode())
    assert wrong == problem(entry, Prediction, "") and found == ({} if wrong else entry)


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b"3", b"null", b"\xff\n", b'{"dataset": "mr"}', b"[" * 50_000])
def test_a_line_that_is_no_prediction_says_why(line):
    assert prediction(line)[0] == {} and prediction(line)[1]


@pytest.mark.parametrize(
    "samples",
    [[], {}, [3], [{"dataset": 5, "shots": 0, "prompt": "", "continuations": ["a"], "gold": 0}],
     [{"dataset": "mr", "shots": 0, "prompt": "", "continuations": ["a"], "gold": 1}]],
)  # fmt: skip
def test_samples_that_are_not_ours_are_refused(tmp_path, samples):
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match=r"samples\.json is damaged or not ours"):
        read_samples(tmp_path / "samples.json")
