"""examples/momentum_vs_vanilla/verdicts.py on rows made up so that the right verdicts are known."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from momentum_lm.analysis.statistics import holm, t_interval, t_test

SCRIPT = Path(__file__).parents[2] / "examples/momentum_vs_vanilla/verdicts.py"
LOSSES = {  # mean test loss against ema's, and how far seeds are from it
    "vanilla": (0.050, 0.005),  # gain
    "fir3": (0.001, 0.002),  # tie
    "shift": (0.012, 0.009),  # gain, its size not settled
    "smear": (-0.030, 0.02),  # never compared: not the best of one lag on valid
    "kv_shift": (0.1, 0.0),
    "shift_values": (0.1, 0.0),
}


PRIMARY = [LOSSES[name] for name in ("vanilla", "fir3", "shift")]


def table(text):
    """The cells of the printed table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def row(variant, lr, seed, split, loss, form="llama"):
    return {
        "form": form, "variant": variant, "lr": lr, "seed": seed, "split": split, "context_length": 256,
        "perplexity": math.exp(loss),
    }  # fmt: skip


@pytest.fixture
def rows():
    found = []
    for number, (variant, (gap, spread)) in enumerate({"ema": (0.0, 0.0), **LOSSES}.items()):
        best = 3e-3 * (1 + number % 2)  # on valid; the other rate is better on test, which must not count
        for lr in (3e-3, 6e-3, 1.2e-2):
            for seed in (101, 102):
                worse = 0.0 if lr == best else 0.1
                found.append(row(variant, lr, seed, "valid", 5 + 0.1 * (variant != "shift") + worse))
            for seed in range(1, 9):
                wobble = spread * (1 if seed % 2 else -1)
                found.append(row(variant, lr, seed, "test", 5 + seed / 10 + gap + wobble - (lr != best)))
    return found


def write(path, rows):
    path.write_text(json.dumps({"settings": {}, "runs": rows}))
    return path


def test_verdicts_by_the_plan(run_cli, tmp_path, rows):
    picture = tmp_path / "verdicts.png"
    results = write(tmp_path / "results.json", rows)
    done = run_cli(["python", SCRIPT, results, "--picture", picture], warm=True)
    assert done.returncode == 0, done.stderr
    cells = table(done.stdout)
    assert [line[:4] for line in cells] == [
        ["llama", "vanilla", "0.003, 0.006", "8"],
        ["llama", "fir3", "0.003, 0.003", "8"],
        ["llama", "shift", "0.003, 0.006", "8"],
    ]
    assert [line[4] for line in cells] == ["-4.9%", "-0.1%", "-1.2%"]
    assert [line[-1] for line in cells] == ["gain", "tie", "gain, its size not settled"]
    own = [t_test([-gap - (1 if seed % 2 else -1) * spread for seed in range(1, 9)]) for gap, spread in PRIMARY]
    assert [line[-2] for line in cells] == [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in holm(own, 6)]
    assert "llama, ema: the best learning rate, 0.003, is at an end of those tried" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_named_and_still_corrected_for(run_cli, tmp_path, rows):
    some = [r for r in rows if r["variant"] not in ("fir3", "smear")]
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", some)], warm=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("not there yet")] == [
        "not there yet: gpt: ema against vanilla",
        "not there yet: gpt: ema against fir3",
        "not there yet: gpt: ema against the best filter of one lag",
        "not there yet: llama: ema against fir3",
        "not there yet: llama: ema against the best filter of one lag",
    ]
    few = [r for r in rows if (r["lr"], r["variant"]) != (1.2e-2, "vanilla")]  # a planned rate that was not tried
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", few)], warm=True)
    assert "not there yet: llama: ema against vanilla" in done.stdout


def test_nothing_is_judged_before_all_seeds_are_there(run_cli, tmp_path, rows):
    some = [r for r in rows if not 5 <= r["seed"] <= 8]
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", some)], warm=True)
    assert [line[-1] for line in table(done.stdout)] == ["not there yet: 4 of 8 seeds"] * 3


def test_an_interval_that_is_too_wide_is_open_and_asks_for_seeds(run_cli, tmp_path, rows):
    for r in rows:
        if r["variant"] == "vanilla" and r["split"] == "test":
            r["perplexity"] *= math.exp(0.08 * (-1) ** r["seed"] - 0.05)
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", rows)], warm=True)
    assert done.returncode == 0, done.stderr
    assert table(done.stdout)[0][-1] == "open"
    assert "llama, vanilla: the interval is +-" in done.stdout and "the plan adds seeds" in done.stdout

    more = [r | {"seed": r["seed"] + 8} for r in rows if r["split"] == "test" and r["variant"] in ("ema", "vanilla")]
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", rows + more)], warm=True)
    found = table(done.stdout)  # once more with all seeds, beside the first
    assert [(line[1], line[3]) for line in found] == [
        ("vanilla", "8"),
        ("vanilla", "16"),
        ("fir3", "8"),
        ("shift", "8"),
    ]
    assert found[0][:-2] != found[1][:-2] and found[0][4] == found[1][4]


