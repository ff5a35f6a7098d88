"""Which examples are shown and evaluated: the authors' draw, balance, orders, and the same in every process."""

import itertools
from collections import Counter

import pytest

from momentum_lm.data.classification import Example
from momentum_lm.errors import UserError
from momentum_lm.icl.demonstrations import evaluation_subset, select


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
    extra = {Counter(example.gold for example in select(TRAIN, 4, seed, "balanced", 3)).most_common(1)[0][0] for seed in range(20)}
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


def test_a_label_without_an_example():
    with pytest.raises(UserError, match=r"--sampling balanced: .* no example of 1 of 4 labels \(number 3, counted from 0\)"):
        select(TRAIN, 8, 1, "balanced", 4)
    assert len(select(TRAIN, 8, 1, "random", 4)) == 8


def test_fewer_shots_than_labels_are_warned_of(caplog):
    assert len({example.gold for example in select(TRAIN, 2, 1, "balanced", 3)}) == 2
    assert [record.getMessage() for record in caplog.records] == ["2 shots for 3 labels: 1 of them have no demonstration"]
    caplog.clear()
    select(TRAIN, 3, 1, "balanced", 3)
    assert not caplog.records


def test_what_cannot_be_drawn():
    with pytest.raises(UserError, match=r"88 shots \(--shots\): the training split has no more than 87 examples"):
        select(TRAIN, 88, 1)
    with pytest.raises(UserError, match=r"seed -1 \(--seeds\): must not be negative"):
        select(TRAIN, 1, -1)


def test_the_draws_are_the_same_in_every_process_and_version():
    """Recorded with NumPy 2.4 on Python 3.11: a change here changes every published number."""
    drawn = [indices(select(TRAIN, 5, 1, sampling, order=order)) for sampling in ("random", "balanced") for order in (0, 2)]
    assert drawn == [[43, 48, 62, 20, 86], [86, 48, 43, 20, 62], [86, 62, 84, 52, 43], [43, 62, 86, 52, 84]]
