"""Side by side: against the same numbers by hand, and refusals."""

import json
import re

import numpy as np
import pytest

from momentum_lm.analysis.classification import compare_accuracy, mcnemar
from momentum_lm.errors import UserError
from momentum_lm.report.classification_comparison import ClassificationComparison, parse_between
from momentum_lm.results.predictions import read_answers
from momentum_lm.results.records import read_results


@pytest.fixture
def better(answer):
    """As ``answer``, and every fourth example right."""

    def better(gold, *draw):
        predicted = answer(gold, *draw)
        predicted[::4] = gold[::4]
        return predicted

    return better


def rows(comparison):
    table = comparison.table()
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_two_folders(write_results, answer, better):
    a, b = write_results("a"), write_results("b", answers=better)
    comparison = ClassificationComparison([a, b])
    table = rows(comparison)
    assert len(table) == 2 * 3 * 2 * 2 and comparison.notes == []
    assert [row["results"] for row in table[:4]] == ["a", "b", "a", "b"]
    assert table[0]["vs a"] == table[0]["p over examples"] == ""
    gold = np.random.default_rng(2).integers(0, 2, 60)  # of mr
    right = [[f(gold, s, 16, 0, "none") == gold for s in (1, 2, 3)] for f in (better, answer)]
    expected = compare_accuracy(*right, [1, 2, 3])
    difference = comparison.differences[("mr", 16, "none"), 1]
    assert difference == expected and difference.over_seeds.size == 3 and difference.over_examples.size == 60
    (row,) = (
        r for r in table if (r["dataset"], r["shots"], r["calibration"], r["results"]) == ("mr", "16", "none", "b")
    )
    assert row["vs a"] == f"{100 * expected.difference:+.1f}"
    assert row["95% over seeds"] == f"{100 * expected.over_seeds.low:+.1f} to {100 * expected.over_seeds.high:+.1f}"
    zero = comparison.differences[("mr", 0, "none"), 1]  # seeds do not repeat what has no demonstrations
    assert zero.over_seeds is None and len(zero.tests) == 1 and zero.p_value == zero.tests[0].p_value


def test_between_calibrations(write_results, answer):
    comparison = ClassificationComparison([write_results()], between=("calibration", ["none", "batch"]))
    table = rows(comparison)
    assert "shots" in table[0] and [row["calibration"] for row in table[:2]] == ["none", "batch"]
    gold = np.random.default_rng(2).integers(0, 2, 60)
    batch, none = ([answer(gold, s, 4, 0, name) == gold for s in (1, 2, 3)] for name in ("batch", "none"))
    assert comparison.differences[("mr", 4), 1] == compare_accuracy(batch, none, [1, 2, 3])


def test_between_shots_pairs_every_draw_with_the_only_one_without(write_results, answer):
    comparison = ClassificationComparison([write_results(orders=2)], between=("shots", [0, 4, 16]))
    assert len(comparison.pairs[("mr", "none"), 1]) == 6
    difference = comparison.differences[("mr", "none"), 2]
    gold = np.random.default_rng(2).integers(0, 2, 60)
    draws = [(s, o) for s in (1, 2, 3) for o in (0, 1)]
    sixteen = [answer(gold, s, 16, o, "none") == gold for s, o in draws]
    zero = [answer(gold, 1, 0, 0, "none") == gold] * 6
    assert difference == compare_accuracy(sixteen, zero, [s for s, _ in draws])
    assert difference.tests[0] == mcnemar(sixteen[0], zero[0])
    backwards = ClassificationComparison([write_results("other", orders=2)], between=("shots", [16, 0]))
    assert backwards.differences[("mr", "none"), 1].difference == pytest.approx(-difference.difference)


def test_what_is_not_in_both_is_said(write_results):
    a, b = (
        write_results("a", seeds=(1, 2, 3)),
        write_results("b", seeds=(2, 3), datasets=("mr",), shots=(4,), calibrations=("none",)),
    )
    comparison = ClassificationComparison([a, b])
    assert list(comparison.differences) == [(("mr", 4, "none"), 1)]
    assert len(comparison.pairs[("mr", 4, "none"), 1]) == 2
    assert comparison.notes == ["mr, 4 shots, none: 1 runs of a or b have no counterpart and are not compared."]
    with pytest.raises(UserError, match="a and c have no dataset, shots, calibration, seed and order in common"):
        ClassificationComparison([a, write_results("c", datasets=("piqa",))])


def test_other_demonstrations_are_said(write_results):
    a, b = (
        write_results("a", datasets=("mr",), shots=(16,)),
        write_results("b", datasets=("mr",), shots=(16,), fitted=10),
    )
    notes = ClassificationComparison([a, b]).notes
    assert notes[0] == "mr, 16 shots, none: a and b saw other demonstrations in 3 of 3 pairs."


def test_other_examples_are_refused(write_results):
    a = write_results("a", datasets=("mr",))
    with pytest.raises(UserError, match=r"mr: a evaluated 60 examples and b 50, and example 50 is only in a; .*limit"):
        ClassificationComparison([a, write_results("b", datasets=("mr",), examples=50)])
    gold = np.random.default_rng(2).integers(0, 2, 60)
    gold[17] = 1 - gold[17]
    with pytest.raises(
        UserError, match=r"mr: the gold labels of 1 examples differ, first that of example 17 \(\d in a, \d in c\)"
    ):
        ClassificationComparison([a, write_results("c", datasets=("mr",), gold=gold)])


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (("calibration", ["none", "contextual"]), "has no runs with contextual, only with none, batch"),
        (("shots", [0, 8]), "has no runs with 8, only with 0, 4, 16"),
        (("shots", [4]), "two or more different values"),
        (("shots", [4, 4]), "two or more different values"),
        (("seed", [1, 2]), "choose one of shots or calibration"),
    ],
)
def test_settings_that_are_not_there(write_results, between, message):
    with pytest.raises(UserError, match=message):
        ClassificationComparison([write_results()], between=between)


