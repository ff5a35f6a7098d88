"""The table of options: what follows from it, shown by adding one to a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import momentum_lm
from momentum_lm.model.config import options
from momentum_lm.model.mlp import ACTIVATIONS

PACKAGE = Path(momentum_lm.__file__).parent
LINES = """
    value_groups: int = option("key and value heads; 0: all", 0, "value_groups", zero=lambda c: c.heads, least=1)
    embedding_share: float = option("share of a head that turns", 1.0, "embedding_share", least=0, most=1)
    block_norm: bool = option("normalise queries and keys", False, "block_norm")
    flow: str = option("which linear layers have one", "all", "flow", choices=("all", "qkv", "none"))
"""
PROGRAM = """
import dataclasses, sys
import momentum_lm, momentum_lm.cli.plan as plan
from momentum_lm.errors import UserError
from momentum_lm.formats.decoder_options import from_fairseq, table, to_fairseq, training_words
from momentum_lm.formats.families import MOMENTUM
from momentum_lm.model import DecoderConfig
momentum_lm.register()
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

flags = "--value-groups 1 --embedding-share 0.5 --block-norm --flow qkv".split()
words = ["data", "--task", "language_modeling", "--tokens-per-sample", "24", "--arch", "gpt_lm_tiny", *flags]
cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words)).model
config = from_fairseq(dict(cfg) | {"max_target_positions": 24}, 50)
assert (config.value_groups, config.embedding_share, config.block_norm, config.flow) == (1, 0.5, True, "qkv")
assert from_fairseq(to_fairseq(config), 50) == config  # what checkpoints hold
# written before
old = {name: value for name, value in to_fairseq(config).items() if name not in ("value_groups", "block_norm", "flow")}
assert from_fairseq(old, 50) == dataclasses.replace(config, value_groups=3, block_norm=False, flow="all")
assert training_words(config)[2:] == "--value-groups 1 --embedding-share 0.5 --block-norm --flow qkv".split()
assert {"value_groups", "embedding_share", "block_norm", "flow"} < table().keys()  # --model-overrides
assert MOMENTUM.config(config, 50)["embedding_share"] == 0.5  # config.json
machine = "--arch gpt_lm_tiny --gpu h100 --tokens 1B".split()
assert plan._job(plan.parser().parse_args([*machine, *flags])).config.value_groups == 1
for wrong in ("--flow no", "--embedding-share 1.5", "--value-groups 1.5"):
    try:
        plan._job(plan.parser().parse_args([*machine, *wrong.split()]))
    except UserError as error:
        assert str(error).startswith(wrong + ": must be"), error
    else:
        raise AssertionError(wrong)
print("well")
"""


def test_an_option_is_one_line_of_the_table(tmp_path):
    copy = tmp_path / "momentum_lm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "model" / "config.py"
    before = "    absent_tokens: tuple"
    table.write_text(table.read_text().replace(before, LINES + before, 1))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "well\n", done.stderr


def test_the_activations_of_the_table_are_those_that_there_are():
    (activation,) = (entry for name, _, entry in options() if name == "activation")
    assert activation.choices == tuple(ACTIVATIONS)


def test_the_exported_configuration_has_the_options_of_the_table():
    """The exported files stand alone, so that what they say of options is written there once more."""
    from momentum_lm.formats.families import MOMENTUM
    from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig
    from momentum_lm.formats.remote.modeling_momentum_lm import ACTIVATIONS as exported

    config = MomentumLMConfig()
    for name, _, entry in options():
        if name == "checkpoint_activations":
            continue
        theirs = MOMENTUM.fields.get(name, name)
        assert MomentumLMConfig.attribute_map.get(name, name) == theirs and hasattr(config, theirs)
        if isinstance(default := getattr(type(config), theirs, None), (bool, str, float)) and entry.fairseq:
            assert default == momentum_lm.model.config.default(name), name
    assert exported.keys() == ACTIVATIONS.keys()
