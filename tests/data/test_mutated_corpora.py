"""Damaged and hostile corpora: the right documents, or one line that names the file; no signal, no hang, little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutated_corpora.py")


def check(folder, first, count, *kinds):
    command = [sys.executable, str(SCRIPT), str(first), str(count), str(folder), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, f"{(folder / 'now').read_text()}: {done.stderr[-2000:]}"
    assert (folder / "now").exists()
    assert [json.loads(line) for line in done.stdout.splitlines()] == []


def test_some_mutations(tmp_path):
    check(tmp_path, 0, 10)


KINDS = """file.txt lines.txt blocks.txt t.csv t.tsv t.jsonl nested.jsonl t.jsonl.gz repetitive.txt.gz t.jsonl.zst
    repetitive.txt.zst t.parquet kind.parquet plain.parquet""".split()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations(tmp_path, kind):
    check(tmp_path, 0, 1000, kind)