def test_between_needs_one_folder(write_results):
    with pytest.raises(UserError, match="within one results folder"):
        ClassificationComparison([write_results("a"), write_results("b")], between=("shots", [0, 4]))


def test_parse_between():
    assert parse_between("calibration=none,batch") == ("calibration", ["none", "batch"])
    assert parse_between("shots=0,16") == ("shots", [0, 16])
    for text in ("calibration", "seed=1,2", "shots=", "shots=0,,4", "=1"):
        with pytest.raises(UserError, match=r"say for example calibration=none,batch or shots=4,16"):
            parse_between(text)
    with pytest.raises(UserError, match="whole numbers"):
        parse_between("shots=0,x")


def test_page(write_results, better, tmp_path):
    a, b = write_results("a"), write_results("b", answers=better, score="sum")
    ClassificationComparison([a, b], names=["plain", "momentum <1>"]).write_page(tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg role") == 4 and "momentum &lt;1&gt;" in page and "momentum <1>" not in page
    assert "score: &#34;sum&#34;" in page and "sampling" not in page  # only what differs
    assert "McNemar p" in page and "cluster bootstrap" in page
    assert page.index('class="verdict"') < page.index("momentum &lt;1&gt; against plain:") < page.index("<table")
    ClassificationComparison([a], between=("shots", [0, 4])).write_page(tmp_path / "shots.html")
    assert "<svg role" not in (tmp_path / "shots.html").read_text()


def test_one_folder_gives_its_own_table(write_results):
    assert "beats it?" in ClassificationComparison([write_results()]).table().columns


def test_answers_are_read_in_the_order_of_examples(write_results):
    folder = write_results(datasets=("mr",), shots=(4,), seeds=(1,), calibrations=("none",))
    (run,) = read_results(folder)["runs"]
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    ((key, expected),) = read_answers(folder, [run]).items()
    assert key == ("mr", 1, 4, 0, "none") and expected.index.tolist() == list(range(60))
    assert expected.right.mean() == run["accuracy"]
    other = json.dumps(
        {"dataset": "trec", "seed": 1, "shots": 4, "order": 0, "calibration": "none", "index": 0, "gold": 0, "pred": 0}
    )
    (folder / "predictions.jsonl").write_text("".join([other + "\n", *reversed(lines), other[:30]]))  # being written to
    (again,) = read_answers(folder, [run]).values()
    np.testing.assert_array_equal(again.predicted, expected.predicted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda lines: lines[:-1],
            r"answers 59 examples in 59 lines for dataset mr, seed 1, shots 4, order 0, calibration none, but 60 were",
        ),
        (lambda lines: [*lines[:-1], lines[0]], "answers 59 examples in 60 lines"),
        (lambda lines: [*lines[:3], "{\n", *lines[3:]], "line 4 is damaged"),
        (lambda lines: [*lines[:3], '{"dataset": "mr"}\n', *lines[3:]], "line 4 is damaged"),
        (lambda lines: None, "cannot read .*predictions.jsonl"),
        (
            lambda lines: [re.sub(r'"pred": \d+', '"pred": 7', line) for line in lines],
            r"is damaged: for dataset mr, .* 0 of 60 answers are right, \d+ by results.json",
        ),
    ],
)
def test_damaged_predictions_are_named(write_results, spoil, message):
    folder = write_results(datasets=("mr",), shots=(4,), seeds=(1,), calibrations=("none",))
    path = folder / "predictions.jsonl"
    lines = spoil(path.read_text().splitlines(keepends=True))
    path.unlink()
    if lines is not None:
        path.write_text("".join(lines))
    with pytest.raises(UserError, match=message):
        read_answers(folder, read_results(folder)["runs"])


def test_a_verdict_looks_at_every_interval(write_results, answer):
    def other(gold, seed, shots, order, calibration):
        """Right about three more examples in every draw: draws agree, and examples leave doubt."""
        predicted = answer(gold, seed, shots, order, calibration)
        wrong = np.flatnonzero(predicted != gold)[:3]
        predicted[wrong] = gold[wrong]
        return predicted

    settings = {"datasets": ("mr",), "shots": (4,), "calibrations": ("none",)}
    a, b = write_results("a", **settings), write_results("b", answers=other, **settings)
    comparison = ClassificationComparison([a, b])
    (gap,) = comparison.differences.values()
    (sentence,) = comparison.conclusions()
    assert gap.over_seeds.high - gap.over_seeds.low < 1e-9 and "over draws" not in sentence
    ends = gap.over_examples
    clear = ends.low > 0 or ends.high < 0
    assert sentence.startswith("mr, 4 shots, none: b against a +5.0 points (95%: ") and ("chance" in sentence) == (
        not clear
    )


def test_sides_of_one_folder_are_named_with_their_noun(write_results, tmp_path):
    comparison = ClassificationComparison([write_results("a", datasets=("mr",))], between=("shots", [0, 4]))
    assert all("4 shots against 0 shots" in sentence for sentence in comparison.conclusions())


def test_a_side_that_shares_nothing_is_said(write_results, tmp_path):
    settings = {"datasets": ("mr",), "calibrations": ("none",)}
    folders = [write_results(n, shots=s, **settings) for n, s in (("a", (4,)), ("b", (4,)), ("c", (16,)))]
    comparison = ClassificationComparison(folders)
    assert "c shares no setting with a and is not compared." in comparison.notes
    comparison.write_page(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text().count('class="forest"') == 1
