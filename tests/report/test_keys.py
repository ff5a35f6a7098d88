"""The chosen results of these tests have the keys and types of what studies write (tests/fixtures, and
test_written_before.py)."""

import json
from pathlib import Path

import pytest

from momentum_lm.results.records import read_results

WRITTEN = Path(__file__).parent.parent / "fixtures" / "results"


def unknown(chosen, written, where=""):
    """Keys of ``chosen`` that ``written`` lacks, metrics' names aside."""
    if isinstance(chosen, dict) and isinstance(written, dict):
        inner = [unknown(chosen[name], written[name], f"{where}.{name}") for name in chosen.keys() & written.keys()]
        return {f"{where}.{name}" for name in chosen.keys() - written.keys()}.union(*inner)
    assert chosen is None or written is None or isinstance(chosen, type(written)) or where.endswith(".separator"), where
    return set()


def test_classification(write_results):
    folder, written = write_results(datasets=("mr",), shots=(0, 4)), WRITTEN / "icl_classification"
    chosen, real = read_results(folder), read_results(written)
    assert unknown(chosen["runs"][-1], real["runs"][-1]) == set()
    assert unknown(chosen["config"] | {"datasets": 0}, real["config"] | {"datasets": 0}) == set()
    assert (
        unknown(
            chosen["summary"]["mr"]["4"]["by_calibration"]["none"], real["summary"]["mr"]["2"]["by_calibration"]["none"]
        )
        == set()
    )
    lines = [json.loads((place / "predictions.jsonl").read_text().splitlines()[-1]) for place in (folder, written)]
    assert lines[0].keys() == lines[1].keys()


@pytest.mark.parametrize("controls", [("untrained", "lcgd"), ()])
def test_icl_against_finetuning(analysed, write_analysis, controls):
    chosen = read_results(write_analysis([analysed(controls=controls)]))
    real = read_results(WRITTEN / "icl_finetune_analysis")
    assert unknown(chosen["runs"][0], real["runs"][0]) <= {".paper.kendall_example"}
