"""What runs on a GPU, without one.

Every stage in miniature, from an environment like the GPU machine's; stages that hang or crash lose only themselves;
and the documents are what the results say.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

pytest.importorskip("fairseq")
pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def programs():
    """The modules of benchmarks/, which import one another by name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_checks
        import gpu_registry
        import gpu_results
        import gpu_stages
    finally:
        sys.path.remove(str(BENCHMARKS))
    return argparse.Namespace(checks=gpu_checks, registry=gpu_registry, results=gpu_results, stages=gpu_stages)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """(interpreter, environment) where nothing is installed and no .pth file is read.

    The packages that the project needs come by PYTHONPATH, without the project's own metadata.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(symlinks=True).create(folder / "venv")
    site = folder / "site"
    site.mkdir()
    for part in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(part).iterdir():
            ours = entry.name.startswith(("momentum_lm", "fairseq_compat", "__editable__"))
            if not ours and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FAIRSEQ_", "PYTEST_"))}
    return folder / "venv" / "bin" / "python", {**kept, "PYTHONPATH": str(site)}


@pytest.fixture(scope="module")
def check(bare, tmp_path_factory):
    """check(output, *flags) -> the records by stage of a run in miniature, and what it printed."""
    python, environment = bare
    bundle = tmp_path_factory.mktemp("bundle")
    common = [python, BENCHMARKS / "gpu_checks.py", "--bundle", bundle, "--device", "cpu", "--smoke"]

    def run(output, *flags):
        command = [*common, "--output", output, *flags]
        done = subprocess.run(command, env=environment, cwd=bundle, capture_output=True, text=True, check=False)
        log = (bundle / "references" if "--references" in flags else output) / "log.txt"
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-5000:]
        return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}, done.stdout

    run(tmp_path_factory.mktemp("references"), "--references")
    return run


def complete(stage, record):
    """Whether the stage is whole, and has all that does not need a GPU."""
    of_gpu = ("mfu", "peak_gib", "flash", "compiled", "fp16", "compilations/", "of_plan", "versions")
    missing = [check.key for check in stage.checks if check.value(record["results"]) is None]
    assert record["status"] == "ok" and not record["errors"]
    assert not [key for key in missing if not any(part in key for part in of_gpu)], stage.name


@pytest.mark.nightly
@pytest.mark.parametrize("call", ["first", "second"])
def test_every_stage_runs_in_miniature_where_nothing_is_installed(call, check, programs, tmp_path):
    records, printed = check(tmp_path, *(["--second"] if call == "second" else []))
    stages = programs.registry.SECOND if call == "second" else programs.registry.FIRST
    assert list(records) and records.keys() == {stage.name for stage in stages}
    for stage in stages:
        complete(stage, records[stage.name])
    assert printed == (tmp_path / "summary.txt").read_text() and printed.count("\n") == len(stages)
    if call == "first":
        assert records["training"]["results"]["differences"]["fp32"] < 1e-3
        assert records["kernels"]["results"]["passed"] == 2
        with pytest.raises(ValueError, match="in miniature"):
            programs.results.merge(tmp_path, tmp_path / "results")


STAGES = """
import os, signal, subprocess, sys, time

def hang(job):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job.record(known=1, child=child.pid)
    time.sleep(600)

def crash(job):
    job.record(known=2)
    os.kill(os.getpid(), signal.SIGSEGV)

def raises(job):
    job.record(known=3)
    with job.part("a part"):
        raise ValueError("no such luck")
    job.record(more=4)

def writes_nothing(job):
    os._exit(3)

def fine(job):
    job.record(known=5)
