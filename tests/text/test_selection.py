"""Duplicates, splits and samples are decided by content and seed, whatever the order."""

import random
from fractions import Fraction

import pytest

from momentum_lm.errors import UserError
from momentum_lm.text.selection import SPLITS, Sample, SplitSurvey, digest_of, share

DOCUMENTS = [f"document {i}".encode() for i in range(5000)]


def digests(documents=DOCUMENTS, seed=1):
    return [digest_of(document, seed) for document in documents]


def shuffled(items, seed=0):
    return random.Random(seed).sample(items, len(items))


def splits(valid, test, documents=DOCUMENTS, seed=1, order=None):
    survey = SplitSurvey(share(valid, "--valid"), share(test, "--test"))
    for digest in order or digests(documents, seed):
        survey.add(digest)
    splitter = survey.splitter()
    return [SPLITS[splitter.split(digest)] for digest in digests(documents, seed)]


def test_fractions_are_kept_to():
    found = splits("0.1", "0.05")
    assert abs(found.count("valid") / 5000 - 0.1) < 0.015
    assert abs(found.count("test") / 5000 - 0.05) < 0.015


@pytest.mark.parametrize(
    "valid, test", [("100", "50"), ("100", "0"), ("0", "7"), ("1", "1"), ("5000", "0"), ("10000", "3")]
)
def test_numbers_are_kept_to(valid, test):
    found = splits(valid, test)
    assert found.count("test") == int(test)
    assert found.count("valid") == min(int(valid), 5000 - int(test))


@pytest.mark.parametrize("valid, test", [("100", "0.05"), ("0.05", "100")])
def test_a_number_beside_a_fraction(valid, test):
    found = splits(valid, test)
    count, part = ("valid", "test") if valid == "100" else ("test", "valid")
    assert found.count(count) == 100
    assert abs(found.count(part) / 5000 - 0.05) < 0.015


@pytest.mark.parametrize("valid, test", [("0.1", "0.1"), ("100", "50"), ("0.02", "30")])
def test_order_and_repetition_change_no_split(valid, test):
    repeated = shuffled([*digests(), *digests()[:700]])
    assert splits(valid, test, order=repeated) == splits(valid, test)


def test_more_documents_move_none_between_splits_of_fractions():
    assert splits("0.1", "0.1", [*DOCUMENTS, b"new"])[:5000] == splits("0.1", "0.1")


def test_the_seed_moves_them():
    assert splits("0.1", "0.1", seed=2) != splits("0.1", "0.1")


@pytest.mark.parametrize(
    "text, value", [("0.01", Fraction(1, 100)), (".5", Fraction(1, 2)), ("0", 0), ("0.0", 0), ("1", 1), ("500", 500)]
)
def test_shares(text, value):
    assert share(text, "--valid") == value
    assert type(share(text, "--valid")) is type(value)


@pytest.mark.parametrize("text", ["1.5", "1.0", "-1", "-0.1", "5%", "nan", "", "1e-3", "half"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(UserError, match=r"test=.*give a fraction of the documents below 1, such as 0\.01, or a number"):
        share(text, "--test")


def test_fractions_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"valid=0\.6 and test=0\.4 together leave nothing to train on"):
        splits("0.6", "0.4")


def test_sample_is_the_same_in_any_order():
    def sample(order):
        taken = Sample(1000)
        for document in order:
            taken.add(digest_of(document, 1), document)
        return list(taken.documents())

    first = sample(DOCUMENTS)
    assert sample(shuffled(DOCUMENTS)) == sample(shuffled(DOCUMENTS + DOCUMENTS, 1)) == first
    assert 1000 <= sum(map(len, first)) < 1000 + max(map(len, DOCUMENTS))
    assert len(set(first)) == len(first)
    numbers = [int(document.split()[1]) for document in first]
    assert 1000 < sum(numbers) / len(numbers) < 4000  # from everywhere, not from one end


def test_sample_of_less_than_its_limit_is_everything():
    taken = Sample(10**6)
    for document in DOCUMENTS[:50]:
        taken.add(digest_of(document, 1), document)
    assert sorted(taken.documents()) == sorted(DOCUMENTS[:50])
