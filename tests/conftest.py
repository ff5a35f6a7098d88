"""For every test: one thread per process, and a way to run the installed programs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what the tests start

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


def clean_environment(**variables):
    """This process's environment without what would change Python's or the hook's behaviour, plus ``variables``."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FAIRSEQ_", "PYTEST_")) and name not in ("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS")
    }
    return {**kept, **{name: str(value) for name, value in variables.items()}}


@pytest.fixture(scope="session")
def cli_command():
    """cli_command([program, *args], env) -> (command, environment) for subprocess.

    ``program`` is a script of this interpreter's environment, or "python", or a path.
    """

    def build(args, env=None):
        program, *rest = map(str, args)
        if program == "python":
            found = sys.executable
        else:
            found = program if "/" in program else shutil.which(program, path=sysconfig.get_path("scripts"))
            assert found, f"{program} is not installed beside {sys.executable}: run bash scripts/test.sh"
        return [found, *rest], clean_environment(**(env or {}))

    return build


@pytest.fixture(scope="session")
def run_cli(cli_command, tmp_path_factory):
    """run_cli([program, *args], env={...}, **subprocess.run's) -> CompletedProcess with text; ``cli_command`` says which.

    It runs in an empty folder unless ``cwd`` is given.
    """
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(args, env=None, **kwargs):
        command, environment = cli_command(args, env)
        settings = {"cwd": elsewhere, "capture_output": True, "text": True, "timeout": 600, "check": False, **kwargs}
        return subprocess.run(command, env=environment, **settings)

    return run
