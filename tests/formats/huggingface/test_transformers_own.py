"""The export under transformers' own test mixins: whatever ``LlamaForCausalLM`` passes with them, it passes too.

The mixins are in transformers' repository and not in its wheel. ``MOMENTUM_LM_TRANSFORMERS_TESTS`` names a checkout of
it, of about the installed version; without it pip is asked for the source distribution, which has the half about models
and not the one about generation.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import types
import unittest
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", minversion="5")

from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig  # noqa: E402
from momentum_lm.formats.remote.modeling_momentum_lm import MomentumLMForCausalLM, MomentumLMModel  # noqa: E402

VARIABLE = "MOMENTUM_LM_TRANSFORMERS_TESTS"
SHAPE = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=37,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    num_key_value_heads=2, head_dim=12, norm="rms", ffn="gated", activation="silu", bias="qkv", qk_norm=True,
    position="rotary", rotary_fraction=0.5, rotary_scaling="llama3:8,1,4,64", scale_embeddings=False,
)  # fmt: skip
CONFIGURATIONS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **SPECIAL),
    "vanilla": lambda: MomentumLMConfig(**SHAPE, **SPECIAL),
    "ema": lambda: MomentumLMConfig(**SHAPE, **SPECIAL, position="rotary", momentum_kind="ema", momentum_learned=True),
    "multi_ema": lambda: MomentumLMConfig(**SHAPE, **SPECIAL, momentum_kind="multi_ema"),
    "grouped": lambda: MomentumLMConfig(**SHAPE, **SPECIAL, **LLAMA, momentum_kind="ema", momentum_learned=True),
    "everywhere": lambda: MomentumLMConfig(
        **SHAPE, **SPECIAL, momentum_kind="ema", momentum_learned=True,
        momentum_at="output,values,keys,queries,input,ffn,ffn_hidden,embedding,depth",
    ),
    "fir": lambda: MomentumLMConfig(**SHAPE, **SPECIAL, momentum_kind="fir", momentum_at="output,values,ffn,embedding"),
}  # fmt: skip
OURS = [kind for kind in CONFIGURATIONS if kind != "llama"]
CLASSES = {
    "llama": [transformers.LlamaModel, transformers.LlamaForCausalLM],
    **{kind: [MomentumLMModel, MomentumLMForCausalLM] for kind in OURS},
}


@pytest.fixture(scope="module")
def mixins(tmp_path_factory, pytestconfig):
    """(module of transformers' common tests, the mixins that there are)."""
    folder = os.environ.get(VARIABLE)
    if folder is None:
        folder = _from_pip(tmp_path_factory.mktemp("transformers"))
    if not (Path(folder) / "tests" / "test_modeling_common.py").is_file():
        pytest.skip(f"{folder} has no tests/test_modeling_common.py; set {VARIABLE} to a checkout of transformers")
    for file in (Path(folder) / "tests").rglob("*.py"):
        for mark in sorted(set(re.findall(r"\bmark\.([a-z]\w+)", file.read_text(encoding="utf-8")))):
            pytestconfig.addinivalue_line("markers", f"{mark}: of transformers' own tests")
    before, path = (
        {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "tests"},
        list(sys.path),
    )
    for name in before:  # theirs has the same name
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield _load(Path(folder))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path


def _from_pip(folder):
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "transformers",
        "--dest",
        str(folder),
    ]
    try:
        done = subprocess.run(
            [*command, f"transformers=={transformers.__version__}"], capture_output=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done is None or done.returncode or not archives:
        pytest.skip(
            f"pip has no source distribution of transformers {transformers.__version__}; set {VARIABLE} to a checkout"
        )
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return archives[0].with_name(archives[0].name.removesuffix(".tar.gz"))


def _load(folder):
    package = types.ModuleType("tests")
    package.__path__ = [str(folder / "tests")]
    sys.modules["tests"] = package
    for name, mixin in (
        ("generation.test_utils", "GenerationTesterMixin"),
        ("exporters.test_export", "ExportTesterMixin"),
    ):
        if not (folder / "tests" / f"{name.replace('.', '/')}.py").is_file():  # a source distribution
            parent = types.ModuleType(f"tests.{name.partition('.')[0]}")
            parent.__path__ = []
            sys.modules[parent.__name__] = parent
            module = types.ModuleType(f"tests.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[module.__name__] = module
    try:
        common = importlib.import_module("tests.test_modeling_common")
    except ImportError as error:
        pytest.skip(f"transformers' tests in {folder} cannot be imported here: {error}")
    return common


def _case(common, kind):
    """A test case of a configuration, as transformers' own models have one each."""

    class Tester:
        is_training, batch_size, seq_length, num_labels, num_choices, hidden_size = True, 3, 7, 3, 4, 32
        num_hidden_layers, num_attention_heads, encoder_seq_length, key_length = 2, 4, 7, 7
        base_model_class, causal_lm_class = CLASSES[kind]

        def __init__(self, parent):
            self.parent = parent

        def get_config(self):
            return CONFIGURATIONS[kind]()

        def prepare_config_and_inputs_for_common(self):
            tokens = common.ids_tensor([self.batch_size, self.seq_length], 99)
            return self.get_config(), {"input_ids": tokens, "attention_mask": common.torch.ones_like(tokens).tril()}

    class Case(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = tuple(CLASSES[kind])
        model_tester_class = Tester

        def setUp(self):
            self.model_tester = Tester(self)

    return Case


def _failures(common, kind):
    """(names of the tests that ran and passed, text of those that did not)."""
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(_case(common, kind))
    names = [test.id().rpartition(".")[2] for test in suite]
    result = unittest.TestResult()
    suite.run(result)
    name = lambda test: getattr(test, "test_case", test).id().rpartition(".")[2]  # noqa: E731
    failed = {name(test): text for test, text in [*result.failures, *result.errors]}
    skipped = {name(test) for test, _ in result.skipped}
    return set(names) - failed.keys() - skipped, failed


@pytest.mark.nightly
def test_what_llama_passes(mixins, monkeypatch):
    from transformers.models.auto import modeling_auto

    monkeypatch.setitem(
        modeling_auto.MODEL_MAPPING_NAMES, "momentum_lm", "MomentumLMModel"
    )  # by which the mixins know who takes labels
    monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "momentum_lm", "MomentumLMForCausalLM")
    passed, _ = _failures(mixins, "llama")
    assert len(passed) > 50
    for kind in OURS:
        _, failed = _failures(mixins, kind)
        lost = {name: text.splitlines()[-1] for name, text in failed.items() if name in passed}
        assert not lost, (kind, lost)
