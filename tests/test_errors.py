"""An error names what its user typed: a Python argument, a command's flag, a key of a file."""

import ast
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import momentum_lm
from momentum_lm.cli.options import NAMES
from momentum_lm.errors import Argument, CheckpointError, UserError, arg, flags, main_guard, named
from momentum_lm.files import check_writable
from momentum_lm.formats.decoder_options import model_flags
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.text.tokenizer import load_tokenizer


def problem():
    raise UserError(arg(dim=190), " is not a multiple of ", arg(heads=3), "; or add ", arg(force=True))


def test_each_front_end_renders_its_own_names(capsys):
    with pytest.raises(UserError) as raised:
        problem()
    assert str(raised.value) == "dim=190 is not a multiple of heads=3; or add force=True"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    with pytest.raises(UserError) as raised, named(flags(dim="--decoder-embed-dim")):
        problem()
    assert str(raised.value) == "--decoder-embed-dim 190 is not a multiple of --heads 3; or add --force"
    assert main_guard(lambda argv: problem())([]) == 2
    assert capsys.readouterr().err == "error: --dim 190 is not a multiple of --heads 3; or add --force\n"


def test_the_innermost_name_wins_and_other_arguments_stay_arguments():
    renamed = named(lambda argument: Argument("n_embd", 5) if argument.name == "dim" else argument)
    innermost = named(lambda argument: f"key {argument.name}" if argument.name == "heads" else argument)
    with pytest.raises(UserError) as raised, named(flags()), renamed, innermost:
        problem()
    assert str(raised.value) == "--n-embd 5 is not a multiple of key heads; or add --force"


def test_an_error_within_another_keeps_its_arguments():
    with pytest.raises(UserError) as raised:
        problem()
    error = CheckpointError("model.pt: ", raised.value)
    assert str(error).startswith("model.pt: dim=190 is")
    assert error.line().startswith("model.pt: --dim 190 is")


def test_values_as_they_are_typed():
    error = UserError(
        *(arg(shots=(0, 4)), " ", arg(gpus=1), " ", arg(separator="a b"), " ", arg(position="x" * 99), " "),
        *(arg(output=Path("y" * 99)), " ", arg(pad_to=""), " ", arg("tokenizer"), "\n\x1b"),
    )
    words = (
        f'--shots 0,4 --gpus 1 --separator "a b" --position {"x" * 79}… --output {"y" * 99} --pad-to "" --tokenizer ?'
    )
    assert error.line() == words
    with pytest.raises(TypeError):
        arg("dim", heads=3)


def hostile(folder):
    torch.save({"model": {}, "callback": os.system}, folder / "model.pt")
    load_native(folder)


def without_heads(folder):
    model = Decoder(DecoderConfig(50, 8, 8, 1, 2))
    torch.save({f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model.pt")
    load_native(folder)


def overridden(folder):
    model = Decoder(DecoderConfig(50, 8, 8, 1, 2))
    torch.save({f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model.pt")
    load_native(folder, {"heads": 4})


SHAPE = dict(vocab_size=50, dim=12, ffn_dim=64, layers=2, heads=3)
# what a user does in Python; the message; what it names in a command; what with lm_eval
RENDERED = {
    "width": (lambda p: DecoderConfig(**{**SHAPE, "dim": 190}), "dim=190 is not a multiple of heads=3",
              "--decoder-embed-dim 190 is not a multiple of --decoder-attention-heads 3",
              "--model_args dim=190 is not a multiple of --model_args heads=3"),
    "layers": (lambda p: DecoderConfig(**{**SHAPE, "layers": 0}), "layers=0: must be at least 1",
               "--decoder-layers 0: must be", "--model_args layers=0: must be"),
    "decay": (lambda p: DecoderConfig(**SHAPE, momentum_kind="ema", momentum_eta=1.0), "momentum_eta=1.0: must be "
    "strictly",
              "--momentum-eta 1: must be", "--model_args momentum_eta=1: must be"),
    "kind": (lambda p: DecoderConfig(**SHAPE, position="alibi"), "position='alibi': must be one of sinusoidal",
             "--position alibi: must be", "--model_args position=alibi: must be"),
    "gate": (lambda p: DecoderConfig(**SHAPE, momentum_gate="zero"), "momentum_gate='zero' needs momentum_kind ema",
             "--momentum-gate zero needs --momentum-kind ema", "--model_args momentum_gate=zero needs --model_args "
             "momentum_kind"),
    "trust": (hostile, "can run code. If you trust where it comes from, add trust=True or", "add --trust-checkpoint or",
              "add --model_args trust_checkpoint=True or"),
    "heads": (without_heads, "add overrides=\"{'decoder_attention_heads': N}\"",
              "add --model-overrides \"{'decoder_attention_heads': N}\"",
              "add --model_args model_overrides=\"{'decoder_attention_heads': N}\""),
    "overrides": (overridden, "overrides: no option is called 'heads'", "--model-overrides: no option",
                  "--model_args model_overrides: no option"),
    "tokenizer": (load_tokenizer, "or name their folder with tokenizer", "with --tokenizer", "with --model_args "
    "tokenizer"),
    "results": (lambda p: check_writable("/proc/nowhere", "folder"), "folder='/proc/nowhere' cannot be "
    "written",
                "--results-dir /proc/nowhere cannot", "--model_args folder=/proc/nowhere cannot"),
}  # fmt: skip


@pytest.mark.parametrize("case", RENDERED)
def test_the_same_error_from_python_from_a_command_and_from_lm_eval(case, tmp_path):
    pytest.importorskip("lm_eval")
    from momentum_lm.harness.lm_eval import _model_args

    cause, in_python, command, model_args = RENDERED[case]
    evaluation = {"trust", "heads", "overrides", "tokenizer", "results"}
    for names, message in (
        (lambda argument: argument, in_python),
        (NAMES if case in evaluation else model_flags, command),
        (_model_args, model_args),
    ):
        with pytest.raises(UserError) as raised, named(names):
            cause(tmp_path)
        assert message in str(raised.value)


def test_no_text_of_the_core_names_a_flag():
    """Messages of the core name arguments; whole commands in backquotes, and pages about a command, may have flags."""
    rooms = "ops model text formats lm icl analysis results studies planning".split()
    package = Path(momentum_lm.__file__).parent
    found = []
    for path in sorted(path for room in rooms for path in (package / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "Checkpoint", "Interrupted")):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                plain = re.sub(r"`[^`]*`|(fairseq|python|pip install)[^`;]*", "", " ".join(texts))
                found += [f"{path}:{node.lineno}: {plain}"] * bool(re.search(r"(^|\W)--[a-z]", plain))
    assert not found, "\n".join(found)
