"""``fairseq-eval --task icl_classification`` as a user starts it: a data set of one's own, and what is told of bad
input.
"""

import json
import random
import shutil
import time

import pytest

from momentum_lm.cli.evaluate import main
from momentum_lm.icl.datasets.definitions import FOLDER

FILMS = """\
description: made-up reviews
files: {train: train.jsonl, evaluation: validation.jsonl}
label: label
labels: [Negative, Positive]
templates:
  paper: "Review: {text} Sentiment:"
"""
WORDS = ["good", "bad", "dull", "long", "thin", "film", "plot", "actors", "very", "the"]
# Without a network, and without anything in a cache, wherever the tests run; port 9 discards.
OFFLINE = {
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "0",
    "https_proxy": "",
    "http_proxy": "",
    "all_proxy": "",
}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with a new data set: one YAML file and its rows."""
    folder = tmp_path_factory.mktemp("films")
    draw = random.Random(0)
    (folder / "films.yaml").write_text(FILMS)
    for split, count in (("train", 12), ("validation", 24)):
        rows = [
            {"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 8))), "label": draw.randrange(2)}
            for _ in range(count)
        ]
        write(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def checkpoint(make_lm):
    return make_lm().path


@pytest.fixture(scope="module")
def command(checkpoint, films):
    """command(results folder, *words, **changes of flags): None leaves a flag out."""

    def make(out, *words, **changes):
        flags = {
            "path": checkpoint, "model_overrides": "{'max_target_positions': "
            "160}", "datasets": films / "films.yaml", "shots": "0,2",
            "seeds": "1,2", "batch_tokens": "500", "results_dir": out,
        }  # fmt: skip
        given = {flag: value for flag, value in {**flags, **changes}.items() if value is not None}
        pairs = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", value)]
        return ["fairseq-eval", "--task", "icl_classification", *pairs, *words]

    return make


@pytest.fixture(scope="module")
def results(command, run_cli, tmp_path_factory):
    """A finished evaluation."""
    out = tmp_path_factory.mktemp("finished") / "results"
    done = run_cli(command(out, calibration="none,contextual"))
    assert done.returncode == 0, done.stderr
    assert f"{out}/report.html" in done.stdout
    return out


def test_a_new_data_set_is_one_yaml_file(results, films):
    """Keys and values that others read."""
    content = json.loads((results / "results.json").read_text())
    assert {"task", "model", "config", "runs", "summary"} <= content.keys() and content["task"] == "icl_classification"
    keys = [(run["seed"], run["shots"], run["calibration"]) for run in content["runs"]]
    assert sorted(keys) == sorted(
        (seed, shots, name) for seed in (1, 2) for shots in (0, 2) for name in ("none", "contextual")
    )
    predictions, gold = read(results / "predictions.jsonl"), [row["label"] for row in read(films / "validation.jsonl")]
    assert len(predictions) == 8 * 24
    assert all(
        {"dataset", "seed", "shots", "setting", "index", "gold", "pred", "scores"} <= line.keys()
        for line in predictions
    )
    assert {(line["setting"], line["shots"]) for line in predictions} == {("zero_shot", 0), ("in_context", 2)}
    for run in content["runs"]:
        assert run["dataset"] == "films" and run["num_examples"] == 24
        of_run = [
            x
            for x in predictions
            if all(x[name] == run[name] for name in ("dataset", "seed", "shots", "order", "calibration"))
        ]
        assert [line["gold"] for line in of_run] == gold and [line["index"] for line in of_run] == list(range(24))
        assert run["accuracy"] == pytest.approx(sum(line["pred"] == line["gold"] for line in of_run) / 24)
        assert 0 <= run["ci95"][0] <= run["accuracy"] <= run["ci95"][1] <= 1 and 0 <= run["macro_f1"] <= 1
        assert run["majority"] == max(gold.count(0), gold.count(1)) / 24
    for shots in ("0", "2"):
        cell = content["summary"]["films"][shots]
        of_cell = [
            run["accuracy"] for run in content["runs"] if (str(run["shots"]), run["calibration"]) == (shots, "none")
        ]
        assert cell["mean"] == pytest.approx(sum(of_cell) / 2)
        assert cell["num_seeds"] == 2 and cell["ci95"][0] <= cell["mean"] <= cell["ci95"][1]
    files = {path.name for path in results.iterdir()}
    assert {"report.html", "tensorboard", "samples.json", "accuracy-films.png", "confusion-films.png"} <= files


def test_the_same_command_again_computes_nothing(results, command, run_cli, tmp_path):
    shutil.copytree(results, tmp_path / "out")
    done = run_cli(command(tmp_path / "out", calibration="none,contextual"))
    assert done.returncode == 0, done.stderr
    for name in ("results.json", "predictions.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (results / name).read_bytes()


def test_labels_that_begin_alike_and_demonstrations_that_do_not_fit_are_told(films, command, run_cli, tmp_path):
    (tmp_path / "films").mkdir()
    for path in films.iterdir():
        shutil.copy(path, tmp_path / "films")
    (tmp_path / "films" / "films.yaml").write_text(FILMS.replace("[Negative, Positive]", "[very good, very bad]"))
    small = {
        "model_overrides": "{'max_target_positions': 70}",
        "datasets": tmp_path / "films" / "films.yaml",
        "shots": "8",
        "seeds": "1",
    }
    done = run_cli(command(tmp_path / "out", **small))
    assert done.returncode == 0, done.stderr
    assert "films: the labels 'very good' and 'very bad' begin with the same token" in done.stderr
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert 0 < run["shots_fitted"] < 8
    assert (
        f"films-8shot-seed1-order0: only {run['shots_fitted']} of 8 demonstrations fit in the model's 70 tokens"
        in done.stderr
    )


def column(folder):
    (folder / "films.yaml").write_text(FILMS.replace("{text}", "{txt}"))


def label(folder):
    rows = read(folder / "validation.jsonl")
    rows[5]["label"] = 7
    write(folder / "validation.jsonl", rows)


def empty(folder):
    (folder / "validation.jsonl").write_text("")


def long(folder):
    rows = read(folder / "validation.jsonl")
    rows[3]["text"] = "film " * 200
    write(folder / "validation.jsonl", rows)


def malformed(folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-1]
    (folder / "train.jsonl").write_text("\n".join(lines))


def one_class(folder):
    write(folder / "train.jsonl", [row | {"label": 0} for row in read(folder / "train.jsonl")])


def key(folder):
    (folder / "films.yaml").write_text(FILMS + "lables: [a, b]\n")


def gone(folder):
    (folder / "train.jsonl").unlink()


def bare(folder):
    shutil.copy(folder / "model.pt", folder / "bare")


def foreign(folder):
    from momentum_lm.text.vocabulary import train_sentencepiece

    (folder / "foreign").mkdir()
    (folder / "foreign" / "sentencepiece.model").write_bytes(train_sentencepiece(WORDS * 20, 280))


def damaged(folder):
    (folder / "results" / "results.json").write_text('{"task": "icl_cl')


def in_the_way(folder):
    (folder / "file").write_text("")


LOCAL = {"datasets": "{films}/films.yaml"}
HUGGING_FACE = {"path": None, "model_overrides": None}
CASES = {  # what is done to a copy of the data, changed flags, what is told
    "unknown data set": (
        None,
        {"datasets": "mrr", "path": "{films}/not/read/yet.pt"},
        "there is no data set 'mrr'; did you mean mr?",
    ),
    "unknown column": (column, LOCAL, "{films}/train.jsonl:1: no column 'txt'; there are: text, label"),
    "unknown key in the YAML file": (key, LOCAL, "{films}/films.yaml: unknown key 'lables'; did you mean labels?"),
    "no such YAML file": (None, {"datasets": "{films}/flims.yaml"}, "{films}/flims.yaml: No such file"),
    "label outside the list": (label, LOCAL, "{films}/validation.jsonl:6: label '7' in column 'label' is none of 0, 1"),
    "empty split": (empty, LOCAL, "{films}/validation.jsonl: no examples, for it has no rows"),
    "missing split": (gone, LOCAL, "{films}/train.jsonl: no such file"),
    "prompt longer than the context": (long, LOCAL, "films: example 3 has a prompt of "),
    "malformed line": (malformed, LOCAL, "{films}/train.jsonl:3: not a JSON record"),
    "balanced without a class": (one_class, LOCAL | {"sampling": "balanced"}, "no example of 1 of 2 labels"),
    "more shots than examples": (
        None,
        {"shots": "0,13"},
        "--shots 13: the training split has no more than 12 examples",
    ),
    "hub without network": (None, {"datasets": "sst2"}, "provide DIR/sst2/train.jsonl and DIR/sst2/validation.jsonl"),
    "shots that are no number": (None, {"shots": "x"}, "--shots x: give whole numbers"),
    "negative seed": (None, {"seeds": "-1"}, "--seeds -1: give whole numbers"),
    "seed that no record holds": (
        None,
        {"seeds": f"1,{2**53 + 1}"},
        "give whole numbers from 0 to 9,007,199,254,740,992",
    ),
    "no such calibration": (None, {"calibration": "foo"}, "--calibration foo: choose from none, contextual"),
    "no examples": (None, {"limit": "0"}, "--limit 0: must be at least 1"),
    "no order": (None, {"orders": "0"}, "--orders 0: must be at least 1"),
    "no time": (None, {"process_timeout": "0"}, "--process-timeout 0: must be a positive number of seconds"),
    "fairseq's start for another model": (
        None,
        HUGGING_FACE | {"hf_model": "gpt2", "bos": "<s>"},
        "--bos <s> is for fairseq checkpoints",
    ),
    "no model": (None, {"path": None}, "one of the arguments --path --hf-model is required"),
    "two models": (None, {"hf_model": "gpt2"}, "not allowed with argument"),
    "no such checkpoint": (None, {"path": "{films}/none.pt"}, "{films}/none.pt"),
    "no tokenizer": (bare, {"path": "{films}/bare"}, "--tokenizer"),
    "tokenizer of another model": (foreign, {"tokenizer": "{films}/foreign"}, "--tokenizer"),
    "no such Hugging Face folder": (
        None,
        HUGGING_FACE | {"hf_model": "{films}/nowhere"},
        "--hf-model {films}/nowhere does not load",
    ),
    "no such Hugging Face model": (
        None,
        HUGGING_FACE | {"hf_model": "nobody/nothing"},
        "--hf-model nobody/nothing does not load",
    ),
    "unknown flag": (None, {"shot": "4"}, "--shot"),
    "results that cannot be written": (
        in_the_way,
        {"results_dir": "{films}/file/out"},
        "--results-dir {films}/file/out cannot be written",
    ),
    "results of other settings": (
        None,
        {"score": "sum", "force": None},
        "results.json holds other results (config.score: ",
    ),
    "results of another model": (
        None,
        {"model_overrides": "{{'momentum_eta': 0.2}}", "force": None},
        "(model.architecture.max_po",
    ),
    "damaged results": (damaged, {"force": None}, "results.json is damaged"),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# As processes of their own: those that ask for the hub, whose library reads variables when it is imported, and one
# more.
PROCESSES = ("hub without network", "no such Hugging Face model", "damaged results")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_changes_nothing(
    case, films, checkpoint, results, command, run_cli, capsys, tmp_path
):
    spoil, changes, message = CASES[case]
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    shutil.copytree(results, folder / "results")
    shutil.copy(checkpoint, folder / "model.pt")
    if spoil is not None:
        spoil(folder)
    changes = {flag: value and value.format(films=folder) for flag, value in changes.items()}
    force = ["--force"] if "force" not in changes else []
    changes.pop("force", None)
    before, began = contents(folder), time.monotonic()
    words = command(folder / "results", *force, **changes)
    if case in PROCESSES:
        failed = run_cli(words, env=OFFLINE | {"HF_HOME": tmp_path / "hub"})
        status, said = failed.returncode, failed.stderr
    else:
        status, said = main([str(word) for word in words[1:]]), capsys.readouterr().err
    assert status == 2, said[-2000:]
    (line,) = said.splitlines()
    assert line.startswith("error: ") and message.format(films=folder) in line, line
    assert contents(folder) == before
    assert time.monotonic() - began < 60


def test_two_data_sets_of_one_name_are_refused_before_a_model_is_read(tmp_path, capsys):
    for name, word in (("clinic", "Ill"), ("shop", "Dear"), ("Clinic", "Well")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.yaml").write_text(FILMS.replace("Negative", word))
    (tmp_path / "mr.yaml").write_text(FILMS)
    (tmp_path / "TASK.yaml").write_text(FILMS)
    for datasets, told in (
        (f"{tmp_path}/clinic/task.yaml,{tmp_path}/shop/task.yaml", f"called task: {tmp_path}/clinic/task.yaml and"),
        (f"mr,{tmp_path}/mr.yaml", f"called mr: {FOLDER}/mr.yaml and {tmp_path}/mr.yaml"),
        (f"{tmp_path}/TASK.yaml,{tmp_path}/shop/task.yaml", "called TASK and task but for their case: "),
        (f"{tmp_path}/mr.yaml,{tmp_path}/shop/../mr.yaml", "called mr: "),
    ):
        for task in ("icl_classification", "icl_finetune_analysis"):
            argv = ["--task", task, "--path", "none.pt", "--datasets", datasets, "--results-dir", str(tmp_path / "out")]
            assert main(argv) == 2
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: two data sets are ") and told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
