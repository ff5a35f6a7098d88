"""examples/momentum_vs_vanilla/sweep.py on a small text: what it trains, what it does not train again, and what it
refuses.
"""

import importlib
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from momentum_lm.files import file_sha256, locked
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.filters import is_of_filter
from momentum_lm.system import import_user_dir

SCRIPT = Path(__file__).parents[2] / "examples/momentum_vs_vanilla/sweep.py"
TWO_UPDATES = ["--tokens", "4096", "--splits", "valid", "--context-lengths", "16"]


@pytest.fixture(scope="module")
def swept(data, run_cli, tmp_path_factory):
    """The output folder of a sweep over one variant, trained and no more."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    done = run_cli(
        ["python", SCRIPT, data, "--output", output, "--variants", "vanilla", "--train-only", *TWO_UPDATES], warm=True
    )
    assert done.returncode == 0, done.stderr
    return output


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--autocast", "bf16"], 'autocast ("none" there, "bf16" now)'),
        (["--tokens", "4097"], "tokens (4096.0 there, 4097.0 now)"),
        (["--variants", "ema_0.3", "--autocast", "bf16"], "autocast ("),  # a variant that is not trained yet
        (["DATA"], "data ("),
    ],
)
def test_other_settings_are_refused_and_nothing_changes(swept, data, run_cli, tmp_path, change, difference):
    if change == ["DATA"]:
        shutil.copytree(data, tmp_path / "data")
        for end in ("bin", "idx"):
            shutil.copy(data / f"valid.{end}", tmp_path / "data" / f"train.{end}")
        data, change = tmp_path / "data", []
    before = stamps(swept)
    words = ["python", SCRIPT, data, "--output", swept, "--variants", "vanilla", *TWO_UPDATES, *change]
    failed = run_cli(words, warm=True)
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {swept / '4.1e+03' / 'config.json'} is of a sweep that differs in {difference}")
    assert line.endswith(f"choose another --output, or remove {swept / '4.1e+03'}")
    assert stamps(swept) == before


def test_a_folder_goes_on_with_the_same_flags_alone(swept, data, run_cli, tmp_path):
    """Its checkpoint is another variant's otherwise, although nothing is in the results yet."""
    output = tmp_path / "out"
    shutil.copytree(swept, output)
    shutil.move(output / "4.1e+03/gpt/vanilla", output / "4.1e+03/gpt/ema")
    words = ["python", SCRIPT, data, "--output", output, "--variants", "ema", *TWO_UPDATES]
    failed = run_cli(words, warm=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert "config.json is of a run that differs in flags" in failed.stderr


def test_a_run_that_fails_ends_the_sweep_at_once(data, run_cli, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "dict.txt").unlink()
    words = ["python", SCRIPT, tmp_path / "data", "--output", tmp_path / "out", "--jobs", "1", *TWO_UPDATES]
    failed = run_cli(words, warm=True)
    assert failed.returncode == 1
    assert "error: train (" in failed.stderr and "dict.txt" in failed.stderr and "Traceback" not in failed.stderr
    assert [path.parts[-4] for path in tmp_path.glob("out/*/gpt/*/lr0.006/seed1/train.log")] == ["vanilla"]
    assert not list(tmp_path.glob("out/results*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "vanila"], "--variants vanila: choose from vanilla, ema_0.1"),
        (["--seeds", "x"], "--seeds x"),
        (["--tokens", "100"], "--tokens 100: must be at least 2048"),
        (["--jobs", "0"], "--jobs 0"),
        (["--tokens-per-sample", "300"], "--tokens-per-sample 300: must divide 2048, such as 512"),
        (["--splits", "valid,test"], "--splits: DATA has no split 'test' (there: train, valid)"),
        (["--form", "bert"], "--form bert: choose from gpt, gpt_rotary"),
        (["--lr", "1e-3,fast"], "--lr 1e-3,fast: give positive numbers"),
        (["--lr", "best"], "--lr best: no learning rate of vanilla (gpt) was tried on valid with all of the"),
        (["--variant", "mine"], "--variant mine: give NAME=FLAGS"),
        (["--variant", "ema=--momentum-kind ema"], "--variant ema=--momentum-kind ema: give NAME=FLAGS"),
        (["--variant", "mine=--lr=1"], "--variant mine=--lr=1: --lr=1 is the same for all variants of a sweep"),
    ],
)
def test_bad_flags_are_one_line(data, run_cli, tmp_path, words, message):
    failed = run_cli(["python", SCRIPT, data, "--output", tmp_path / "out", "--splits", "valid", *words], warm=True)
    said = failed.stderr.replace(str(data.resolve()), "DATA")
    assert (failed.returncode, said.count("\n")) == (2, 1) and said.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_is_one_line(run_cli, tmp_path):
    failed = run_cli(["python", SCRIPT, tmp_path / "none", "--output", tmp_path / "out", *TWO_UPDATES], warm=True)
    assert failed.returncode == 2 and not (tmp_path / "out").exists()
    assert failed.stderr == (
        f"error: DATA: {tmp_path / 'none'} has no split 'train' (momentum-lm prepare makes such a folder)\n"
    )


@pytest.mark.slow
def test_what_is_trained_is_kept_and_compared(swept, data, run_cli):
    words = ["python", SCRIPT, data, "--output", swept, "--variants", "vanilla,ema_0.3", *TWO_UPDATES]
    checkpoint = swept / "4.1e+03/gpt/vanilla/lr0.006/seed1/checkpoint_last.pt"
    trained = checkpoint.stat().st_mtime_ns
    stored = swept / "results_4.1e+03.json"
    for kept in (True, True, False):
        if not kept:  # rows that are there need no folder
            shutil.rmtree(swept / "4.1e+03/gpt")
        done = run_cli(words, warm=True)
        assert done.returncode == 0, done.stderr
        assert checkpoint.exists() == kept and (not kept or checkpoint.stat().st_mtime_ns == trained)
        results = json.loads(stored.read_text())
        rows = {r["variant"]: r for r in results["runs"]}
        assert all(r["training_loss"] == [] for r in rows.values())  # two updates are too few to be logged
        assert list(rows) == ["ema_0.3", "vanilla"] and results["settings"]["tokens"] == 4096
        assert all((r["form"], r["lr"], r["seed"], r["split"]) == ("gpt", 0.006, 1, "valid") for r in rows.values())
        vanilla, ema = (rows[name]["perplexity"] for name in ("vanilla", "ema_0.3"))
        assert f"| vanilla | 0.006 | 1 | {vanilla:.1f} |" in done.stdout
        assert f"| ema_0.3 | 0.006 | 1 | {ema:.1f} | {ema / vanilla - 1:+.1%} |" in done.stdout
    other = json.loads(stored.read_text())
    other["settings"]["autocast"] = "bf16"
    stored.write_text(json.dumps(other))
    failed = run_cli(words, warm=True)
    assert failed.returncode == 2 and f'{stored} is of a sweep that differs in autocast ("bf16" there' in failed.stderr


@pytest.mark.nightly
def test_rates_are_chosen_on_other_seeds_and_controls_and_variants_of_ones_own_train(data, run_cli, tmp_path):
    own = tmp_path / "filters"
    own.mkdir()
    (own / "__init__.py").write_text(
        "from momentum_lm.model import WindowFilter, register_filter\n"
        "@register_filter('before')\n"
        "class Before(WindowFilter):\n"
        "    def window(self, x):\n"
        "        return x[..., 0, :]\n"
    )
    words = ["python", SCRIPT, data, "--output", tmp_path / "out", *TWO_UPDATES, "--user-dir", own, "--form", "llama"]
    words += [
        "--variant",
        "mine=--momentum-kind before --momentum-taps 2",
        "--variants",
        "vanilla,mine,placebo,head_scale",
    ]
    tried = run_cli([*words, "--lr", "1e-9,1e-3", "--seeds", "101,102"], warm=True)
    assert tried.returncode == 0, tried.stderr
    done = run_cli([*words, "--lr", "best", "--seeds", "1"], warm=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out/results_4.1e+03.json").read_text())["runs"]
    assert {(r["variant"], r["lr"]) for r in rows if r["seed"] == 1} == {
        (name, 1e-3) for name in ("vanilla", "mine", "placebo", "head_scale")
    }
    assert len({r["perplexity"] for r in rows}) == len(rows) == 4 * 2 * 2 + 4


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("sweep")


def rows_of(variant, lr, perplexity, seeds=(1, 2, 3), split="test", **fields):
    return [
        {"form": "gpt", "variant": variant, "lr": lr, "seed": seed, "split": split, "context_length": 16,
         "perplexity": perplexity + seed, "flags": ["--arch", "gpt_lm_tiny"], "code": None, **fields}
        for seed in seeds
    ]  # fmt: skip


def written(output, data, rows):
    """A results file as a sweep over ``data`` leaves it."""
    output.mkdir()
    sha = file_sha256(data / "train.idx", data / "train.bin")[:16]
    settings = {"tokens": 4096.0, "autocast": "none", "data": sha}
    (output / "results_4.1e+03.json").write_text(json.dumps({"settings": settings, "runs": rows}))
    return output


EMA = ["--arch", "gpt_lm_tiny", "--momentum-kind", "ema", "--momentum-learned"]


def test_the_best_of_each_is_compared_with_the_best_of_the_baseline(data, run_cli, tmp_path):
    """Where results have the baseline at other rates too, the comparison is with none of these."""
    rows = [
        *(row for lr, loss in ((3e-3, 90), (6e-3, 100)) for row in rows_of("vanilla", lr, loss, (101, 102), "valid")),
        *rows_of("vanilla", 3e-3, 100, split="valid"),
        *rows_of("vanilla", 6e-3, 120, split="valid"),
        *rows_of("ema", 6e-3, 90, (101, 102), "valid", flags=EMA),
        *rows_of("ema", 6e-3, 100, split="valid", flags=EMA),
    ]
    output = written(tmp_path / "out", data, rows)
    words = ["python", SCRIPT, data, "--output", output, *TWO_UPDATES, "--seeds", "1,2,3"]
    for variants in ("ema", "vanilla,ema"):
        done = run_cli([*words, "--variants", variants, "--lr", "best"], warm=True)
        assert done.returncode == 0, done.stderr
        assert "| vanilla | 0.003 | 3 | 102.0 |  |  |" in done.stdout and "| vanilla | 0.006" not in done.stdout
        assert "| ema | 0.006 | 3 | 102.0 | +0.0% | +0.0% to +0.0% |" in done.stdout
    done = run_cli([*words, "--variants", "ema", "--lr", "6e-3"], warm=True)  # equal rates, where one is given
    assert done.returncode == 0, done.stderr
    assert (
        "| vanilla | 0.006 | 3 | 122.0 |  |  |" in done.stdout and "| ema | 0.006 | 3 | 102.0 | -16.4% |" in done.stdout
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"variant": "vanilla", "flags": ["--arch", "gpt_lm_small"]},  # what the others are compared with
            "has vanilla with other flags or code (--arch gpt_lm_small",
        ),
        (
            {"seed": 101, "flags": [*EMA, "--momentum-eta", "0.9"]},
            "has ema with other flags or code (--arch gpt_lm_tiny",
        ),
        (
            {"seed": 9, "data_sha256": "0" * 64},
            "has results on another valid text than DATA's: choose another --output",
        ),
    ],
)
def test_rows_of_another_variant_or_text_are_refused(data, run_cli, tmp_path, row, message):
    """Those of other seeds, which are not run now, too: they choose the learning rate, or are paired."""
    rows = rows_of("ema", 6e-3, 100, split="valid", flags=EMA)
    output = written(tmp_path / "out", data, [*rows, rows[0] | row])
    words = ["python", SCRIPT, data, "--output", output, *TWO_UPDATES, "--seeds", "1,2,3", "--variants", "ema"]
    before = stamps(output)
    failed = run_cli(words, warm=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and message in failed.stderr
    assert stamps(output) == before


def test_losses_of_training_by_tenths(sweep, tmp_path):
    log = tmp_path / "train.log"
    lines = [f'2026 | INFO | train_inner | {{"num_updates": "{n}", "loss": "{n / 10}"}}\n' for n in range(1, 21)]
    log.write_text("".join(lines))
    nats = [
        (0.1 + 0.2 * part + 0.05) * math.log(2) for part in range(10)
    ]  # fairseq logs bits, here of two updates each
    assert sweep.training_losses(log) == pytest.approx(nats, abs=1e-5)
    log.write_text("".join(lines[:3]))
    assert len(sweep.training_losses(log)) == 3
    assert sweep.training_losses(tmp_path / "none.log") == []


def test_flags_of_a_variant_count(sweep, data, tmp_path):
    """The last of two flags does, in fairseq-train."""
    args = sweep.parse([str(data), "--variant", "mine=--weight-decay 0 --optimizer muon", "--splits", "valid"])
    command = sweep.training(args, tmp_path, sweep.Run("gpt", "mine", 6e-3, 1)).command
    last = {word: value for word, value in itertools.pairwise(command) if word.startswith("--")}
    assert (last["--weight-decay"], last["--optimizer"], last["--lr"]) == ("0", "muon", "0.006")


def test_one_sweep_at_a_time_in_a_folder(data, run_cli, tmp_path):
    with locked(tmp_path / "out"):
        failed = run_cli(["python", SCRIPT, data, "--output", tmp_path / "out", *TWO_UPDATES], warm=True)
    assert failed.returncode == 2 and "is being written by process" in failed.stderr


def test_controls():
    """The placebo has momentum's weights at other lags; the scale sees no other token."""
    import_user_dir(SCRIPT.parent / "controls")
    shape = dict(vocab_size=50, dim=16, ffn_dim=32, layers=1, heads=2)
    torch.manual_seed(0)
    placebo, x = (
        Decoder(DecoderConfig(**shape, momentum_kind="placebo")).layers[0].self_attn.momentum,
        torch.zeros(1, 2, 12, 8),
    )
    x[:, :, 0] = 1  # a pulse
    weights = placebo(x)[0][0, 0, 1:9, 0]
    assert sorted(weights.tolist(), reverse=True) == pytest.approx([0.3**k for k in range(1, 9)])
    assert weights.tolist() != sorted(weights.tolist(), reverse=True) and not placebo(x)[0][:, :, 9:].any()
    scaled = Decoder(DecoderConfig(**shape, momentum_kind="head_scale"))
    tokens = torch.randint(4, 50, (2, 9))
    vanilla = Decoder(DecoderConfig(**shape))
    vanilla.load_state_dict({n: p for n, p in scaled.state_dict().items() if not is_of_filter(n)})
    assert torch.equal(scaled(tokens), vanilla(tokens))
    with torch.no_grad():
        scaled.layers[0].self_attn.momentum.factor.fill_(-1.0)  # no attention at all
    changed = tokens.clone()
    changed[:, 3] = 4
    assert torch.equal(scaled(tokens)[:, 4:], scaled(changed)[:, 4:])