"""


def alive(pid):
    """Whether a process runs: one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_hangs_or_crashes_loses_only_itself(programs, tmp_path, monkeypatch, capsys):
    (tmp_path / "made_up.py").write_text(STAGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    Stage = programs.registry.Stage
    stages = [
        Stage(name, f"made_up:{name}", "", 4, 0) for name in ("hang", "crash", "raises", "writes_nothing", "fine")
    ]
    stages += [Stage("late", "made_up:fine", "", 1, 1000), Stage("rest", "made_up:fine", "", None, 0)]
    args = argparse.Namespace(output=tmp_path / "out", bundle=tmp_path, device="cpu", smoke=False, minutes=9)
    began = time.monotonic()
    assert programs.checks.run_stages(stages, args, began) == 5
    assert time.monotonic() - began < 60
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    found = {name: (record["status"], record["results"].get("known")) for name, record in records.items()}
    assert found == {
        "hang": ("killed", 1),
        "crash": ("failed", 2),
        "raises": ("failed", 3),
        "writes_nothing": ("failed", None),
        "fine": ("ok", 5),
        "rest": ("ok", 5),
    }
    assert records["raises"]["results"]["more"] == 4 and "no such luck" in records["raises"]["errors"]["a part"]
    assert records["fine"].keys() == records["writes_nothing"].keys()
    assert records["crash"]["errors"] == {"process": f"ended with status -{signal.SIGSEGV.value}"}
    assert not alive(records["hang"]["results"]["child"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 and printed[5].split()[:2] == ["late", "skipped:"]


def test_time_that_a_stage_leaves_is_for_those_after_it(programs, tmp_path, monkeypatch):
    given = {}

    def run_stage(stage, seconds, args, scratch, log):
        given[stage.name] = seconds
        return {"status": "ok", "seconds": 0.0, "results": {}, "errors": {}}

    monkeypatch.setattr(programs.checks, "run_stage", run_stage)
    args = argparse.Namespace(output=tmp_path, smoke=False, minutes=4.5)
    assert programs.checks.run_stages(programs.registry.FIRST, args, time.monotonic()) == 0
    # half of 60, 90, 150, 45 and 60 s, one on top of the other; the last gets all of 270 s but the closing
    assert [round(seconds) for seconds in given.values()] == [30, 75, 150, 172, 202, 267]


def test_the_chosen_checks_of_the_kernels_exist(programs, run_cli, tmp_path):
    """As they are collected where there is a GPU."""
    (tmp_path / "as_with_a_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    chosen = [*programs.stages.CHOSEN, *programs.stages.MINIATURE]
    command = [
        "python",
        "-m",
        "pytest",
        "-p",
        "as_with_a_gpu",
        "--collect-only",
        "-q",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    flags = ["-p", "no:cacheprovider", "tests/ops/triton_kernel.py"]
    done = run_cli([*command, *flags], env={"PYTHONPATH": tmp_path}, cwd=BENCHMARKS.parent)
    known = {line.partition("::")[2] for line in done.stdout.splitlines()}
    assert len(chosen) > 12 and not set(chosen) - known


def test_the_documents_are_what_the_results_say(programs):
    for path, text in programs.results.documents(programs.results.load()).items():
        assert path.read_text("utf-8") == text, f"{path.name}: run python benchmarks/gpu_results.py"


def test_results_are_merged_by_card_and_shown(programs, tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    out.mkdir()

    def record(name, found, card="NVIDIA H100 80GB HBM3", **more):
        text = {
            "stage": name,
            "card": card,
            "status": "ok",
            "seconds": 9.0,
            "smoke": False,
            "results": found,
            "errors": {},
        }
        text |= more
        (out / f"{name}.json").write_text(json.dumps(text))

    record(
        "step",
        {
            "variants": {"gpt_lm": {"mfu": 0.4321}},
            "momentum_share": {"estimate": 0.011, "low": 0.01, "high": 0.012, "n": 20},
        },
    )
    record("device", {"copy_tb_per_s": 3.0}, card="NVIDIA H200")
    with pytest.raises(ValueError, match="of 2 cards"):
        programs.results.merge(out, results)
    record("device", {"copy_tb_per_s": 3.0})
    path = programs.results.merge(out, results)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    record("device", {"copy_tb_per_s": 3.1}, status="unfinished")  # the whole run was killed meanwhile
    (out / "step.json").unlink()
    record("kernels", {}, status="killed")  # knows nothing, and replaces nothing
    programs.results.merge(out, results)
    cards = programs.results.load(results)
    assert cards[path.stem]["stages"].keys() == {"device", "step"}
    document, part = programs.results.document(cards), programs.results.performance_part(cards)
    assert "| at least 50% | 43.2% (missed) |" in document and "| 3.10 |" in document and "| 3.10 |" in part
    assert "| at most 2% | +1.1% (+1.0% to +1.2%, n = 20) |" in part
    assert "`kernels`" in document and "| checks passed |  | not yet measured |" in document
    assert "NVIDIA H100 80GB HBM3: ok, 9 s, 20" in document and "HBM3: unfinished, 9 s" in document


def test_a_bundle_that_is_too_large_is_refused(tmp_path):
    command = ["bash", str(BENCHMARKS / "gpu_bundle.sh"), "--check", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    with open(tmp_path / "large", "wb") as file:
        file.truncate(61 << 20)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "more than 60 MiB" in done.stderr


@pytest.mark.nightly
def test_the_bundle_can_be_made(run_cli, tmp_path):
    """From the package registry, in minutes: small enough, and its one command is named."""
    environment = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    done = run_cli(["/bin/bash", BENCHMARKS / "gpu_bundle.sh", tmp_path / "bundle"], env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("PYTHONPATH=") and "--minutes 9" in done.stdout
    assert {path.name for path in (tmp_path / "bundle").iterdir()} == {"site", "tokens", "references"}
