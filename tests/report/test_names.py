"""Names are text, whatever is in them: figures, pages, tables and files' names take them as they are."""

import json

import pytest

from momentum_lm.report import classification, icl_vs_finetuning, perplexity
from momentum_lm.report.classification_comparison import ClassificationComparison
from momentum_lm.report.figures import shown
from momentum_lm.report.tables import Table

NAMES = [
    "a$\\frac$b",
    "$x^$",
    "$5 to $10",
    "_hidden",
    "^_{",
    "\\",
    "日本語",
    "x" * 300,
    "../../up",
    "a/b",
    "<script>\x1b[31m",
    "100%",
]


def rename(folder, name, labels=None):
    """The folder of ``write_results`` with another name for its one data set."""
    results = json.loads((folder / "results.json").read_text())
    about = next(iter(results["config"]["datasets"].values()))
    results["config"]["datasets"] = {name: about | ({"labels": labels} if labels else {})}
    for run in results["runs"]:
        run["dataset"] = name
    results["model"]["path"] = name
    (folder / "results.json").write_text(json.dumps(results))
    lines = [json.loads(line) | {"dataset": name} for line in (folder / "predictions.jsonl").read_text().splitlines()]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_names_of_data_sets_models_and_labels(write_results, name, recwarn):
    folder = rename(
        write_results(datasets=("mr",), shots=(0, 4), seeds=(1, 2), calibrations=("none",)), name, [name, f"{name}2"]
    )
    before = sorted(path.name for path in folder.parent.iterdir())
    classification.write_report(folder)
    assert len(list(folder.glob("accuracy-*.png"))) == len(list(folder.glob("confusion-*.png"))) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    page = (folder / "report.html").read_text()
    assert "<script>" not in page
    assert not [w for w in recwarn if "mathtext" in str(w.message) or "layout" in str(w.message)]


def test_dollars_are_drawn_as_they_are(write_results):
    folder = rename(
        write_results(datasets=("mr",), shots=(0,), seeds=(1,), calibrations=("none",)), "$5 to $10", ["$5", "$10"]
    )
    classification.write_report(folder)
    page = (folder / "report.html").read_text()
    assert ">$5 to $10</text>" in page and ">$10</text>" in page


@pytest.mark.parametrize("name", ["a$\\frac$b", "_hidden", "x" * 200])
def test_folders_are_named_in_a_comparison(write_results, tmp_path, name):
    a, b = (write_results(n, datasets=("mr",), shots=(0, 4), calibrations=("none",)) for n in (name, "other"))
    ClassificationComparison([a, b]).write_page(tmp_path / "x.html")
    assert f"{shown(name)}</text>" in (tmp_path / "x.html").read_text()  # in the legend, a name that begins with _ too


def test_names_in_the_analysis(analysed, write_analysis):
    run = analysed(dataset="../a$\\frac$b", depth=2, heads=2, controls=())
    keep = {"simaou", "simaou_random", "simaou_ci95"}
    run |= {part: {name: run[part][name] for name in run[part].keys() & keep} for part in ("paper", "corrected")}
    folder = write_analysis([run | {"heads": {}}])
    before = sorted(path.name for path in folder.parent.iterdir())
    icl_vs_finetuning.write_report(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    assert len(list(folder.glob("overlap-*.png"))) == len(list(folder.glob("layers-*shot.png"))) - 1 == 1


@pytest.mark.parametrize("name", ["a$\\frac$b", "../x", "x" * 300])
def test_names_of_splits(tmp_path, name):
    run = {"split": name, "context_length": 8, "perplexity": 9.0, "ci95": None, "bits_per_byte": None, "num_tokens": 10,
           "num_documents": 1, "data_sha256": "0", "documents": "documents/valid-8.npz"}  # fmt: skip
    results = {"task": "lm_perplexity", "model": {"path": name}, "config": {}, "runs": [run]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    perplexity.write_report(tmp_path)
    assert len(list(tmp_path.glob("perplexity-*.png"))) == 1


def test_a_terminal_gets_no_control_characters():
    table = Table(["a\x1b[31m"], [["b\x07\n"]])
    assert not {"\x1b", "\x07"} & set(table.text() + table.markdown()) and table.text().count("\n") == 2


def test_long_names_are_cut_and_short_ones_are_not():
    assert shown("mr") == "mr" and len(shown("x" * 100)) == 60 and shown("x" * 100).endswith("…")
    assert shown("_x").endswith("_x") and not shown("_x").startswith("_") and "\x1b" not in shown("\x1b[1m")
