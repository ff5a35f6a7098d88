import json
import os
import shutil
import sys

import pytest

from momentum_lm.cli import doctor


def found(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


def write_distribution(folder, name, version):
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_installation_is_well(run_cli):
    result = run_cli(["momentum-lm", "doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["ok"], report
    by_name = {check["name"]: check for check in report["checks"]}
    assert {
        "python",
        "torch",
        "requirements",
        "fairseq",
        "fairseq hook",
        "plugin",
        "apex",
        "triton",
        "tensorboard",
    } <= set(by_name)
    assert {"sentencepiece", "g++"} <= set(by_name) and any(name.startswith("device") for name in by_name)
    assert by_name["fairseq hook"]["status"] == by_name["plugin"]["status"] == "ok"
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")


@pytest.mark.nightly
def test_without_the_hook_there_are_problems_and_remedies(run_cli):
    result = run_cli(["momentum-lm", "doctor"], env={"FAIRSEQ_COMPAT": "0"})
    assert result.returncode == 1
    assert "problem  fairseq hook" in result.stdout and "remedy: unset FAIRSEQ_COMPAT" in result.stdout
    assert "cannot be imported: ValueError: mutable default" in result.stdout
    assert result.stdout.strip().endswith("problems")


def test_what_is_not_there_says_what_it_would_add(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    checks = [*doctor.check_extras(), *doctor.check_apex()]
    assert [check.name for check in checks] == ["transformers", "lm_eval", "apex"]
    for check, text in zip(checks, ("--hf-model", "--model momentum_lm", "--adam-backend apex"), strict=True):
        assert check.status == "ok" and check.detail.startswith("not installed (would add ") and text in check.detail


def test_requirements_too_old_or_new(tmp_path, monkeypatch):
    write_distribution(tmp_path, "omegaconf", "2.0.6")
    write_distribution(tmp_path, "hydra_core", "1.4.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    (check,) = doctor.check_requirements()
    assert (
        check.status == "problem"
        and check.remedy.startswith("pip install '")
        and "omegaconf<2.4,>=2.3'" in check.remedy
    )
    assert "omegaconf 2.0.6 is not >=2.3" in check.detail and "hydra-core 1.4.0 is not <1.4" in check.detail


def test_requirement_missing(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name == "zstandard":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    (check,) = doctor.check_requirements()
    assert check.status == "problem" and check.detail == "zstandard is missing"


def test_another_fairseq_is_a_problem(tmp_path, monkeypatch):
    write_distribution(tmp_path, "fairseq", "0.10.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = next(doctor.check_fairseq())
    assert first.status == "problem" and "0.10.2" in first.detail and "--no-deps fairseq==0.12.2" in first.remedy


@pytest.mark.parametrize("nvidia", [False, True])
def test_the_unrelated_apex_is_told_from_nvidias(nvidia, tmp_path, monkeypatch):
    if doctor.importlib.util.find_spec("apex"):
        pytest.skip("this environment has an apex of its own")
    assert found(doctor.check_apex(), "apex").status == "ok"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    if nvidia:
        (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = found(doctor.check_apex(), "apex")
    assert (check.status, check.remedy) == (("ok", "") if nvidia else ("warn", "pip uninstall apex"))


def test_broken_sentencepiece(tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('no such symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    check = found(doctor.check_sentencepiece(), "sentencepiece")
    assert check.status == "problem" and "no such symbol" in check.detail and "pip install" in check.remedy


def test_no_compiler(tmp_path, monkeypatch):
    assert (found(doctor.check_compiler(), "g++").status == "ok") == bool(shutil.which("g++") or shutil.which("c++"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(doctor.check_compiler(), "g++").status == "warn"


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    check = found(doctor.check_python(), "python")
    assert check.status == "problem" and check.detail == "3.9.1"


def test_tensorboard_really_writes(tmp_path, monkeypatch):
    check = found(doctor.check_tensorboard(), "tensorboard")
    assert check.status == "ok" and "writes events" in check.detail
    monkeypatch.setattr(doctor.tempfile, "tempdir", os.fspath(tmp_path / "nowhere"))
    assert found(doctor.check_tensorboard(), "tensorboard").status == "problem"


def test_without_torch_every_check_is_still_made(run_cli, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    result = run_cli(["momentum-lm", "doctor", "--json"], env={"PYTHONPATH": tmp_path})
    assert result.returncode == 1, result.stderr
    by_name = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    for name in ("torch", "fairseq", "tensorboard"):
        assert by_name[name]["status"] == "problem" and "No module named 'torch'" in by_name[name]["detail"], by_name[
            name
        ]
    assert by_name["torch"]["remedy"] == "pip install 'torch>=2.6'"
    assert by_name["sentencepiece"]["status"] == "ok" and {"python", "requirements", "apex", "triton", "g++"} <= set(
        by_name
    )
    assert "Traceback" not in result.stdout + result.stderr


def test_a_check_that_breaks_is_a_problem_itself(monkeypatch, capsys):
    def check_driver():
        yield doctor.Check("ok", "card", "there")
        raise RuntimeError("the driver is\ntoo old")

    monkeypatch.setattr(doctor, "CHECKS", [check_driver, doctor.check_python])
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "ok       card" in out and "ok       python" in out
    assert "problem  driver         cannot be checked: RuntimeError: the driver is too old" in out


def test_triton_of_another_distribution(tmp_path, monkeypatch):
    if doctor.importlib.util.find_spec("triton"):
        pytest.skip("this environment has a triton of its own")
    (tmp_path / "triton.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert found(doctor.check_triton(), "triton") == doctor.Check("ok", "triton", "of unknown version")
    write_distribution(tmp_path, "pytorch_triton", "3.9.0")
    (tmp_path / "pytorch_triton-3.9.0.dist-info/top_level.txt").write_text("triton\n")
    assert found(doctor.check_triton(), "triton") == doctor.Check("ok", "triton", "pytorch_triton 3.9.0")
