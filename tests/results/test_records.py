import json

import pytest

from momentum_lm.errors import UserError
from momentum_lm.files import file_sha256
from momentum_lm.results.records import Results, read_results

MODEL, CONFIG = {"path": "m.pt", "sha256": "ab"}, {"dtype": "fp32", "shots": (0, 8)}


def open_results(folder, **changes):
    arguments = {"task": "t", "model": MODEL, "config": CONFIG, "key": ("split", "length")} | changes
    return Results(folder, **arguments)


def test_runs_survive_and_are_found(tmp_path):
    results = open_results(tmp_path / "new")
    assert not (tmp_path / "new").exists()  # nothing is written before there is something to write
    results.add({"split": "valid", "length": 64, "ppl": 3.0})
    results.add({"split": "valid", "length": 128, "ppl": 2.0})
    results.add({"split": "valid", "length": 64, "ppl": 3.5})
    again = open_results(tmp_path / "new", model=MODEL | {"path": "elsewhere.pt"})  # a moved file is the same model
    assert again.find(split="valid", length=64)["ppl"] == 3.5
    assert again.find(split="test", length=64) is None
    assert [run["length"] for run in read_results(tmp_path / "new")["runs"]] == [128, 64]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"task": "u"}, 'task: "t" there, "u" now'),
        ({"model": {"sha256": "cd"}}, 'model.sha256: "ab" there, "cd" now'),
        ({"config": {"dtype": "bf16", "shots": [0, 8]}}, "config.dtype"),
        ({"config": CONFIG | {"extra": 1}}, "config.extra: null there, 1 now"),
    ],
)
def test_other_results_are_refused_and_kept(tmp_path, change, named):
    open_results(tmp_path).add({"split": "valid", "length": 1})
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match="force=True") as error:
        open_results(tmp_path, **change)
    assert named in str(error.value)
    forced = open_results(tmp_path, force=True, **change)
    assert forced.runs == [] and (tmp_path / "results.json").read_bytes() == before
    forced.add({"split": "valid", "length": 2})
    assert [run["length"] for run in read_results(tmp_path)["runs"]] == [2]


def test_nan_never_reaches_a_file(tmp_path):
    results = open_results(tmp_path)
    with pytest.raises(ValueError):
        results.add({"split": "valid", "length": 1, "ppl": float("nan")})
    assert results.runs == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{", "[]", json.dumps({"task": "t"})])
def test_bad_files_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(tmp_path)


RUN = {"split": "valid", "context_length": 8, "perplexity": 9.0, "ci95": None, "bits_per_byte": None, "num_tokens": 10,
"num_documents": 1,
       "data_sha256": "0", "documents": "documents/valid-8.npz"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"runs": [{}]}, "run 0 has no split"),
        ({"runs": [RUN, {k: v for k, v in RUN.items() if k != "ci95"}]}, "run 1 has no ci95"),
        ({"runs": [3]}, "run 0 is a int"),
        ({"runs": {}}, "runs is a dict"),
        ({"config": None}, "config is a NoneType"),
        ({"task": []}, "task is a list"),
        ({"task": "icl_classification"}, "run 0 has no dataset"),
    ],
)
def test_what_the_reports_would_stumble_over_is_named(tmp_path, change, problem):
    data = {"task": "lm_perplexity", "model": MODEL, "config": CONFIG, "runs": [RUN]} | change
    (tmp_path / "results.json").write_text(json.dumps(data))
    if problem is None:
        assert read_results(tmp_path)["runs"] == [RUN]
        return
    with pytest.raises(UserError, match=rf"results\.json is damaged \({problem}\); delete it"):
        read_results(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"folder=.*file/out. cannot be written: Not a directory; choose another"):
        open_results(tmp_path / "file" / "out")
    open_results(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's example, "abc"
    assert file_sha256(tmp_path / "a", tmp_path / "b") == expected


@pytest.mark.parametrize("name", ["accuracy-sst2.png", "layers-paper-sst2-4shot.png"])
def test_a_picture_of_others_is_refused_before_anything_is_measured(tmp_path, name):
    config = CONFIG | {"datasets": {"sst2": {}}}
    (tmp_path / "accuracy-mine.png").write_bytes(b"\x89PNG of another data set")
    open_results(tmp_path, config=config)
    (tmp_path / name).write_bytes(b"\x89PNG of somebody")
    with pytest.raises(UserError, match=rf"{name} is there and was not written by fairseq-eval"):
        open_results(tmp_path, config=config)
    open_results(tmp_path, config=config, force=True)
    (tmp_path / name).write_bytes(b"\x89PNG tEXt momentum_lm")
    open_results(tmp_path, config=config)
