"""Which examples are shown and evaluated: the authors' draw, balance, orders, and the same in every process."""

import itertools
from collections import Counter

import pytest

from momentum_lm.errors import UserError
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.icl.demonstrations import evaluation_subset, identity, select, separate


def examples(golds):
    return [Example(i, (f"text {i}",), (" a", " b", " c"), gold) for i, gold in enumerate(golds)]


def indices(drawn):
    return [example.index for example in drawn]


TRAIN = examples([0] * 50 + [1] * 30 + [2] * 7)


def test_the_draw_is_that_of_the_authors():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"index": list(range(len(TRAIN)))})
    for seed in (1, 5, 42):
        assert indices(select(TRAIN, 32, seed)) == data.shuffle(seed=seed)["index"][:32]


def test_the_evaluated_examples_are_those_of_the_authors():
    datasets = pytest.importorskip("datasets")
    rows = list(range(2500))
    shuffled = datasets.Dataset.from_dict({"index": rows}).shuffle(seed=1)["index"][:]
    assert evaluation_subset(rows, None, protocol_paper=True) == shuffled[:2000]
    assert evaluation_subset(rows, 9, protocol_paper=True) == shuffled[:9]
    assert sorted(evaluation_subset(rows[:872], None, protocol_paper=True)) == rows[:872]


def test_a_limited_evaluation_is_a_sample_in_file_order():
    rows = list(range(1000))
    assert evaluation_subset(rows, None) == rows == evaluation_subset(rows, 5000)
    sample = evaluation_subset(rows, 100)
    assert len(set(sample)) == 100 and sample == sorted(sample) and sample == evaluation_subset(rows, 100)
    assert 400 < sum(sample) / 100 < 600  # neither the head nor the tail
    assert set(sample) <= set(evaluation_subset(rows, 200)) and sample != evaluation_subset(rows, 100, seed=2)


@pytest.mark.parametrize("shots", [3, 4, 8, 12, 21])
def test_balanced_labels_differ_by_one_at_most(shots):
    for seed in range(5):
        drawn = select(TRAIN, shots, seed, "balanced", 3)
        counts = Counter(example.gold for example in drawn)
        assert len(set(indices(drawn))) == shots == len(drawn)
        assert set(counts) == {0, 1, 2} and max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_chooses_who_has_one_more_and_the_order():
    extra = {
        Counter(example.gold for example in select(TRAIN, 4, seed, "balanced", 3)).most_common(1)[0][0]
        for seed in range(20)
    }
    orders = {tuple(example.gold for example in select(TRAIN, 6, seed, "balanced", 3)) for seed in range(20)}
    assert extra == {0, 1, 2}
    assert len(orders) > 10  # shuffled, not one label after the other


def test_a_label_that_runs_out_is_filled_up_with_others():
    counts = Counter(example.gold for example in select(TRAIN, 60, 1, "balanced", 3))
    assert counts[2] == 7 and sorted(counts.values()) == [7, 26, 27]
    assert len(select(TRAIN, 87, 1, "balanced", 3)) == 87


@pytest.mark.parametrize("sampling", ["random", "balanced"])
def test_more_shots_keep_the_fewer(sampling):
    drawn = [set(indices(select(TRAIN, shots, 3, sampling))) for shots in (2, 4, 16, 32)]
    assert all(few < more for few, more in itertools.pairwise(drawn))


def test_orders_permute_the_same_demonstrations():
    for sampling in ("random", "balanced"):
        drawn = [indices(select(TRAIN, 8, 2, sampling, order=order)) for order in range(4)]
        assert len({tuple(order) for order in drawn}) == 4 and len({frozenset(order) for order in drawn}) == 1
        assert drawn[3] == indices(select(TRAIN, 8, 2, sampling, order=3))


def test_no_shots():
    assert select(TRAIN, 0, 1, "balanced", 3) == select([], 0, 1) == []


def test_a_label_without_an_example_is_named():
    train = [Example(e.index, e.inputs, (" a", " b", " c", " Neutral"), e.gold) for e in TRAIN]
    with pytest.raises(
        UserError, match=r"sampling='balanced': .* no example of 1 of 4 labels \(Neutral\); use sampling='random'"
    ):
        select(train, 8, 1, "balanced", 4)
    assert len(select(TRAIN, 8, 1, "random", 4)) == 8


def test_fewer_shots_than_labels_are_warned_of(caplog):
    assert len({example.gold for example in select(TRAIN, 2, 1, "balanced", 3)}) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "2 shots for 3 labels: 1 of them have no demonstration"
    ]
    caplog.clear()
    select(TRAIN, 3, 1, "balanced", 3)
    assert not caplog.records


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match=r"shots=88: the training split has no more than 87 examples"):
        select(TRAIN, 88, 1)
    with pytest.raises(UserError, match=r"seed=-1: must not be negative"):
        select(TRAIN, 1, -1)


def test_the_draws_are_the_same_in_every_process_and_version():
    """Recorded with NumPy 2.4 on Python 3.11: a change here changes every published number."""
    drawn = [
        indices(select(TRAIN, 5, 1, sampling, order=order)) for sampling in ("random", "balanced") for order in (0, 2)
    ]
    assert drawn == [[43, 48, 62, 20, 86], [86, 48, 43, 20, 62], [86, 62, 84, 52, 43], [43, 62, 86, 52, 84]]


# Examples that are in both splits


def texts(*names, label=lambda i: i % 2):
    return [Example(i, (f"Review: {name}",), (" Bad", " Good"), label(i)) for i, name in enumerate(names)]


