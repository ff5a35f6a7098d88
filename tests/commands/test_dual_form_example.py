"""examples/dual_form/dual_form.py: its identities hold, and it says so when one does not."""

import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/dual_form/dual_form.py"


@pytest.mark.parametrize("seed", ["1", "7"])
def test_every_identity_holds_to_rounding(run_cli, tmp_path, seed):
    done = run_cli(["python", SCRIPT, "--seed", seed, "--output", tmp_path / "figure.png"])
    assert done.returncode == 0, done.stderr
    differences = [float(found) for found in re.findall(r"largest difference (\S+)", done.stdout)]
    assert len(differences) == 7
    assert max(differences) < 1e-10
    assert "All 7 identities hold" in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_an_identity_that_does_not_hold_is_named_and_ends_with_status_1(run_cli, tmp_path):
    broken = (
        SCRIPT.read_text()
        .replace("eta, values = 0.7, draw(1", "eta, values = 0.7, 1.001 * draw(1")
        .replace("history = values[0, 0, :-1]", "history = values[0, 0, :-1] / 1.001")
    )
    (tmp_path / "broken.py").write_text(broken)
    done = run_cli(["python", tmp_path / "broken.py", "--output", tmp_path / "figure.png"])
    assert done.returncode == 1
    assert done.stdout.count("does NOT hold") == 1
    assert "NOT all 7" in done.stdout
