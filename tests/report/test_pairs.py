"""Which runs are compared with which, by the digests of what they saw, and what is said where they saw something
else."""

import json

import numpy as np
import pytest

from momentum_lm.errors import UserError
from momentum_lm.report.classification_comparison import ClassificationComparison
from momentum_lm.report.finetuning_comparison import FinetuningComparison
from momentum_lm.report.perplexity import Comparison, document_sums


def change(folder, **changes):
    results = json.loads((folder / "results.json").read_text())
    for run in results["runs"]:
        run.update({name: value for name, value in changes.items() if value is not None})
        for name in [name for name, value in changes.items() if value is None]:
            run.pop(name, None)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def two(write_results):
    return (write_results(name, datasets=("mr",), shots=(4,), seeds=(1, 2), calibrations=("none",)) for name in "ab")


def test_other_words_about_the_same_examples_are_said(write_results):
    a, b = two(write_results)
    assert ClassificationComparison([a, b]).notes == []
    change(b, examples_sha256="other")
    (note,) = ClassificationComparison([a, b]).notes
    assert note.startswith(
        "mr, 4 shots, none: a and b were evaluated on the same examples with other texts in 2 of 2 pairs"
    )


def test_demonstrations_of_the_same_rows_with_other_texts_are_said(write_results):
    a, b = two(write_results)
    change(b, demonstrations_sha256="other")
    assert ClassificationComparison([a, b]).notes == [
        "mr, 4 shots, none: a and b saw other demonstrations in 2 of 2 pairs."
    ]


def test_results_of_an_older_version_are_compared_and_said_to_be_old(write_results):
    a, b = two(write_results)
    change(a, examples_sha256=None, demonstrations_sha256=None)
    comparison = ClassificationComparison([a, b])
    assert len(comparison.pairs) == 1 and len(comparison.notes) == 1
    assert "a and b: not known to be of the same texts: results of an older version" in comparison.notes[0]


def test_seeds_of_other_demonstrations_are_not_paired(analysed, write_analysis):
    a, b = (
        write_analysis([analysed(seed=seed) | {"demonstrations": [seed]} for seed in (1, 2)], name) for name in "ab"
    )
    assert FinetuningComparison([a, b]).differences() is not None and FinetuningComparison([a, b]).notes == []
    change(a, examples_sha256="one", demonstrations_sha256="one")
    assert FinetuningComparison([a, b]).differences() is not None  # an older version's beside it
    change(b, examples_sha256="one", demonstrations_sha256="other")
    comparison = FinetuningComparison([a, b])
    assert comparison.differences() is None
    assert comparison.notes == [
        "sst2, 4 shots: 2 of the seeds of a and b have other demonstrations or examples and are not paired."
    ]


def write_perplexity(folder, nll=(9.0, 12.0), tokens=(4, 6), sha256="0", dictionary=None):
    (folder / "documents").mkdir(parents=True)
    run = {"split": "valid", "context_length": 8, "perplexity": 9.0, "ci95": None, "bits_per_byte": None,
        "num_tokens": 10,
           "num_documents": 2, "data_sha256": sha256, "documents": "documents/valid-8.npz"}  # fmt: skip
    config = {"data": {"path": "x"} | ({"dictionary_sha256": dictionary} if dictionary else {})}
    (folder / "results.json").write_text(
        json.dumps({"task": "lm_perplexity", "model": {"path": "m"}, "config": config, "runs": [run]})
    )
    np.savez(folder / "documents" / "valid-8.npz", nll=np.array(nll), tokens=np.array(tokens))
    return folder, run


def test_perplexities_of_other_data_or_dictionaries_are_not_compared(tmp_path):
    a, _ = write_perplexity(tmp_path / "a", dictionary="x")
    for name, other, compared in (("same", {"dictionary": "x"}, True), ("old", {}, True),
        ("dictionary", {"dictionary": "y"}, False),
                                  ("data", {"sha256": "1", "dictionary": "x"}, False)):  # fmt: skip
        b, _ = write_perplexity(tmp_path / name, nll=(8.0, 11.0), **other)
        comparison = Comparison([a, b])
        assert bool(comparison.differences) == compared
        said = [
            f"valid, context 8: a and {name} scored other data or by another dictionary; their perplexities must not "
            f"be compared."
        ]
        assert comparison.notes == ([] if compared else said)


@pytest.mark.parametrize(
    ("nll", "tokens"),
    [
        ((1.0, 2.0, 3.0), (4, 6)),
        ((1.0, 2.0), (4, 7)),
        ((1.0, np.nan), (4, 6)),
        ((1, 2), (4, 6)),
        ((1.0, 2.0), (4.0, 6.0)),
        ((1.0, 2.0), (-4, 14)),
    ],
)
def test_damaged_documents_are_named(tmp_path, nll, tokens):
    folder, run = write_perplexity(tmp_path / "a", nll, tokens)
    with pytest.raises(UserError, match=r"documents/valid-8\.npz is damaged: .*10 tokens in all; delete it"):
        document_sums(folder, run)


def test_pickled_documents_are_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder, run = write_perplexity(tmp_path / "a")
    evil = np.array([Evil()], dtype=object)
    np.savez(folder / "documents" / "valid-8.npz", nll=evil, tokens=evil)
    with pytest.raises(UserError, match=r"cannot read .*valid-8\.npz"):
        document_sums(folder, run)
    assert not (tmp_path / "owned").exists()