def test_what_is_evaluated_is_not_shown():
    train = texts(*(f"film {i}" for i in range(20)))
    evaluated = texts("film 3", "film 25", "film 4", "film 4", "film 26")
    found = separate(train, evaluated, 6)
    assert found.evaluated == evaluated and found.hidden == {3, 4}
    assert found.counts() == {"not_shown": 2, "not_evaluated": 0, "shown_and_evaluated": 0}
    assert list(found.notes()) == [
        "2 training examples are evaluated too (the same text) and are not shown as demonstrations"
    ]
    for seed in range(30):
        drawn, free = (indices(select(train, 6, seed, hidden=hidden)) for hidden in (found.hidden, ()))
        assert not {3, 4} & set(drawn)
        assert drawn[: len([i for i in free if i not in (3, 4)])] == [
            i for i in free if i not in (3, 4)
        ]  # the other draws stay
    assert not list(separate(train, texts("film 25"), 6).notes())


@pytest.mark.parametrize("sampling", ["random", "balanced"])
@pytest.mark.parametrize("count", [2, 8, 9, 100, 3000])
def test_one_file_for_both_splits(count, sampling):
    """Half of it, or enough, is shown and the rest evaluated, whatever the seed and the shots; of each label about as
    many."""
    rows = texts(*(f"film {i}" for i in range(count)))
    found = separate(rows, rows, 1)
    may_be_shown = [example for i, example in enumerate(rows) if i not in found.hidden]
    assert {identity(e) for e in may_be_shown} | {identity(e) for e in found.evaluated} == {identity(e) for e in rows}
    assert len(may_be_shown) + len(found.evaluated) == count and len(may_be_shown) == min((count + 1) // 2, 512)
    assert found.left_out == len(may_be_shown) and found.evaluated == sorted(found.evaluated, key=lambda e: e.index)
    if count > 2:
        balance = Counter(example.gold for example in may_be_shown)
        assert abs(balance[0] - balance[1]) <= 1
        for seed in range(5):
            drawn = select(rows, 4, seed, sampling, 2, hidden=found.hidden)
            assert len({e.index for e in drawn}) == 4 and not {e.index for e in drawn} & {
                e.index for e in found.evaluated
            }
    assert separate(rows[::-1], rows, 1).evaluated == found.evaluated  # by the texts, not by their places


def test_copies_within_one_file_stay_on_one_side():
    rows = texts(*(f"film {i % 4}" for i in range(16)), label=lambda i: i % 4 % 2)
    found = separate(rows, rows, 2)
    drawn = {e.inputs for i, e in enumerate(rows) if i not in found.hidden}
    assert len(drawn) == 2 and not drawn & {e.inputs for e in found.evaluated} and len(found.evaluated) == 8


def test_a_limit_leaves_the_rest_to_be_shown():
    rows = texts(*(f"film {i}" for i in range(100)))
    found = separate(rows, evaluation_subset(rows, 30), 16)
    assert len(found.evaluated) == 30 == len(found.hidden) and not found.left_out


def test_other_choices_make_another_example():
    train = [Example(0, ("Open a jar",), (" twist", " sing"), 0), Example(1, ("Open a jar",), (" twist", " wait"), 0)]
    assert separate(train, train[1:], 1).hidden == {1}


def test_the_authors_protocol_counts_only():
    rows = texts(*(f"film {i}" for i in range(10)))
    found = separate(rows, rows[:3], 4, protocol_paper=True)
    assert found.evaluated == rows[:3] and not found.hidden and found.counts()["shown_and_evaluated"] == 3
    assert list(found.notes()) == [
        "3 training examples are evaluated too (the same text) and may be demonstrations, as in the authors' code"
    ]


def test_most_of_the_training_split_is_evaluated():
    """A tenth of it is enough to draw from, if there are as many as shots: then all is evaluated. Else some is not."""
    rows = texts(*(f"film {i}" for i in range(40)))
    evaluated = rows[:34]
    assert not separate(rows, evaluated, 6).left_out
    for shots in (7, 16, 30):
        found = separate(rows, evaluated, shots)
        assert len(rows) - len(found.hidden) == max(shots, 20) and found.left_out == max(shots, 20) - 6
    assert separate(rows, rows[:37], 2).left_out == 20 - 3


def test_a_label_that_is_evaluated_only_is_shown_once():
    rows = texts(*(f"film {i}" for i in range(40)), label=lambda i: int(i < 3))
    found = separate(rows, rows[:5], 4)
    assert found.left_out == 1 and len(found.hidden) == 4
    assert [example.gold for example in found.evaluated] == [1, 1, 0, 0]


def test_without_shots_nothing_is_separated():
    rows = texts(*(f"film {i}" for i in range(10)))
    for shots in (0, 11):  # the latter are refused when they are drawn
        assert separate(rows, rows, shots).evaluated == rows and not any(separate(rows, rows, shots).counts().values())


def test_nothing_left_to_evaluate_or_to_show():
    rows = texts(*(f"film {i}" for i in range(10)))
    assert len(separate(rows, rows, 9).evaluated) == 1
    for same, shots in ((texts("film", "film", "film"), 1), (rows, 10)):
        with pytest.raises(UserError, match=rf"has every evaluated example, and shots={shots} leaves none"):
            separate(same, same, shots)
    hidden = separate(rows, rows, 2).hidden
    with pytest.raises(UserError, match=r"shots=6: .* no more than 5 examples that are not evaluated too"):
        select(rows, 6, 1, hidden=hidden)
    with pytest.raises(UserError, match=r"no example that is not evaluated too of 1 of 2 labels \(Good\)"):
        select(rows, 2, 1, "balanced", 2, hidden={1, 3, 5, 7, 9})
