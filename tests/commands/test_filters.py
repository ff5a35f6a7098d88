"""The filters that docs/training.md names, by fairseq-train."""

import re
from pathlib import Path

import pytest

from momentum_lm.formats.checkpoint import load_checkpoint

TRAINING = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
FLAG = r"(?: --momentum-(?:at|taps) [\w,]+| --momentum-current)"
PRESETS = sorted(set(re.findall(rf"`(--momentum-kind \w+{FLAG}*)`", TRAINING)))
BY_DAY = "--momentum-kind fir --momentum-at embedding --momentum-taps 1"
MODEL = ["--arch", "momentum_llama_lm_tiny", "--decoder-layers", "2", "--decoder-embed-dim", "24",
         "--decoder-ffn-embed-dim", "48", "--decoder-attention-heads", "2", "--decoder-kv-heads", "1"]  # fmt: skip


def test_the_page_names_presets():
    assert len(PRESETS) >= 8 and BY_DAY in PRESETS, PRESETS


@pytest.mark.parametrize("preset", [pytest.param(p, marks=() if p == BY_DAY else pytest.mark.nightly) for p in PRESETS])
def test_a_preset_trains(preset, run_cli, data, flags, tmp_path):
    done = run_cli(flags(data, tmp_path / "run", *MODEL, *preset.split(), task="ours", updates=50))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["model"]
    learned = [name for name in weights if re.search(r"\.momentum\w*\.(weights|delta)$", name)]
    assert bool(learned) == (preset.split()[1] != "ema")
