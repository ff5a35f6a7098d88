"""``momentum-lm report``: the task of the folders decides what is compared. Perplexities are in test_evaluate.py."""

import json

import pytest

from momentum_lm.cli import report


def write(folder, accuracy, task="icl_classification", shots=(0, 4)):
    """Two draws of demonstrations, ten examples, ``accuracy`` tenths right."""
    folder.mkdir()
    runs, lines = [], []
    for count in shots:
        for seed in (1, 2):
            key = {"dataset": "mr", "seed": seed, "shots": count, "order": 0, "calibration": "none"}
            right = accuracy + (seed == 2 and count > 0)
            runs.append(key | {"num_examples": 10, "accuracy": right / 10, "macro_f1": 0.5, "ci95": [0.1, 0.9],
            "majority": 0.5,
                               "confusion": [[5, 0], [0, 5]], "shots_fitted": count,
                               "demonstrations": list(range(count)),
                               "prefix_tokens": 0, "seconds": 0.1})  # fmt: skip
            lines += [json.dumps(key | {"index": i, "gold": 0, "pred": int(i >= right)}) + "\n" for i in range(10)]
    if task == "lm_perplexity":
        runs = [{"split": "valid", "context_length": 8, "perplexity": 9.0, "ci95": None, "bits_per_byte": None,
        "num_tokens": 10,
                 "num_documents": 1, "data_sha256": "0", "documents": "documents/valid-8.npz"}]  # fmt: skip
    if task == "icl_finetune_analysis":
        runs = [{"dataset": "mr", "seed": 1, "shots": 4, "num_examples": 10, "finetune_lr": 0.1, "rec2ftp": None,
        "baselines": {},
                 "accuracy": {"zero_shot": 0.5, "in_context": accuracy / 10, "finetuned": 0.5},
                 "rec2ftp_counts": {"cells": [[[5, 0], [0, 0]], [[0, 0], [0, 5]]]},
                 "paper": {"simaou": [0.1, 0.3]}, "corrected": {"simaou": [0.0, 0.1]}}]  # fmt: skip
    config = {"datasets": {"mr": {"labels": ["a", "b"]}}}
    (folder / "results.json").write_text(
        json.dumps({"task": task, "model": {"path": "m"}, "config": config, "runs": runs})
    )
    (folder / "predictions.jsonl").write_text("".join(lines))
    return str(folder)


def test_two_models(tmp_path, capsys):
    a, b = write(tmp_path / "a", 4), write(tmp_path / "b", 8)
    page = tmp_path / "compare.html"
    assert report.main([a, b, "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "dataset" and "vs a" in lines[0]
    assert lines[3].split()[:5] == ["mr", "0", "none", "b", "80.0"] and "+40.0" in lines[3]
    assert lines[-1] == str(page) and "<svg" in page.read_text()
    assert report.main([a, b, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| dataset | shots | calibration | results |")


def test_within_one_folder(tmp_path, capsys):
    a = write(tmp_path / "a", 4)
    assert report.main([a, "--between", "shots=0,4"]) == 0
    out = capsys.readouterr().out
    assert "vs 0" in out and "+5.0" in out  # 40%, against 40% and 50%
    assert report.main([a]) == 0
    assert "beats it?" in capsys.readouterr().out


def test_icl_against_finetuning(tmp_path, capsys):
    a, b = (write(tmp_path / name, right, "icl_finetune_analysis") for name, right in (("a", 4), ("b", 8)))
    page = tmp_path / "compare.html"
    assert report.main([a, b, "--output", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[3].split()[:3] == ["mr", "4", "b"] and "80.0%" in lines[3] and "0.200" in lines[3] and "0.050" in lines[3]
    )
    assert lines[-1] == str(page) and "<svg" in page.read_text()
    assert report.main([a]) == 0
    assert "40.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "p"], "p holds results of lm_perplexity, which cannot stand beside those of icl_classification in"),
        (
            ["a", "f"],
            "f holds results of icl_finetune_analysis, which cannot stand beside those of icl_classification in",
        ),
        (["f", "--between", "shots=0,4"], "--between is for results of icl_classification"),
        (["p", "--between", "shots=0,4"], "--between is for results of icl_classification"),
        (["a", "--between", "shots=0,8"], "has no runs with 8"),
        (["a", "b", "--between", "shots=0,4"], "name one"),
        (["a", "--between", "seed=1,2"], "--between seed=1,2: say for example"),
        (["a", "a"], "named twice"),
        (["x"], "holds results of other_task, and not of lm_perplexity or icl_classification or icl_finetune_analysis"),
        (["absent"], "cannot read"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, message):
    for name, task in (
        ("a", "icl_classification"),
        ("b", "icl_classification"),
        ("p", "lm_perplexity"),
        ("x", "other_task"),
        ("f", "icl_finetune_analysis"),
    ):
        write(tmp_path / name, 4, task)
    words = [str(tmp_path / word) if len(word) == 1 or word == "absent" else word for word in arguments]
    assert report.main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    a, page = write(tmp_path / "a", 4), tmp_path / "nowhere" / "x.html"
    assert report.main([a, "--output", str(page)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {page}: No such file or directory; ")


def test_a_negative_seed_is_one_line(tmp_path, capsys):
    assert report.main([write(tmp_path / "a", 4), write(tmp_path / "b", 8), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "error: --seed -1: must not be negative\n"
