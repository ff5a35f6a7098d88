"""scripts/paired_runs.py beside the same numbers by hand."""

import math
from statistics import geometric_mean, stdev

import numpy as np
import pytest
from paired_runs import RunOnText, average, difference

T_OF_2 = 4.302652729911275  # the 97.5% quantile of Student's t with two degrees of freedom
TOKENS = np.array([40, 7, 100, 13])


def run(seed, shift=0.0, bits=1.0):
    nll = TOKENS * (3 + shift + 0.2 * np.random.default_rng(seed).random(TOKENS.size))
    record = {"perplexity": math.exp(nll.sum() / TOKENS.sum()), "bits_per_byte": bits}
    return RunOnText(record, nll, TOKENS)


def test_differences_are_paired_by_document_and_by_seed():
    ours, theirs = [run(1, -0.1), run(2, -0.2), run(3, 0.05)], [run(4), run(5), run(6)]
    found = difference(ours, theirs)
    ratios = [a.record["perplexity"] / b.record["perplexity"] for a, b in zip(ours, theirs, strict=True)]
    assert found["ratio_by_seed"] == pytest.approx(ratios, rel=1e-12)
    mean, half = np.log(ratios).mean(), T_OF_2 * stdev(np.log(ratios)) / math.sqrt(3)
    assert found["difference"]["difference"] == pytest.approx(mean, rel=1e-9)
    assert found["ratio_ci95_over_seeds"] == pytest.approx(np.exp([mean - half, mean + half]), rel=1e-6)
    assert found["difference"]["low"] < mean < found["difference"]["high"] and found["documents"] == 4
    assert difference(ours[:1], theirs[:1])["ratio_ci95_over_seeds"] is None


def test_a_model_is_the_geometric_mean_of_its_runs():
    runs = [run(1, bits=1.0), run(2, bits=2.0)]
    found = average(runs)
    assert found["perplexity"] == pytest.approx(geometric_mean(found["by_seed"]))
    assert found["bits_per_byte"] == 1.5 and average([*runs, run(3, bits=None)])["bits_per_byte"] is None
