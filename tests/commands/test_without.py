"""examples/momentum_vs_vanilla/without.py on a sweep of two updates."""

import json
import math
import shutil
from pathlib import Path

import pytest

ROW = {
    "form": "gpt", "variant": "ema", "lr": 6e-3, "seed": 1, "split": "test", "context_length": 16, "perplexity": 9.0
}  # fmt: skip
EMA_1 = "{}/4.1e+03/gpt/ema/lr0.006/seed1/checkpoint_last.pt"
EXAMPLE = Path(__file__).parents[2] / "examples/momentum_vs_vanilla"


@pytest.mark.slow
def test_filters_are_taken_out_of_the_trained_models(data, run_cli, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for end in ("bin", "idx"):
        shutil.copy(data / f"valid.{end}", tmp_path / "data" / f"test.{end}")
    data, output = tmp_path / "data", tmp_path / "out"
    words = ["--output", output, "--tokens", "4096", "--splits", "test", "--context-lengths", "16", "--seeds", "1,2"]
    done = run_cli(["python", EXAMPLE / "sweep.py", data, *words, "--variants", "vanilla,ema"], warm=True)
    assert done.returncode == 0, done.stderr
    results = output / "results_4.1e+03.json"
    words = ["python", EXAMPLE / "without.py", data, results, "--variants", "ema", "--form", "gpt"]
    done = run_cli([*words, "--layers", "all,1"], warm=True)
    assert done.returncode == 0, done.stderr
    stored = output / "without_4.1e+03.json"
    rows = json.loads(stored.read_text())["runs"]
    assert [row[:5] for row in rows] == [["gpt", "ema", 6e-3, n, out] for n in (1, 2) for out in ("1", "all")]
    whole = {
        row["seed"]: row["perplexity"] for row in json.loads(results.read_text())["runs"] if row["variant"] == "ema"
    }
    assert all(0 < abs(math.log(row[5] / whole[row[3]])) < 1 for row in rows)
    assert all(a[5] != b[5] for a, b in zip(rows[::2], rows[1::2], strict=True))  # one layer is not all of them
    words_of_one = ["fairseq-eval", "--task", "lm_perplexity", data, "--path", EMA_1.format(output), "--split", "test"]
    words_of_one += ["--context-lengths", "16", "--device", "cpu", "--without-momentum", "1"]
    one = run_cli([*words_of_one, "--results-dir", tmp_path / "one"], warm=True)
    assert one.returncode == 0, one.stderr
    (record,) = json.loads((tmp_path / "one/results.json").read_text())["runs"]
    assert record["perplexity"] == pytest.approx(rows[0][5], rel=1e-6)
    gaps = [math.log(row[5] / whole[row[3]]) for row in rows if row[4] == "all"]
    assert f"| gpt | ema | all layers | 2 | {math.expm1(sum(gaps) / 2):+.1%} |" in done.stdout
    before = stored.stat().st_mtime_ns, sorted(output.rglob("without_*.done"))
    again = run_cli([*words, "--layers", "all"], warm=True)  # nothing to evaluate; both tables from what is stored
    assert again.returncode == 0 and again.stdout == done.stdout
    assert sorted(output.rglob("without_*.done")) == before[1]


def test_what_is_not_there_is_one_line(data, run_cli, tmp_path):
    failed = run_cli(["python", EXAMPLE / "without.py", data, tmp_path / "results_1.json"], warm=True)
    assert failed.returncode == 2 and "does not exist" in failed.stderr and failed.stderr.count("\n") == 1
    (tmp_path / "results_1.json").write_text(json.dumps({"settings": {}, "runs": []}))
    failed = run_cli(["python", EXAMPLE / "without.py", data, tmp_path / "results_1.json"], warm=True)
    assert failed.returncode == 2 and "no run of ema,fir3 (gpt,llama) on test" in failed.stderr
    for rows, message in (
        (
            [ROW, ROW | {"lr": 3e-3}],
            "ema (gpt) has test results at the learning rates [0.003, 0.006]: keep those of one",
        ),
        ([ROW], "without_1.json is of context 64, not 16: move it away"),
        ([ROW | {"data_sha256": "0" * 64}], "results_1.json is of another test text than that of"),
    ):
        (tmp_path / "results_1.json").write_text(json.dumps({"settings": {}, "runs": rows}))
        (tmp_path / "without_1.json").write_text(json.dumps({"context_length": 64, "runs": []}))
        failed = run_cli(["python", EXAMPLE / "without.py", data, tmp_path / "results_1.json"], warm=True)
        assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
    failed = run_cli(["python", EXAMPLE / "without.py", data, tmp_path / "results_1.json", "--jobs", "0"], warm=True)
    assert failed.returncode == 2 and failed.stderr == "error: --jobs 0: must be at least 1\n"
    (tmp_path / "results_1.json").write_text(json.dumps({"settings": {}, "runs": [ROW]}))
    (tmp_path / "without_1.json").write_text("[]")
    failed = run_cli(["python", EXAMPLE / "without.py", data, tmp_path / "results_1.json"], warm=True)
    assert failed.returncode == 2 and "without_1.json is damaged, or not ours" in failed.stderr
