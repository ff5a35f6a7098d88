"""The installation: what pip puts where, and scripts/setup_env.sh."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOOKED = "import sys; print('fairseq_compat' in sys.modules)"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in (
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "fairseq_compat.py",
        "fairseq_compat.pth",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("momentum_lm", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


class Environment:
    """A virtual environment with this one's packages, but for momentum_lm."""

    def __init__(self, folder, run_cli):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python, self.run_cli = folder / "bin/python", run_cli
        (self.site,) = folder.glob("lib/python*/site-packages")
        packages = folder / "packages"
        packages.mkdir()
        import torch

        for entry in Path(torch.__file__).parent.parent.iterdir():
            if not re.search("momentum_lm|fairseq_compat", entry.name):
                (packages / entry.name).symlink_to(entry)
        (self.site / "others.pth").write_text(f"{packages}\n")

    def run(self, *args, **kwargs):
        return self.run_cli([self.python, *args], **kwargs)

    def pip(self, *args):
        result = self.run_cli(["python", "-m", "pip", "--python", self.python, *args])
        assert result.returncode == 0, result.stderr
        return result

    def install(self, *args):
        return self.pip("install", "--quiet", "--no-deps", "--no-build-isolation", *args)


@pytest.fixture
def environment(tmp_path, run_cli):
    return Environment(tmp_path / "venv", run_cli)


@pytest.mark.parametrize("editable", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["normal", "editable"])
def test_pip_installs_the_hook_and_removes_it(editable, environment, source):
    before = sorted(os.listdir(environment.site))
    assert environment.run("-c", HOOKED).stdout == "False\n"
    environment.install(*(["--editable"] if editable else []), source)
    assert "fairseq_compat.pth" in os.listdir(environment.site)
    assert environment.run("-c", HOOKED).stdout == "True\n"
    code = (
        "import fairseq.models as m, momentum_lm; print(momentum_lm.__file__, 'gpt_lm_tiny' in m.ARCH_MODEL_REGISTRY)"
    )
    where = (source if editable else environment.site) / "momentum_lm"
    assert environment.run("-c", code).stdout == f"{where}/__init__.py True\n"
    for file in ("py.typed", "ops/README.md", "icl/datasets/mr.yaml"):
        assert (where / file).is_file()
    for program in ("momentum-lm", "fairseq-eval"):
        assert environment.run_cli([environment.python.parent / program, "--help"]).returncode == 0
    environment.pip("uninstall", "--quiet", "--yes", "momentum_lm")
    assert [name for name in sorted(os.listdir(environment.site)) if name != "__pycache__"] == before
    gone = environment.run("-c", HOOKED)
    assert gone.stdout == "False\n" and gone.stderr == ""


def test_pth_line_is_harmless_without_its_module(environment):
    shutil.copy(ROOT / "fairseq_compat.pth", environment.site)
    result = environment.run("-c", HOOKED)
    assert result.stdout == "False\n" and result.stderr == ""


@pytest.mark.nightly
def test_doctor_sees_that_a_target_folder_has_no_hook(environment, source, tmp_path):
    environment.install("--target", tmp_path / "target", source)
    path = {"PYTHONPATH": tmp_path / "target"}
    assert environment.run("-c", HOOKED, env=path).stdout == "False\n"
    result = environment.run("-m", "momentum_lm.cli.main", "doctor", "--json", env=path)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1 and checks["fairseq hook"]["status"] == "problem", result.stdout
    assert (
        "pip --target" in checks["fairseq hook"]["detail"]
        and "python -m fairseq_compat" in checks["fairseq hook"]["remedy"]
    )
    assert checks["plugin"]["status"] == checks["fairseq"]["status"] == "ok"


# scripts/setup_env.sh

SETUP = "set -euo pipefail; cd {folder}; . scripts/setup_env.sh; command -v python"


def setup(folder, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON", "VIRTUAL_ENV")}
    command = ["bash", "-c", SETUP.format(folder=folder)]
    environment = {**kept, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_setup_refuses_what_is_no_python(tmp_path):
    for python, message in (("/nowhere/python3", "is not an executable"), ("false", "need Python 3.11 or later")):
        result = setup(ROOT, VENV=tmp_path / "venv", PYTHON=python)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith(f"error: PYTHON={python}") and message in result.stderr
        assert not (tmp_path / "venv").exists()


def test_setup_leaves_other_folders_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    result = setup(ROOT, VENV=tmp_path)
    assert result.returncode == 2 and f"error: VENV={tmp_path} is not a virtual environment" in result.stderr
    assert os.listdir(tmp_path) == ["letter.txt"]


def test_setup_again_does_nothing(tmp_path):
    stamp = Path(sys.prefix) / ".momentum_lm"
    if not stamp.exists():
        pytest.skip("this environment was not made by scripts/setup_env.sh")
    before = stamp.stat().st_mtime_ns
    start = time.monotonic()
    result = setup(ROOT, VENV=sys.prefix, PIP_INDEX_URL="http://nowhere.invalid/simple", PIP_NO_INDEX="1")
    assert result.stdout == f"{sys.prefix}/bin/python\n" and result.stderr == ""
    assert stamp.stat().st_mtime_ns == before and time.monotonic() - start < 5


@pytest.mark.slow
def test_setup_survives_a_kill_and_a_race(source, tmp_path):
    """From package registries: killed half-way, then run twice at once, then once more."""
    venv = tmp_path / "venv"
    command = ["bash", "-c", SETUP.format(folder=source)]
    environment = {**os.environ, "VENV": str(venv)}
    environment.pop("PYTHON", None)
    first = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not list(venv.glob("lib/python*/site-packages/torch")):
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert (venv / ".momentum_lm.unfinished").exists() and not (venv / ".momentum_lm").exists()
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("making the environment" in err for _, err in outputs) == [False, True]
    assert subprocess.run([venv / "bin/momentum-lm", "doctor"], check=False).returncode == 0
    again = setup(source, VENV=venv, PIP_NO_INDEX="1")
    assert again.returncode == 0 and again.stderr == ""
