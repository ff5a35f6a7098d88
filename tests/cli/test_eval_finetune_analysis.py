"""What the flags of the task mean; the study itself has its own tests."""

import pytest

from momentum_lm.cli.evaluate import main
from momentum_lm.errors import UserError
from momentum_lm.studies.flags import positives


def test_rates():
    assert positives("0.01,3e-3,0.01", "--finetune-lr", "0.01") == [0.01, 0.003]
    for text in ("", "a", "0", "-1", "0.1,nan", "inf", "0.1,"):
        with pytest.raises(UserError, match=f"--finetune-lr {text}: give positive numbers"):
            positives(text, "--finetune-lr", "0.01")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--controls", "random,none"],
            "--controls none: choose from untrained, random, shuffled_labels, lcgd, all_parameters",
        ),
        (["--lr-examples", "0"], "--lr-examples 0: must be at least 1"),
        (["--finetune-lr", "fast"], "--finetune-lr fast: give positive numbers"),
        (["--bos", "<s>"], "--bos <s> is for fairseq checkpoints"),
    ],
)
def test_impossible_flags(flags, message, tmp_path, capsys):
    given = [
        "--task",
        "icl_finetune_analysis",
        "--hf-model",
        "none",
        "--datasets",
        "mr",
        "--results-dir",
        str(tmp_path / "out"),
    ]
    assert main([*given, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "out").exists()
