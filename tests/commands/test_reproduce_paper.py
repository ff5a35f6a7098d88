"""examples/reproduce_paper/reproduce.py on small models: what it runs, what it says beside the paper's numbers, and
what it refuses.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples/reproduce_paper/reproduce.py"
SMALL = ["--device", "cpu", "--dtype", "fp32", "--limit", "6"]
COLUMNS = {"cb": ("premise", "hypothesis"), "mr": ("text",)}


@pytest.fixture(scope="module")
def here(make_lm, tokenizer_folder, examples, tmp_path_factory):
    """models/en_dense_lm_1_3b, two checkpoints that differ in momentum alone, and labelled data."""
    folder = tmp_path_factory.mktemp("paper")
    for name, kind in (("en_dense_lm_1_3b", "none"), ("vanilla", "none"), ("momentum", "ema")):
        (folder / "models" / name).mkdir(parents=True)
        lm = make_lm(momentum_kind=kind, max_positions=2048)
        options = {
            "decoder_attention_heads": lm.config.heads,
            "decoder_layers": lm.config.layers,
            "decoder_embed_dim": lm.config.dim,
            "decoder_ffn_embed_dim": lm.config.ffn_dim,
            "max_target_positions": 2048,
            "position": "sinusoidal",
            "activation_fn": "gelu",
            **{key: value for key, value in asdict(lm.config).items() if key.startswith("momentum")},
        }
        weights = {f"decoder.{key}": tensor for key, tensor in lm.model.state_dict().items()}
        torch.save({"model": weights, "cfg": {"model": options, "task": {}}}, folder / "models" / name / "model.pt")
        shutil.copy(tokenizer_folder / "sentencepiece.model", folder / "models" / name)
    words = "good bad long thin dull very".split()
    for dataset, columns in COLUMNS.items():
        (folder / "data" / dataset).mkdir(parents=True)
        for split, count in (("train", 40), ("validation", 8)):
            rows = [
                {**dict.fromkeys(columns, f"{words[i % 6]} film {words[i * i % 5]}"), "label": i % 2}
                for i in range(count)
            ]
            (folder / "data" / dataset / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.nightly
def test_tables_1_to_5_beside_the_paper(here, run_cli, tmp_path):
    command = [
        "python",
        SCRIPT,
        "--models",
        here / "models",
        "--sizes",
        "1.3B",
        "--datasets",
        "cb,mr",
        "--data-dir",
        here / "data",
        *SMALL,
    ]
    done = run_cli([*command, "--output", tmp_path / "out"], warm=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["tables_1_to_5"]
    assert len(rows) == 2 * 10
    results = json.loads((tmp_path / "out/en_dense_lm_1_3b/cb/results.json").read_text())
    (run,) = results["runs"]
    assert (run["seed"], run["finetune_lr"], run["shots"], run["num_examples"]) == (3, 0.08, 19, 6)
    assert results["config"]["protocol"] == "paper"
    found = {(row["dataset"], row["quantity"]): row for row in rows}
    zero_shot = found["cb", "accuracy, zero-shot"]
    assert zero_shot["mean"] == run["accuracy"]["zero_shot"]
    assert zero_shot["published"] == 0.375
    assert zero_shot["inside"] == (zero_shot["ci95"][0] <= 0.3755 and zero_shot["ci95"][1] >= 0.3745)
    assert found["mr", "SimAOU"]["paper"] == "0.222"
    inside = [row["inside"] for row in rows if row["inside"] is not None]
    assert f"{sum(inside)} of {len(inside)} published numbers" in done.stdout
    assert "Only 6 examples" in done.stdout
    assert "37.5%" in (tmp_path / "out/report.html").read_text()

    stamp = (tmp_path / "out/en_dense_lm_1_3b/cb/results.json").stat().st_mtime_ns
    again = run_cli([*command, "--output", tmp_path / "out"], warm=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert (tmp_path / "out/en_dense_lm_1_3b/cb/results.json").stat().st_mtime_ns == stamp


@pytest.mark.nightly
def test_tables_6_and_7(here, data, run_cli, tmp_path):
    models = ["--vanilla", here / "models/vanilla/model.pt", "--momentum", here / "models/momentum/model.pt"]
    command = [
        "python",
        SCRIPT,
        *models,
        "--momentum-datasets",
        "mr",
        "--data-dir",
        here / "data",
        *SMALL,
        "--output",
        tmp_path / "out",
    ]
    done = run_cli(command, warm=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out/comparison.json").read_text())["tables_6_and_7"]
    assert row["published"] == [61.2, 64.8]
    assert row["difference"] == pytest.approx(row["momentum"] - row["vanilla"])
    assert "+3.60" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --models"),
        (["--vanilla", "a.pt"], "go together"),
        (["--models", "."], "this fetches what is missing"),
        (["--models", ".", "--sizes", "13B"], "--sizes 13B: choose from 1.3B, 2.7B"),
        (["--models", ".", "--lengths", "256,x"], "--lengths 256,x: give whole numbers from 1"),
    ],
)
def test_what_is_missing_is_named(run_cli, tmp_path, flags, message):
    failed = run_cli(["python", SCRIPT, *flags, "--output", "out"], cwd=tmp_path)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
