"""Every study is complete, and a new one is an entry."""

import argparse
import json
import sys
import types
from pathlib import Path

import pytest

from momentum_lm.cli import evaluate, report
from momentum_lm.report.skeleton import Comparison, Report
from momentum_lm.report.tables import Table
from momentum_lm.results.records import Results, read_results
from momentum_lm.results.schema import RECORDS, Config, Record
from momentum_lm.studies.registry import STUDIES, Study

WRITTEN = Path(__file__).parent.parent / "fixtures" / "results"


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_complete(study, capsys):
    assert evaluate.main(["--help"]) == 0
    assert study.text in " ".join(capsys.readouterr().out.split())
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    assert {"--results-dir", "--force", "--path"} <= parser._option_string_actions.keys()
    results = read_results(WRITTEN / study.name)
    assert study.summarise(results["runs"]) == results.get("summary")
    assert all(run.keys() >= set(RECORDS[study.name].key) for run in results["runs"])
    comparison = study.compare([WRITTEN / study.name], seed=1)
    assert isinstance(comparison, Comparison) and comparison.task == study.name
    assert comparison.tables()[0].rows and study.report.endswith(":write_report")


def test_records_are_those_of_the_studies():
    assert RECORDS.keys() == STUDIES.keys()


class Lengths(Comparison):
    """Compares the toy study below."""

    task, title = "toy", "Lengths"

    def table(self):
        runs = zip(self.names, (results["runs"][0] for results in self.results), strict=True)
        return Table.of([{"results": name, "length": str(run["length"])} for name, run in runs])

    def reading(self):
        return "Longer is longer."

    def sections(self):
        return {}


def run(args, command):
    results = Results(args.results_dir, "toy", {"path": "m"}, {"command": command}, RECORDS["toy"].key, args.force)
    results.add({"text": args.text, "length": len(args.text)})
    return True


def add_arguments(parser):
    parser.add_argument("text")
    parser.add_argument("--results-dir", required=True)
    parser.add_argument("--force", action="store_true")


def test_a_new_study_is_an_entry(tmp_path, monkeypatch, capsys):
    module = types.ModuleType("toy_study")
    module.add_arguments, module.run, module.Lengths = add_arguments, run, Lengths

    def table(runs):
        return Table.of([{"text": each["text"], "length": str(each["length"])} for each in runs])

    log = lambda log, results: {"length": results["runs"][0]["length"]}  # noqa: E731
    module.write = Report("toy", "Toy", table, lambda folder, results, save: {"": [table(results["runs"])]}, log).write
    monkeypatch.setitem(sys.modules, "toy_study", module)
    toy = Study("toy", "length of a text", "TEXT", "toy_study", "toy_study:write", "toy_study:Lengths")
    monkeypatch.setitem(STUDIES, "toy", toy)
    monkeypatch.setitem(RECORDS, "toy", Record(("text",), dict, Config))

    for name, text in (("a", "one"), ("b", "three")):
        assert evaluate.main(["--task", "toy", text, "--results-dir", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "three" in out and str(tmp_path / "b" / "report.html") in out
    page = (tmp_path / "a" / "report.html").read_text()
    assert "fairseq-eval --task toy one" in page and "Model and configuration" in page
    assert json.loads((tmp_path / "a" / "results.json").read_text())["runs"][0]["length"] == 3
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["b", "5"]
    assert "Longer is longer." in (tmp_path / "x.html").read_text()
    assert report.main([str(tmp_path / "a"), "--between", "text=one,two"]) == 2
    assert "--between is for results of icl_classification" in capsys.readouterr().err
