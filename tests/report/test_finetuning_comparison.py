"""Summaries of several folders beside each other."""

import re

import pytest

from momentum_lm.errors import UserError
from momentum_lm.report import finetuning_verdicts as v
from momentum_lm.report.finetuning_comparison import FinetuningComparison
from momentum_lm.studies import finetuning_summary as f


def test_side_by_side(write_analysis, analysed, tmp_path):
    ours = [analysed(seed=s) for s in (1, 2)] + [analysed("trec")]
    theirs = [analysed(seed=s, depth=4) for s in (1, 2)]
    a, b = write_analysis(ours, "small"), write_analysis(theirs, "large")
    comparison = FinetuningComparison([a, b])
    table = comparison.table()
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(row["dataset"], row["results"], row["seeds"]) for row in rows] == [("sst2", "small", "2"), ("sst2",
    "large", "2"),
                                                                                ("trec", "small", "1")]  # fmt: skip
    for row, runs in zip(rows, (ours[:2], theirs, ours[2:]), strict=True):
        for name in f.EVIDENCE:
            assert row[f.METRICS[name]] == v.number(f.metric(runs, name))
        assert row["SimAOU, authors' form"] == v.number(f.metric(runs, "simaou", "paper"))
        assert row["in context"] == v.number(f.accuracy(runs, "in_context"), percent=True)
        assert row["Rec2FTP"] == v.number(f.rec2ftp(runs), percent=True)
    assert comparison.notes == ["trec, 4 shots: not in large."]
    (told,) = comparison.conclusions()
    assert told.startswith("sst2, 4 shots, large minus small (2 draws): ")
    page = tmp_path / "compare.html"
    comparison.write_page(page)
    text = page.read_text()
    assert text.count('class="forest"') == 2 * len(f.EVIDENCE)
    assert text.count("<svg role") == 2 * len(f.EVIDENCE) and "models/small" in text and "not in large" in text
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:text/csv)", text)


def test_other_seeds_are_noted(write_analysis, analysed):
    folders = [write_analysis([analysed(seed=seed)], f"seed{seed}") for seed in (1, 2)]
    comparison = FinetuningComparison(folders, names=["one", "two"])
    assert comparison.notes == ["sst2, 4 shots: not all of the same seeds and numbers of examples."]
    assert [row[2] for row in comparison.table().rows] == ["one", "two"]


def test_other_tasks_and_the_same_folder_twice_are_refused(write_analysis, write_results, analysed):
    analysis, classification = write_analysis([analysed()]), write_results(datasets=("mr",), shots=(0,))
    with pytest.raises(UserError, match="holds results of icl_classification, and not of icl_finetune_analysis"):
        FinetuningComparison([analysis, classification])
    with pytest.raises(UserError, match="named twice"):
        FinetuningComparison([analysis, analysis])


def test_differences_are_paired_by_seed_where_the_demonstrations_are_the_same(write_analysis, analysed):
    ours = [analysed(seed=s) for s in (1, 2, 3)]
    theirs = [analysed(seed=s, depth=4) for s in (1, 2, 4)]
    comparison = FinetuningComparison([write_analysis(ours, "small"), write_analysis(theirs, "large")])
    table = comparison.differences()
    (row,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (row["difference"], row["seeds"]) == ("large minus small", "2")
    gaps = [
        f.over_layers(b, "kendall") - f.over_layers(a, "kendall") for a, b in zip(ours[:2], theirs[:2], strict=True)
    ]
    assert row["Kendall, tokens"] == v.signed(f.estimate(gaps))
    gaps = [b["accuracy"]["finetuned"] - a["accuracy"]["finetuned"] for a, b in zip(ours[:2], theirs[:2], strict=True)]
    assert row["finetuned"] == v.signed(f.estimate(gaps), percent=True)

    other = [{**run, "demonstrations": [7, 8, 9, 10]} for run in theirs]
    assert FinetuningComparison([write_analysis(ours, "first"), write_analysis(other, "second")]).differences() is None
