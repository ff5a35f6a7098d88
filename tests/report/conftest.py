"""Folders of in-context classification as the study leaves them, their numbers from the same functions."""

import json

import numpy as np
import pytest

from momentum_lm.analysis.classification import accuracy, confusion_matrix, macro_f1, majority_rate
from momentum_lm.analysis.statistics import wilson_interval
from momentum_lm.report.classification import summary

LABELS = {"mr": ["Negative", "Positive"], "trec": ["Entity", "Person", "Number"], "piqa": None}


def _answer(gold, seed, shots, order, calibration):
    """The more shots the more right answers; the seed, the order and the calibration change which."""
    rng = np.random.default_rng([7, shots, seed if shots else 0, order, len(calibration)])
    right = rng.random(len(gold)) < {0: 0.5, 4: 0.7, 16: 0.85}[shots]
    return np.where(right, gold, (gold + 1) % (gold.max() + 1))


@pytest.fixture
def answer():
    """answer(gold, seed, shots, order, calibration) -> predictions: those that ``write_results`` writes unless told otherwise."""
    return _answer


@pytest.fixture
def write_results(tmp_path):
    """write(name, ...) -> folder. ``answers(gold, seed, shots, order, calibration)`` gives the predictions."""

    def write(
        name="results", datasets=("mr", "trec"), shots=(0, 4, 16), seeds=(1, 2, 3), orders=1, calibrations=("none", "batch"),
        answers=_answer, examples=60, gold=None, fitted=16, **config,
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(parents=True)
        runs, lines = [], []
        for dataset in datasets:
            labels = LABELS[dataset]
            truth = np.random.default_rng(len(dataset)).integers(0, len(labels or "ab"), examples) if gold is None else np.array(gold)
            for count in shots:
                for seed, order, calibration in [(s, o, c) for s in seeds for o in range(orders if count else 1) for c in calibrations]:
                    if labels is None and calibration == "batch":
                        continue
                    predicted = answers(truth, seed, count, order, calibration)
                    interval = wilson_interval(int((truth == predicted).sum()), len(truth))
                    key = {"dataset": dataset, "seed": seed, "shots": count, "order": order, "calibration": calibration}
                    few = min(count, fitted)
                    run = key | {"num_examples": len(truth), "accuracy": accuracy(truth, predicted), "ci95": [interval.low, interval.high],
                                 "shots_fitted": few, "demonstrations": list(range(seed, seed + few)), "prefix_tokens": 30 * few,
                                 "seconds": 1.5}  # fmt: skip
                    if labels is None:
                        run |= {"macro_f1": None, "confusion": None, "majority": None, "chance": 0.5}
                    else:
                        counts = confusion_matrix(truth, predicted, len(labels)).tolist()
                        run |= {"macro_f1": macro_f1(truth, predicted), "confusion": counts, "majority": majority_rate(truth)}
                    runs.append(run)
                    setting = "in_context" if count else "zero_shot"
                    lines += [
                        json.dumps(key | {"setting": setting, "index": i, "gold": int(g), "pred": int(p), "scores": [0.0]})
                        for i, (g, p) in enumerate(zip(truth, predicted, strict=True))
                    ]
        about = {"labels": None, "template": "paper", "source": {"kind": "local"}}
        results = {
            "task": "icl_classification",
            "model": {"path": f"models/{name}", "sha256": "ab", "parameters": 10, "architecture": {"hidden_size": 8}},
            "config": {"score": "mean", "sampling": "random", "dtype": "float32", "separator": "\n\n", "bos": [0],
                       "datasets": {d: about | {"labels": LABELS[d]} for d in datasets}, "command": "fairseq-eval --task x", **config},
            "runs": runs,
            "summary": summary(runs),
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))
        return folder

    return write