def test_refusals_are_one_line(run_cli, tmp_path, rows):
    theirs = tmp_path / "theirs.png"
    theirs.write_bytes(b"\x89PNG of someone")
    results = write(tmp_path / "results.json", rows)
    none, other, damaged = write(tmp_path / "a.json", []), write(tmp_path / "b.json", [{}]), tmp_path / "c.json"
    damaged.write_text("{")
    for words, message in (
        ([tmp_path / "none.json"], f"{tmp_path / 'none.json'} does not exist"),
        ([none], f"{none} has no comparison of the plan yet: gpt: ema against vanilla"),
        ([damaged], f"{damaged} is damaged, or not of a sweep"),
        ([other], f"{other} is damaged, or not of a sweep ('form')"),
        ([results, "--picture", theirs], f"--picture {theirs} is there and not our picture"),
    ):
        failed = run_cli(["python", SCRIPT, *words], warm=True)
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
        assert failed.stderr.startswith(f"error: {message}")
    assert theirs.read_bytes() == b"\x89PNG of someone"


def test_what_is_not_whole_does_not_loosen_the_others_correction(run_cli, tmp_path, rows):
    few = [r for r in rows if r["variant"] not in ("vanilla", "fir3") or r["seed"] not in range(4, 9)]
    done = run_cli(["python", SCRIPT, write(tmp_path / "results.json", few)], warm=True)
    assert done.returncode == 0, done.stderr
    cells = {line[1]: line for line in table(done.stdout)}
    assert cells["vanilla"][-2:] == ["", "not there yet: 3 of 8 seeds"] == cells["fir3"][-2:]
    gap, spread = LOSSES["shift"]
    own = t_test([-gap - (1 if seed % 2 else -1) * spread for seed in range(1, 9)])
    assert cells["shift"][-2] == f"{holm([own], 6)[0]:.3f}"


def test_seeds_that_are_there_are_not_asked_for_again(run_cli, tmp_path, rows):
    more = [
        r | {"seed": seed, "perplexity": r["perplexity"] * (1 + 0.05 * (r["variant"] == "shift") * (-1) ** seed)}
        for r in rows
        for seed in ((r["seed"], r["seed"] + 8) if r["split"] == "test" else (r["seed"],))
    ]
    said = "llama, shift: the interval is"
    done = run_cli(
        ["python", SCRIPT, write(tmp_path / "r.json", [r for r in more if r["seed"] not in range(9, 17)])], warm=True
    )
    assert said in done.stdout and "the plan adds seeds" in done.stdout
    done = run_cli(["python", SCRIPT, write(tmp_path / "r.json", more)], warm=True)
    assert said not in done.stdout and [line[3] for line in table(done.stdout) if line[1] == "shift"] == ["8", "16"]


def test_the_pages_tables_are_those_of_the_results(run_cli):
    """Of the study: what README says is what the committed results give."""
    results = SCRIPT.parent / "results/results_1.02e+06.json"
    page = (SCRIPT.parent / "README.md").read_text("utf-8")
    done = run_cli(["python", SCRIPT, results], warm=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 4 and all(f"{row}\n" in page for row in rows)
    means = {}
    for r in json.loads(results.read_text())["runs"]:
        if r["split"] == "test":
            means.setdefault((r["form"], r["variant"]), []).append(math.log(r["perplexity"]))
    for form in ("gpt", "llama"):
        cells = [f"{math.exp(statistics.mean(means[form, name])):.1f}" for name in ("vanilla", "ema", "fir3")]
        assert f"| {form} | {' | '.join(cells)} |" in page
    taken_out = json.loads((SCRIPT.parent / "results/without_1.02e+06.json").read_text())["runs"]
    losses = {
        (r["form"], r["variant"], r["seed"]): math.log(r["perplexity"]) for r in json.loads(results.read_text())["runs"]
    }
    gaps = {}
    for form, variant, _, seed, removed, perplexity in taken_out:
        gaps.setdefault((form, variant, removed), []).append(math.log(perplexity) - losses[form, variant, seed])
    for (form, variant), _ in itertools.groupby(gaps, key=lambda key: key[:2]):
        found = [t_interval(gaps[form, variant, removed]) for removed in ("0", "1", "2", "all")]
        shown = [[100 * math.expm1(value) for value in (gap.estimate, gap.low, gap.high)] for gap in found]
        cells = [f"{mean:+.1f}% ({low:.1f} to {high:.1f})" for mean, low, high in shown]
        assert f"| {form} | {variant} | {' | '.join(cells)} |" in page
