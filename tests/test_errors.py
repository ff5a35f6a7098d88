"""An error names what its user typed: a Python argument, a command's flag, a key of a file."""

import pickle
from pathlib import Path

import pytest

from momentum_lm.errors import Argument, CheckpointError, UserError, arg, flags, main_guard, named


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
    with pytest.raises(UserError) as raised, named(flags()):
        with named(lambda argument: Argument("n_embd", 5) if argument.name == "dim" else argument):
            with named(lambda argument: f"key {argument.name}" if argument.name == "heads" else argument):
                problem()
    assert str(raised.value) == "--n-embd 5 is not a multiple of key heads; or add --force"


def test_an_error_within_another_keeps_its_arguments():
    with pytest.raises(CheckpointError) as raised:
        try:
            problem()
        except UserError as error:
            raise CheckpointError("model.pt: ", error) from error
    assert str(raised.value).startswith("model.pt: dim=190 is")
    assert raised.value.line().startswith("model.pt: --dim 190 is")


def test_values_as_they_are_typed():
    error = UserError(
        *(arg(shots=(0, 4)), " ", arg(gpus=1), " ", arg(separator="a b"), " ", arg(position="x" * 99), " "),
        *(arg(output=Path("y" * 99)), " ", arg(pad_to=""), " ", arg("tokenizer"), "\n\x1b"),
    )
    words = f"--shots 0,4 --gpus 1 --separator \"a b\" --position {'x' * 79}… --output {'y' * 99} --pad-to \"\" --tokenizer ?"
    assert error.line() == words
    with pytest.raises(TypeError):
        arg("dim", heads=3)
