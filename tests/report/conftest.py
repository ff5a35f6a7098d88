"""Results folders of chosen numbers, measured by the studies' own functions; ``test_keys.py`` compares their keys with
the studies'.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from momentum_lm.analysis.metrics import rec2ftp
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.studies import finetuning_summary
from momentum_lm.studies.classification_summary import summary
from momentum_lm.studies.tasks import CHOICE

LABELS = {"mr": ["Negative", "Positive"], "trec": ["Entity", "Person", "Number"], "piqa": None}


def _answer(gold, seed, shots, order, calibration):
    """The more shots the more right answers; the seed, the order and the calibration change which."""
    rng = np.random.default_rng([7, shots, seed if shots else 0, order, len(calibration)])
    right = rng.random(len(gold)) < {0: 0.5, 4: 0.7, 16: 0.85}[shots]
    return np.where(right, gold, (gold + 1) % (gold.max() + 1))


@pytest.fixture
def answer():
    """answer(gold, seed, shots, order, calibration) -> predictions: those that ``write_results`` writes unless told
    otherwise.
    """
    return _answer


@pytest.fixture
def write_results(tmp_path):
    """write(name, ...) -> folder. ``answers(gold, seed, shots, order, calibration)`` gives the predictions."""

    def write(
        name="results", datasets=("mr", "trec"), shots=(0, 4, 16), seeds=(1, 2, 3), orders=1, calibrations=("none",
        "batch"),
        answers=_answer, examples=60, gold=None, fitted=16, **config,
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(parents=True)
        runs, lines = [], []
        for dataset in datasets:
            labels = LABELS[dataset]
            truth = (
                np.random.default_rng(len(dataset)).integers(0, len(labels or "ab"), examples)
                if gold is None
                else np.array(gold)
            )
            queries = [Example(i, ("x",), ("a", "b"), int(g)) for i, g in enumerate(truth)]
            for count in shots:
                for seed, order, calibration in [
                    (s, o, c) for s in seeds for o in range(orders if count else 1) for c in calibrations
                ]:
                    if labels is None and calibration == "batch":
                        continue
                    predicted = answers(truth, seed, count, order, calibration)
                    key = {"dataset": dataset, "seed": seed, "shots": count, "order": order, "calibration": calibration}
                    few = min(count, fitted)
                    run = key | CHOICE.measure(SimpleNamespace(labels=labels), queries, predicted)
                    run |= {"shots_fitted": few, "demonstrations": list(range(seed, seed + few)),
                    "prefix_tokens": 30 * few,
                            "seconds": 1.5, "examples_sha256": dataset, "demonstrations_sha256": f"{seed} "
                            f"{few}"}  # fmt: skip
                    runs.append(run)
                    setting = "in_context" if count else "zero_shot"
                    lines += [
                        json.dumps(
                            key | {"setting": setting, "index": i, "gold": int(g), "pred": int(p), "scores": [0.0]}
                        )
                        for i, (g, p) in enumerate(zip(truth, predicted, strict=True))
                    ]
        about = {"labels": None, "template": "paper", "source": {"kind": "local"}}
        results = {
            "task": "icl_classification",
            "model": {"path": f"models/{name}", "sha256": "ab", "parameters": 10, "architecture": {"hidden_size": 8}},
            "config": {"score": "mean", "sampling": "random", "dtype": "float32", "separator": "\n\n", "bos": [0],
                       "datasets": {d: about | {"labels": LABELS[d]} for d in datasets}, "command": "fairseq-eval "
                       "--task x", **config},
            "runs": runs,
            "summary": summary(runs),
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))
        return folder

    return write


def _analysed(
    dataset="sst2", seed=1, shots=4, depth=6, heads=4, examples=100, controls=("untrained", "shuffled_labels", "lcgd")
):
    """A run of ICL against finetuning with numbers like those of small models: similarities fall with depth, null
    controls lie lower.
    """
    rng = np.random.default_rng([seed, shots, len(dataset)])

    def noisy(level, noise=0.02):
        return (level * np.linspace(1.4, 0.6, depth) + rng.normal(0, noise, depth)).round(4).tolist()

    zero, icl, ft = (rng.random(examples) < share for share in (0.55, 0.75, 0.65))
    right = [tuple(map(bool, each)) for each in zip(zero, icl, ft, strict=True)]
    cells = [[[right.count((bool(z), bool(i), bool(f))) for f in (0, 1)] for i in (0, 1)] for z in (0, 1)]
    recall = rec2ftp(zero, icl, ft, n_resamples=50)
    paper = {name: noisy(level) for name, level in {"simaou": 0.2, "simam": 0.5, "simam_before": 0.45, "kendall": 0.2,
             "kendall_example": 0.3, "recall_at_k": 0.6, "recall_at_k_example": 0.7}.items()}  # fmt: skip
    paper |= {name: noisy(0.0, 0.002) for name in ("simaou_random", "kendall_random")}
    corrected = {name: noisy(level) for name, level in {"simaou": 0.1, "simaou_relaxed": 0.1, "simam": 0.5,
    "simam_before": 0.5,
                 "simam_delta": 0.2, "simam_delta_centred": 0.15, "kendall": 0.2, "kendall_example": 0.3,
                 "recall_at_k": 0.2,
                 "recall_at_k_example": 0.1, "dw_similarity": 0.1, "dw_similarity_random": 0.05,
                 "relaxation_cosine": 0.4,
                 "relaxation_ratio": 2.0}.items()}  # fmt: skip
    corrected |= {name: noisy(0.0, 0.002) for name in ("simaou_random", "kendall_random", "kendall_example_random")}
    for values in (corrected["simam_delta"], corrected["simam_delta_centred"]):
        values[0] = None  # with rotary positions the first layer's maps do not differ
    around = lambda values: [[None if v is None else v + d for d in (-0.01, 0.01)] for v in values]  # noqa: E731
    ends = {f"{part}_ci95": {name: around(values) for name, values in found.items()} for part, found in
            (("paper", paper), ("corrected", corrected))}  # fmt: skip
    names = ("simaou", "simam", "simam_delta", "simam_delta_centred", "kendall", "kendall_example", "dw_similarity")
    levels = {"untrained": 0.3, "shuffled_labels": 0.9, "lcgd": 1.2, "all_parameters": 1.1}
    mean = {name: float(np.nanmean(np.array(corrected[name], dtype=float))) for name in names}
    baselines = {
        c: {"accuracy": {}, "corrected": {name: noisy(levels[c] * mean[name]) for name in names}} for c in controls
    }
    maps = rng.normal(0.1, 0.2, (depth, heads)).round(4).tolist()
    maps[0][1] = None
    shares = rng.dirichlet(np.ones(4), (2, 2, depth)).tolist()
    attention = [
        {"index": index, "in_context": a, "finetuned": b} for index, (a, b) in zip((17, 3), shares, strict=True)
    ]
    return {"dataset": dataset, "seed": seed, "shots": shots, "num_examples": examples, "finetune_lr": 0.003,
            "accuracy": {"zero_shot": float(zero.mean()), "in_context": float(icl.mean()),
            "finetuned": float(ft.mean())},
            "rec2ftp": recall.value, "rec2ftp_ci95": [recall.wilson.low, recall.wilson.high],
            "rec2ftp_chance": recall.chance,
            "rec2ftp_counts": {"cells": cells}, "paper": paper, "corrected": corrected, **ends,
            "heads": {"simam_delta_centred": maps, "kendall": maps, "dw_similarity": maps}, "baselines": baselines,
            "attention": attention, "demonstration_labels": ["bad", "good", "bad", "good"]}  # fmt: skip


@pytest.fixture
def analysed():
    """analysed(dataset, seed, shots, ...) -> a run of ICL against finetuning."""
    return _analysed


@pytest.fixture
def write_analysis(tmp_path):
    """write(runs, name) -> folder of ICL against finetuning; ``runs`` as of ``analysed``."""

    def write(runs, name="analysis"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        results = {
            "task": "icl_finetune_analysis",
            "model": {"path": f"models/{name}", "sha256": "ab", "parameters": 10, "architecture": {"hidden_size": 8}},
            "config": {
                "finetune_lr": [0.01, 0.003],
                "finetune_loss": "sequence",
                "datasets": {},
                "command": "fairseq-eval --task y",
            },
            "runs": runs,
            "summary": finetuning_summary.summary(runs),
        }
        (folder / "results.json").write_text(json.dumps(results, allow_nan=False))
        return folder

    return write
