"""``momentum-lm eval`` where fairseq is not installed."""

import json

from processes import BLOCK

COMMAND = "from momentum_lm.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_an_evaluation_is_the_same(data, flags, run_cli, tmp_path):
    trained = run_cli(flags(data, tmp_path / "run", "--arch", "momentum_lm_tiny", task="ours", updates=2))
    assert trained.returncode == 0, trained.stderr[-3000:]
    words = ["--task", "lm_perplexity", data, "--path", tmp_path / "run", "--context-lengths", "16", "--results-dir"]
    with_fairseq = run_cli(["fairseq-eval", *words, tmp_path / "with"])
    without = run_cli(["python", "-c", BLOCK + COMMAND, "eval", *words, tmp_path / "without"])
    assert with_fairseq.returncode == without.returncode == 0, without.stderr
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without")]
    names = ("split", "context_length", "perplexity", "ci95", "nll", "num_tokens", "data_sha256")
    first, second = ([{name: run[name] for name in names} for run in one["runs"]] for one in found)
    assert first == second and len(first) > 0  # all but how long it took
