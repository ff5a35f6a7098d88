"""A filter of one's own, as docs/extension.md has it: trained, resumed, evaluated, and missed where it is not given."""

import copy
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
    for source, target in ((checkpoint, "out"), (checkpoint, "out"), ("out", "back")):  # what it wrote it may replace
        done = run_cli(["momentum-lm", "convert", source, target, "--user-dir", own, "--force"], cwd=tmp_path)
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
        with pytest.raises(ValueError, match=r"Smear takes an attention_mask \(B, T\) alone"):
            model(tokens, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool).tril())


RICH = """
import torch
from momentum_lm.model import WindowFilter, register_filter

@register_filter("rich")
class Rich(WindowFilter):
    def __init__(self, heads, size, config):
        super().__init__(heads, size, config)
        self.layer = torch.nn.Linear(size, size)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, size), persistent=False)

    def window(self, x):
        x = torch.nn.functional.dropout(x[..., -2, :], 0.5, self.training)
        return self.scale.to(x.dtype) * self.layer(x)
"""


def test_an_export_with_layers_buffers_and_dropout(run_cli, data, flags, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    (tmp_path / "rich_filters").mkdir()
    (tmp_path / "rich_filters/__init__.py").write_text(RICH)
    model = [word if word != "smear" else "rich" for word in MODEL]
    given = ["--user-dir", tmp_path / "rich_filters"]
    done = run_cli([*flags(data, tmp_path / "run", *model, task="ours", updates=2), *given])
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "run/checkpoint_last.pt"
    done = run_cli(["momentum-lm", "convert", checkpoint, tmp_path / "out", *given])
    assert done.returncode == 0 and "to load the model takes momentum_lm" in done.stdout, done.stderr
    import_user_dir(tmp_path / "rich_filters")
    native, tokens = read_native(checkpoint).model.eval(), torch.randint(4, 90, (2, 12))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        for one in (model, copy.deepcopy(model)):
            torch.testing.assert_close(one(tokens).logits, native(tokens), atol=1e-5, rtol=1e-5)
            assert not one(tokens).logits.equal(one.train()(tokens).logits)
            one.eval()
        half = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16
        )
        assert half.model.layers[0].self_attn.momentum.layer.weight.dtype == torch.float32
        torch.testing.assert_close(half(tokens).logits.float(), native(tokens), atol=0.1, rtol=0.1)


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
    for name in ("json", "time"):  # of a file, and built in
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for folder, problem in (
        ("nowhere", "must be a folder with an __init__.py"),
        ("json", "another module called json"),
        ("time", "another module called time"),
    ):
        failed = run_cli(["momentum-lm", "convert", trained / "checkpoint_last.pt", "out", "--user-dir", folder],
                         cwd=tmp_path)  # fmt: skip
        assert failed.returncode == 2 and problem in failed.stderr and f"--user-dir {folder}" in failed.stderr
