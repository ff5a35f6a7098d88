"""A filter of one's own, as docs/extension.md has it: trained, resumed, evaluated, and missed where it is not given."""

import json
import re
from pathlib import Path

import pytest
import torch

from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.formats.native import read_native
from momentum_lm.system import import_user_dir

EXTENSION = (Path(__file__).parents[2] / "docs" / "extension.md").read_text("utf-8")
MODEL = ["--arch", "momentum_llama_lm_tiny", "--decoder-layers", "2", "--decoder-embed-dim", "24",
         "--decoder-ffn-embed-dim", "48", "--decoder-attention-heads", "2", "--decoder-kv-heads", "1",
         "--momentum-kind", "smear", "--momentum-at", "output,values,ffn", "--momentum-taps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with that filter."""
    folder = tmp_path_factory.mktemp("own") / "my_filters"
    folder.mkdir()
    blocks = re.findall(r"```python\n(.*?)```", EXTENSION, re.DOTALL)
    (code,) = (block for block in blocks if "@register_filter" in block)
    (folder / "__init__.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def trained(own, run_cli, data, flags, tmp_path_factory):
    """A run of six updates."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = run_cli([*flags(data, run, *MODEL, task="ours", updates=6), "--user-dir", own])
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_it_trains_and_goes_on_bitwise(trained, own, run_cli, data, flags, tmp_path):
    for updates in (3, 6):
        done = run_cli([*flags(data, tmp_path / "run", *MODEL, task="ours", updates=updates), "--user-dir", own])
        assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = (load_checkpoint(run / "checkpoint_last.pt")["model"] for run in (trained, tmp_path / "run"))
    learned = [name for name in whole if re.search(r"\.momentum(_values|_ffn)?\.weight$", name)]
    assert len(learned) == 6 and all(float(whole[name].abs().max()) > 0 for name in learned)
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


def test_it_is_evaluated_and_its_code_is_part_of_the_record(trained, own, run_cli, data, tmp_path):
    command = ["fairseq-eval", "--task", "lm_perplexity", data, "--path", trained, "--context-lengths", "16",
               "--results-dir", tmp_path / "results"]  # fmt: skip
    done = run_cli([*command, "--user-dir", own])
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "results/results.json").read_text())
    changed = tmp_path / "my_filters"
    changed.mkdir()
    (changed / "__init__.py").write_text(
        (own / "__init__.py").read_text().replace("return gate *", "return 2 * gate *")
    )
    other = run_cli([*command, "--user-dir", changed])
    assert other.returncode == 2 and "--force" in other.stderr  # results of another model are there
    other = run_cli([*command, "--user-dir", changed, "--force"])
    second = json.loads((tmp_path / "results/results.json").read_text())
    assert other.returncode == 0 and first["runs"][0]["perplexity"] != second["runs"][0]["perplexity"]


def test_an_export_goes_alone_and_comes_back(trained, own, run_cli, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    checkpoint = trained / "checkpoint_last.pt"
    for source, target in ((checkpoint, "out"), ("out", "back")):
        done = run_cli(["momentum-lm", "convert", source, target, "--user-dir", own], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/own_filters.py").read_text() == (own / "__init__.py").read_text()
    before, after = (load_checkpoint(path)["model"] for path in (checkpoint, tmp_path / "back/model.pt"))
    assert all(before[name].equal(after[name]) for name in after)

    import_user_dir(own)
    native = read_native(checkpoint).model.eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    padded = tokens.clone()
    padded[1, :7] = native.config.padding_idx
    mask = padded != native.config.padding_idx
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, native(tokens), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model(padded, attention_mask=mask.long()).logits[mask], native(padded)[mask], atol=1e-5, rtol=1e-5
        )
        documents = torch.arange(20)[None] // 8
        packed = model(tokens[:1], position_ids=torch.arange(20)[None] % 8).logits
        torch.testing.assert_close(packed, native(tokens[:1], segment_ids=documents), atol=1e-5, rtol=1e-5)
        for beams in (1, 2):
            settings = dict(attention_mask=mask.long(), num_beams=beams, do_sample=False, max_new_tokens=6)
            cached, whole = (model.generate(padded, use_cache=use, **settings) for use in (True, False))
            assert cached.equal(whole)
        with pytest.raises(ValueError, match=r"momentum_kind=smear takes an attention_mask \(B, T\) alone"):
            model(tokens, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool).tril())


@pytest.mark.parametrize("words", [["momentum-lm", "convert"], [
    "fairseq-eval", "--task", "lm_perplexity", "DATA", "--results-dir", "out", "--path"
]])  # fmt: skip
def test_without_its_module_it_is_named(words, trained, run_cli, data, tmp_path):
    words = [data if word == "DATA" else word for word in words]
    words = [*words, trained / "checkpoint_last.pt", *(["out"] if "convert" in words else [])]
    failed = run_cli(words, cwd=tmp_path)
    assert failed.returncode == 2 and "smear" in failed.stderr and "--user-dir DIR" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_what_is_no_user_dir(trained, run_cli, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json/__init__.py").write_text("")
    for folder, problem in (
        ("nowhere", "must be a folder with an __init__.py"),
        ("json", "another module called json"),
    ):
        failed = run_cli(["momentum-lm", "convert", trained / "checkpoint_last.pt", "out", "--user-dir", folder],
                         cwd=tmp_path)  # fmt: skip
        assert failed.returncode == 2 and problem in failed.stderr and f"--user-dir {folder}" in failed.stderr
