"""examples/regression_in_context/regression.py: its methods against their definitions, and a small study."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples/regression_in_context/regression.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("regression_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts(example):
    return example.problems(3, example.seeded(0))


def examples_before(prompts, row, n):
    x, y = prompts
    return x[row, :n].double(), y[row, :n].double(), x[row, n].double()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_descents_are_steps_along_gradients(example, prompts, beta):
    found = dict(example.descents(*prompts, rate=0.5, beta=beta))
    for row, n in ((0, 0), (1, 3), (2, 19)):
        x, y, query = examples_before(prompts, row, n)
        w = torch.zeros(example.DIMENSION, dtype=torch.double, requires_grad=True)
        largest = float(torch.linalg.eigvalsh(x.T @ x).max()) if n else 1.0
        optimizer = torch.optim.SGD([w], lr=0.5 / largest, momentum=beta)
        for step in range(1, 13):
            if n:
                optimizer.zero_grad()
                (0.5 * (x @ w - y).square().sum()).backward()
                optimizer.step()
            if step in found:
                close(found[step][row, n], query @ w.detach())


def test_ridge_and_newton_solve_the_equations(example, prompts):
    steps = dict(example.newtons(*prompts))
    for row, n in ((0, 0), (1, 3), (2, 19)):
        x, y, query = examples_before(prompts, row, n)
        penalty = example.NOISE * torch.eye(example.DIMENSION).double()
        solved = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, torch.zeros(len(penalty)).double()]))
        close(example.ridge(*prompts)[row, n], query @ solved.solution)
    x, y, query = examples_before(prompts, 2, 19)
    errors = [float((steps[step][2, 19] - query @ torch.linalg.pinv(x) @ y).abs()) for step in (1, 6, 12)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


@pytest.mark.parametrize("position", ["rotary", "none"])
@pytest.mark.parametrize("variant", ["vanilla", "ema", "kv_shift", "canon_a", "depth"])
def test_a_prediction_sees_what_stands_before_it(example, prompts, variant, position):
    torch.manual_seed(0)
    model = example.Regressor(example.decoder_config(variant, position))
    x, y = prompts
    with torch.no_grad():
        before = model(x, y)
        other_y = y.clone()
        other_y[:, 5] += 1
        changed = model(x, other_y)
    assert torch.equal(before[:, :6], changed[:, :6]) and (before - changed)[:, 6:].abs().min() > 0


def test_the_nearest_choice_is_made_on_other_prompts(example):
    known = {part: example.methods(*given) for part, given in example.held_out(96).items()}
    name = "8 steps, rate 0.5"
    predictions = {part: some["GD"][name] for part, some in known.items()}
    found = example.nearest(predictions, known)
    assert found["GD"] == {"choice": name, "distance": 0.0} and example.preference(found) > 1
    assert all(found[method]["distance"] > 0 for method in ("ridge", "Newton", "GD with momentum"))
    assert known["test"]["ridge"]["exact"].shape == (96, example.EXAMPLES)
    heavy = {part: some["GD with momentum"]["8 steps, rate 0.5, momentum 0.6"] for part, some in known.items()}
    assert example.preference(example.nearest(heavy, known)) < -1
    between = {part: (some["GD"][name] + some["ridge"]["exact"]) / 2 for part, some in known.items()}
    preferences = [example.preference(example.nearest(some, known)) for some in (
        {part: found["ridge"]["exact"] for part, found in known.items()}, between)]  # fmt: skip
    assert all(abs(value) < 0.5 for value in preferences), preferences  # learners that have no momentum


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "adam"], "--variants adam: choose from vanilla, ema"),
        (["--updates", "0"], "--updates 0: must be at least 1"),
        (["--seeds", "x"], "--seeds x"),
    ],
)
def test_bad_flags_are_one_line(example, words, message, tmp_path, capsys):
    assert example.main(["--output", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_a_study_is_kept_and_gains_variants(run_cli, tmp_path):
    words = ["python", SCRIPT, "--output", tmp_path / "out", "--updates", "3", "--tested", "32"]
    words += ["--seeds", "1,2", "--jobs", "1"]
    done = run_cli([*words, "--variants", "vanilla"])
    assert done.returncode == 0, done.stderr
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/vanilla/*/predictions.npz")}
    done = run_cli([*words, "--variants", "vanilla,ema"])
    assert done.returncode == 0 and "| ema " in done.stdout.replace("ema  ", "| ema ") and len(kept) == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: list(records) for name, records in results["variants"].items()} == {
        "vanilla": ["1", "2"],
        "ema": ["1", "2"],
    }
    assert (tmp_path / "out/errors.png").exists() and len(results["methods"]["ridge"]) == 20
    other = run_cli([*words, "--variants", "vanilla", "--position", "none"])
    assert other.returncode == 2 and 'another position ("rotary" there, "none" now)' in other.stderr
